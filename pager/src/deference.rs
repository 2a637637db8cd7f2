//! Standing back: a demand thread that shares a CPU with the thread whose faults it answers runs there under
//! `SCHED_IDLE`, watched by a thread that ends this when something else wants that CPU.
//!
//! Why: the scheduler wakes a thread on another CPU if one is idle and its own is not, and while a fault is answered its
//! own runs the demand thread. So a faulting thread that nobody has bound would change its CPU with each fault, and
//! waking an idle CPU costs many times what the answer does. But a CPU on which nothing but `SCHED_IDLE` runs counts
//! as idle (`sched_idle_cpu` in the kernel's `kernel/sched/fair.c`): then the faulting thread stays where it is, and
//! goes on at once.
//!
//! The price is that any other thread keeps such a demand thread from running. So it stands back on a lease: a timer that
//! it sets anew while it answers faults. When the timer ends, a thread of its own, the watch, looks whether a fault waits
//! and nothing has been served since. Then the demand thread becomes an ordinary one again, and stays so for a while, each
//! time for longer. While faults come more often than that the watch is never woken: it would take a CPU for a moment, and
//! a CPU that has just become idle takes the faulting thread from the one where it was. Leaving `SCHED_IDLE` takes
//! CAP_SYS_NICE, or an RLIMIT_NICE of 21: where that is refused nobody stands back.

use std::mem;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::read;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::placement::Cpus;
use crate::slice::{Shared, Slice};
use crate::task;

/// How long a demand thread stands back unwatched, at first: each time that it renews its lease, when half of it is over, that
/// is twice as long, up to the longest. Setting a timer that ends before the next tick (4 ms, mostly) takes 11 us in a virtual
/// machine, whose host is told of it; one behind that 0.7 us.
const LEASE: Duration = Duration::from_millis(1);
const LONGEST_LEASE: Duration = Duration::from_millis(8);
/// A fault that waits when the lease ends is looked at once more after this: it may have come just now.
const SECOND_LOOK: Duration = Duration::from_micros(500);
/// So long after the last fault a demand thread is an ordinary one again, and the watch sleeps.
const QUIET: Duration = Duration::from_millis(20);
/// After a fault that had to wait: not again before this, which doubles up to the longest.
const FIRST_BAN: Duration = Duration::from_millis(50);
const LONGEST_BAN: Duration = Duration::from_secs(2);

/// Of one demand thread.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    /// Its id, while it runs: set and taken away by itself.
    thread: Mutex<Option<libc::pid_t>>,
    stance: AtomicU8,
    /// Its lease, from the time that the watch is there.
    lease: OnceLock<OwnedFd>,
    /// It had to come forward: until when it stays so.
    banned: Mutex<Option<Instant>>,
}

/// An ordinary thread. Left by itself.
const ORDINARY: u8 = 0;
/// It is changing its policy. Left by itself.
const CHANGING: u8 = 1;
/// It runs under `SCHED_IDLE`. Left by itself or, when the lease has ended, by the watch.
const BACK: u8 = 2;
/// The watch is changing its policy. Left by the watch.
const FORWARDING: u8 = 3;

impl Standing {
    /// In the demand thread, before it serves.
    pub(crate) fn begin(&self) {
        *lock(&self.thread) = Some(task::own_id());
    }

    /// In the demand thread, at its end: its id may be another thread's from then on.
    pub(crate) fn end(&self) {
        self.come_forward();
        *lock(&self.thread) = None;
    }

    pub(crate) fn is_back(&self) -> bool {
        self.stance.load(Ordering::Relaxed) == BACK
    }

    fn change(&self, from: u8, to: u8) -> bool {
        self.stance.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// In the demand thread, with a lease: under `SCHED_IDLE` from now on. Answers whether it is so. A policy that
    /// somebody else has given it stays.
    fn step_back(&self, stopping: &AtomicBool, now: Instant) -> bool {
        if lock(&self.banned).is_some_and(|until| now < until) || !self.change(ORDINARY, CHANGING) {
            return false;
        }
        // Sequentially consistent: either this thread sees that it is to stop, or the watch sees that it is changing.
        let back = !stopping.load(Ordering::SeqCst)
            && task::policy(0) == Some(libc::SCHED_OTHER)
            && self.set_lease(LEASE)
            && task::set_policy(0, libc::SCHED_IDLE).is_ok();
        self.stance.store(if back { BACK } else { ORDINARY }, Ordering::SeqCst);
        back
    }

    /// In the demand thread: it does not share its CPU with the only thread that faults any more.
    pub(crate) fn come_forward(&self) {
        if self.is_back() && self.change(BACK, CHANGING) {
            // It is allowed to, or would not stand back.
            make_ordinary(0);
            self.stance.store(ORDINARY, Ordering::SeqCst);
        }
    }

    /// In the watch: an ordinary thread again. Answers whether that is done, or needs another look.
    fn bring_forward(&self) -> bool {
        let stance = self.stance.load(Ordering::SeqCst);
        if stance == ORDINARY {
            return true;
        }
        // A demand thread holds this lock only as it begins and ends. As it ends it may have been kept from running:
        // nobody waits for it here.
        let Some(thread) = self.try_thread() else { return false };
        if stance == BACK && !self.change(BACK, FORWARDING) {
            return false;
        }
        // One that is changing may have been kept from running just then: that is helped, and looked at again.
        thread.map(make_ordinary);
        if stance == BACK {
            self.stance.store(ORDINARY, Ordering::SeqCst);
        }
        stance == BACK
    }

    /// In the watch: whether the thread runs or waits for a CPU, and not for storage.
    fn wants_to_run(&self) -> bool {
        let thread = self.try_thread().and_then(|thread| *thread);
        thread.and_then(task::open).and_then(|stat| task::runs(&stat)) == Some(true)
    }

    fn try_thread(&self) -> Option<MutexGuard<'_, Option<libc::pid_t>>> {
        match self.thread.try_lock() {
            Ok(thread) => Some(thread),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Before there is a watch. Answers whether that is possible.
    fn lend(&self) -> bool {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags);
        timer.is_ok_and(|timer| self.lease.set(timer).is_ok())
    }

    /// From now on; takes back that it has ended.
    fn set_lease(&self, length: Duration) -> bool {
        let Some(lease) = self.lease.get() else { return false };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok(end) = Timespec::try_from(length) else { return false };
        let once = Itimerspec { it_interval: zero, it_value: end };
        timerfd_settime(lease, TimerfdTimerFlags::empty(), &once).is_ok()
    }
}

/// The lease of a demand thread as that thread sees it.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    renewed: Option<Instant>,
    length: Duration,
}

impl Lease {
    /// In the demand thread, which shares its CPU with the only thread that faults and has just served a fault: stands
    /// back, or goes on to. The watch, which this begins, may run on `cpus`.
    pub(crate) fn take(&mut self, shared: &Arc<Shared>, slice: usize, cpus: &Cpus, now: Instant) {
        let standing = &shared.slices[slice].standing;
        if standing.is_back() {
            if self.renewed.is_none_or(|at| now - at >= self.length / 2) {
                self.renewed = Some(now);
                self.length = (self.length * 2).clamp(LEASE, LONGEST_LEASE);
                standing.set_lease(self.length);
            }
        } else if Watch::begin(shared, cpus) && standing.step_back(&shared.stopping, now) {
            self.renewed = Some(now);
            self.length = LEASE;
        }
    }
}

/// The watch of a pager: a thread, from the first time that somebody wants to stand back.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    begun: OnceLock<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// It looks after who stands back.
    ready: AtomicBool,
}

impl Watch {
    /// Begins it, if nobody has. Answers whether it is there: without it nobody stands back, a matter of speed only.
    fn begin(shared: &Arc<Shared>, cpus: &Cpus) -> bool {
        shared.watch.begun.get_or_init(|| {
            if shared.slices.iter().all(|slice| slice.standing.lend()) {
                let (watched, cpus) = (Arc::clone(shared), *cpus);
                let thread = thread::Builder::new().name("pager-watch".into());
                *lock(&shared.watch.thread) = thread.spawn(move || watch(&watched, &cpus)).ok();
            }
        });
        shared.watch.ready.load(Ordering::Relaxed)
    }

    /// Ends it, when `stopping` is set. All demand threads are ordinary ones then.
    pub(crate) fn stop(&self, slices: &[Slice]) {
        // None begins any more.
        self.begun.get_or_init(|| ());
        // To look at once.
        for slice in slices {
            slice.standing.set_lease(Duration::from_nanos(1));
        }
        if let Some(thread) = lock(&self.thread).take() {
            // It has no code of others, and does not panic.
            let _ = thread.join();
        }
    }
}

/// What the watch knows of a demand thread.
struct Watched {
    faults: u64,
    /// When it last had served another one.
    served_at: Instant,
    /// A fault was there at the last look.
    waited: bool,
    ban: Duration,
}

/// The thread's body.
fn watch(shared: &Shared, cpus: &Cpus) {
    // It begins where the demand thread is that began it.
    let _ = cpus.bind();
    // What cannot be undone is not done: tried on itself.
    if task::set_policy(0, libc::SCHED_IDLE).is_err()
        || task::set_policy(0, libc::SCHED_OTHER).is_err()
    {
        return;
    }
    shared.watch.ready.store(true, Ordering::Relaxed);
    let new =
        |_: &Slice| Watched { faults: 0, served_at: Instant::now(), waited: false, ban: FIRST_BAN };
    let mut all: Vec<Watched> = shared.slices.iter().map(new).collect();
    let leases = || shared.slices.iter().filter_map(|slice| slice.standing.lease.get());
    let mut ends: Vec<PollFd<'_>> =
        leases().map(|lease| PollFd::new(lease, PollFlags::IN)).collect();
    while !shared.stopping.load(Ordering::SeqCst) {
        // It has no timeout, and a signal only makes it look.
        let _ = poll(&mut ends, None);
        for ((watched, slice), end) in all.iter_mut().zip(&shared.slices).zip(&ends) {
            if end.revents().contains(PollFlags::IN) {
                watched.look(slice);
            }
        }
    }
    for slice in &shared.slices {
        while !slice.standing.bring_forward() {
            thread::sleep(SECOND_LOOK);
        }
    }
}

impl Watched {
    /// The lease has ended.
    fn look(&mut self, slice: &Slice) {
        let standing = &slice.standing;
        if let Some(lease) = standing.lease.get() {
            // Only to forget that it has ended: the demand thread may have set it anew meanwhile.
            let _ = read(lease, &mut [0; 8]);
        }
        // It came forward itself. One that steps back says so before it sets its lease.
        if standing.stance.load(Ordering::SeqCst) == ORDINARY {
            return;
        }
        let waits = slice.answering.load(Ordering::Relaxed) || slice.filler.uffd.readable();
        let faults = slice.counters.faults();
        let (waited, now) = (mem::replace(&mut self.waited, waits), Instant::now());
        if mem::replace(&mut self.faults, faults) != faults {
            self.served_at = now;
        } else if waits && waited && standing.wants_to_run() {
            *lock(&standing.banned) = Some(now + self.ban);
            self.ban = (self.ban * 2).min(LONGEST_BAN);
            return self.bring_forward(standing);
        } else if now - self.served_at >= QUIET {
            return self.bring_forward(standing);
        }
        standing.set_lease(if waits { SECOND_LOOK } else { LEASE });
    }

    fn bring_forward(&self, standing: &Standing) {
        if !standing.bring_forward() {
            standing.set_lease(SECOND_LOOK);
        }
    }
}

/// The thread (0: the calling one), if it runs under `SCHED_IDLE`: somebody else may have given it another policy.
pub(crate) fn make_ordinary(thread: libc::pid_t) {
    if task::policy(thread) == Some(libc::SCHED_IDLE) {
        // Refused only if this process has lost the right to since it was tried.
        let _ = task::set_policy(thread, libc::SCHED_OTHER);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Where a thread may leave `SCHED_IDLE`, and says so where not.
    fn may_come_back(test: &str) -> bool {
        let tried = thread::spawn(|| {
            task::set_policy(0, libc::SCHED_IDLE).is_ok()
                && task::set_policy(0, libc::SCHED_OTHER).is_ok()
        });
        let may = tried.join().expect("it does not panic");
        if !may {
            assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{test}: no CAP_SYS_NICE");
            let line = format!("SKIPPED {test}: no CAP_SYS_NICE\n");
            std::io::stderr().write_all(line.as_bytes()).expect("stderr can be written");
        }
        may
    }

    /// However the demand thread and the watch meet: whoever is said to be ordinary is.
    #[test]
    fn nobody_is_left_behind() {
        if !may_come_back("nobody_is_left_behind") {
            return;
        }
        let (standing, stopping, done) = <(Standing, AtomicBool, AtomicBool)>::default();
        assert!(standing.lend());
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    standing.bring_forward();
                }
            });
            scope.spawn(|| {
                standing.begin();
                for round in 0..20_000 {
                    standing.step_back(&stopping, Instant::now());
                    if round % 3 == 0 {
                        standing.come_forward();
                    }
                    if round % 50 == 0 {
                        while !standing.bring_forward() {
                            thread::yield_now();
                        }
                        assert_eq!(task::policy(0), Some(libc::SCHED_OTHER), "round {round}");
                    }
                }
                standing.end();
                assert_eq!(task::policy(0), Some(libc::SCHED_OTHER));
                done.store(true, Ordering::Relaxed);
            });
        });
        // Nor does anybody begin after the stop.
        stopping.store(true, Ordering::SeqCst);
        assert!(!standing.step_back(&stopping, Instant::now()));
    }

    #[test]
    fn another_policy_stays() {
        if !may_come_back("another_policy_stays") {
            return;
        }
        let standing = Standing::default();
        assert!(standing.lend());
        thread::spawn(move || {
            task::set_policy(0, libc::SCHED_BATCH).expect("it is allowed");
            standing.begin();
            assert!(!standing.step_back(&AtomicBool::default(), Instant::now()));
            standing.end();
            assert_eq!(task::policy(0), Some(libc::SCHED_BATCH));
        })
        .join()
        .expect("no assertion failed");
    }
}
