//! The thread of the watchdog: it returns a demand thread to the normal priority when a fault waits too long.
//!
//! A demand thread with lowered priority restarts its timer while it answers faults. When the timer expires, the
//! watchdog checks whether a fault waits and none was served since the last check. Then it raises the priority, and the
//! priority stays so for a backoff time, which doubles each time. While faults come often, the timer never expires and
//! the watchdog does not run. That matters: it would need a CPU for a moment, and when that CPU becomes idle again, it
//! attracts the faulting thread.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::read;

use crate::fault::slice::Slice;
use crate::pager_state::PagerState;
use crate::sched::cpus::Cpus;
use crate::sched::priority::{DemandPriority, FIRST_TIMEOUT, NORMAL, lock};
use crate::sched::task;
use crate::threads;

const LONGEST_TIMEOUT: Duration = Duration::from_millis(8);
/// The time to the second check of a fault that waits when the timer expires: it may have arrived just then.
const SECOND_CHECK: Duration = Duration::from_micros(500);
/// This long after the last fault, a demand thread gets the normal priority again, and the watchdog sleeps.
const QUIET: Duration = Duration::from_millis(20);
/// After a fault that had to wait, the priority is not lowered for this time. It doubles up to `LONGEST_BACKOFF`.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);

/// The watchdog timer of a demand thread, as that thread sees it.
#[derive(Debug, Default)]
pub(crate) struct WatchdogTimer {
    restarted: Option<Instant>,
    length: Duration,
}

impl WatchdogTimer {
    /// Called by a demand thread after an answer, if it shares its CPU with the only thread that faults: lowers its
    /// priority, or restarts the timer when half of it has passed. The watchdog, which this starts, may use `cpus`.
    pub(crate) fn restart(
        &mut self,
        shared: &Arc<PagerState>,
        slice: usize,
        cpus: &Cpus,
        now: Instant,
    ) {
        let priority = &shared.slices[slice].priority;
        if priority.is_lowered() {
            if self.restarted.is_none_or(|at| now - at >= self.length / 2) {
                self.restarted = Some(now);
                self.length = (self.length * 2).clamp(FIRST_TIMEOUT, LONGEST_TIMEOUT);
                priority.arm_timer(self.length);
            }
        } else if start(shared, cpus) && priority.lower(&shared.stopping, now) {
            self.restarted = Some(now);
            self.length = FIRST_TIMEOUT;
        }
    }
}

/// Starts the watchdog, if that was not done. Returns whether it is ready. Without it no priority is lowered, which
/// costs only speed.
fn start(shared: &Arc<PagerState>, cpus: &Cpus) -> bool {
    shared.watchdog.started.get_or_init(|| {
        if shared.slices.iter().all(|slice| slice.priority.create_timer()) {
            let (watched, cpus) = (Arc::clone(shared), *cpus);
            let thread = threads::spawn("pager-watch", move || watch(&watched, &cpus));
            *lock(&shared.watchdog.thread) = thread.ok();
        }
    });
    shared.watchdog.ready.load(Ordering::Relaxed)
}

/// What the watchdog knows about a demand thread.
struct WatchedThread {
    faults: u64,
    /// When the number of faults last changed.
    served_at: Instant,
    /// A fault was waiting at the last check.
    waited: bool,
    backoff: Duration,
}

/// The body of the thread.
fn watch(shared: &PagerState, cpus: &Cpus) {
    // The thread inherits the affinity of the demand thread that started it.
    let _ = cpus.bind();
    // A priority that cannot be raised must not be lowered. The thread tries that on itself.
    if task::set_policy(0, libc::SCHED_IDLE).is_err()
        || task::set_policy(0, libc::SCHED_OTHER).is_err()
    {
        return;
    }
    shared.watchdog.ready.store(true, Ordering::Relaxed);
    let new = |_: &Slice| WatchedThread {
        faults: 0,
        served_at: Instant::now(),
        waited: false,
        backoff: FIRST_BACKOFF,
    };
    let mut all: Vec<WatchedThread> = shared.slices.iter().map(new).collect();
    let timers = || shared.slices.iter().filter_map(|slice| slice.priority.timer.get());
    let mut ends: Vec<PollFd<'_>> =
        timers().map(|timer| PollFd::new(timer, PollFlags::IN)).collect();
    while !shared.stopping.load(Ordering::SeqCst) {
        // Without a timeout. After a signal the checks find nothing to do.
        let _ = poll(&mut ends, None);
        for ((watched, slice), end) in all.iter_mut().zip(&shared.slices).zip(&ends) {
            if end.revents().contains(PollFlags::IN) {
                watched.check(slice);
            }
        }
    }
    for slice in &shared.slices {
        while !slice.priority.raise_from_watchdog() {
            thread::sleep(SECOND_CHECK);
        }
    }
}

impl WatchedThread {
    /// Called when the timer has expired.
    fn check(&mut self, slice: &Slice) {
        let priority = &slice.priority;
        if let Some(timer) = priority.timer.get() {
            // This only clears the expiration. The demand thread may have restarted the timer meanwhile.
            let _ = read(timer, &mut [0; 8]);
        }
        // The thread has raised its own priority. A thread that lowers it changes the level before it sets the timer.
        if priority.level.load(Ordering::SeqCst) == NORMAL {
            return;
        }
        let waits = slice.answering.load(Ordering::Relaxed) || slice.filler.uffd.readable();
        let faults = slice.counters.faults();
        let (waited, now) = (mem::replace(&mut self.waited, waits), Instant::now());
        if mem::replace(&mut self.faults, faults) != faults {
            self.served_at = now;
        } else if waits && waited && priority.wants_to_run() {
            *lock(&priority.backoff_until) = Some(now + self.backoff);
            self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
            return self.raise(priority);
        } else if now - self.served_at >= QUIET {
            return self.raise(priority);
        }
        priority.arm_timer(if waits { SECOND_CHECK } else { FIRST_TIMEOUT });
    }

    fn raise(&self, priority: &DemandPriority) {
        if !priority.raise_from_watchdog() {
            priority.arm_timer(SECOND_CHECK);
        }
    }
}
