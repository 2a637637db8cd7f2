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
//! time for longer. While faults are answered in time the watch is never woken: it would take a CPU for a moment, and a
//! CPU that has just become idle takes the faulting thread from the one where it was. Leaving `SCHED_IDLE` takes
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

/// How long a demand thread stands back unwatched.
const LEASE: Duration = Duration::from_millis(1);
/// So old a lease is made anew with the next fault.
const RENEW: Duration = Duration::from_micros(500);
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

/// An ordinary thread: only it leaves this stance.
const ORDINARY: u8 = 0;
/// It is changing its policy: only it leaves this stance.
const CHANGING: u8 = 1;
/// It runs under `SCHED_IDLE`. Left by itself or, when the lease has ended, by the watch.
const BACK: u8 = 2;

impl Standing {
    /// In the demand thread, before it serves.
    pub(crate) fn begin(&self) {
        *lock(&self.thread) = Some(task::own_id());
    }

    /// In the demand thread, at its end: its id may be another thread's from then on.
    pub(crate) fn end(&self) {
        *lock(&self.thread) = None;
    }

    pub(crate) fn is_back(&self) -> bool {
        self.stance.load(Ordering::Relaxed) == BACK
    }

    /// In the demand thread, with a lease: under `SCHED_IDLE` from now on. Answers whether it is so.
    fn step_back(&self, stopping: &AtomicBool, now: Instant) -> bool {
        if lock(&self.banned).is_some_and(|until| now < until) {
            return false;
        }
        // Sequentially consistent: either this thread sees that it is to stop, or the watch sees that it is changing.
        self.stance.store(CHANGING, Ordering::SeqCst);
        let back = !stopping.load(Ordering::SeqCst)
            && self.set_lease(LEASE)
            && task::set_policy(0, libc::SCHED_IDLE).is_ok();
        self.stance.store(if back { BACK } else { ORDINARY }, Ordering::SeqCst);
        back
    }

    /// In the demand thread: it does not share its CPU with the only thread that faults any more.
    pub(crate) fn come_forward(&self) {
        let change = |from, to| {
            self.stance.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        if self.is_back() && change(BACK, CHANGING) {
            // It was allowed to before, or would not stand back.
            let ordinary = task::set_policy(0, libc::SCHED_OTHER).is_ok();
            change(CHANGING, if ordinary { ORDINARY } else { BACK });
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
        // Somebody else may have given it another policy.
        if let Some(id) = *thread
            && task::policy(id) == Some(libc::SCHED_IDLE)
            && task::set_policy(id, libc::SCHED_OTHER).is_err()
        {
            return true;
        }
        // One that is changing finds out itself, now that it runs.
        let (order, ended) = (Ordering::SeqCst, thread.is_none());
        ended || self.stance.compare_exchange(BACK, ORDINARY, order, order).is_ok()
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
}

impl Lease {
    /// In the demand thread, which shares its CPU with the only thread that faults and has just served a fault: stands
    /// back, or goes on to. The watch, which this begins, may run on `cpus`.
    pub(crate) fn take(&mut self, shared: &Arc<Shared>, slice: usize, cpus: &Cpus, now: Instant) {
        let standing = &shared.slices[slice].standing;
        if standing.is_back() {
            if self.renewed.is_none_or(|at| now - at >= RENEW) {
                self.renewed = Some(now);
                standing.set_lease(LEASE);
            }
        } else if Watch::begin(shared, cpus) && standing.step_back(&shared.stopping, now) {
            self.renewed = Some(now);
        }
    }
}

/// The watch of a pager: a thread, from the first time that somebody wants to stand back.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    begun: OnceLock<bool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Watch {
    /// Begins it, if nobody has. Answers whether it is there: without it nobody stands back, a matter of speed only.
    fn begin(shared: &Arc<Shared>, cpus: &Cpus) -> bool {
        *shared.watch.begun.get_or_init(|| {
            let (watched, cpus) = (Arc::clone(shared), *cpus);
            // What cannot be undone is not done.
            if !task::may_raise_priorities()
                || !watched.slices.iter().all(|slice| slice.standing.lend())
            {
                return false;
            }
            let thread = thread::Builder::new().name("pager-watch".into());
            let thread = thread.spawn(move || watch(&watched, &cpus)).ok();
            let there = thread.is_some();
            *lock(&shared.watch.thread) = thread;
            there
        })
    }

    /// Ends it, when `stopping` is set. All demand threads are ordinary ones then.
    pub(crate) fn stop(&self, slices: &[Slice]) {
        // None begins any more.
        if *self.begun.get_or_init(|| false) {
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
