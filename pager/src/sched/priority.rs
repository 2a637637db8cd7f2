//! The priority of a demand thread that shares a CPU with the thread whose faults it answers: it runs under
//! `SCHED_IDLE`.
//!
//! The scheduler wakes a thread on another CPU if one is idle and its own is not. While a fault is answered, the CPU of
//! the faulting thread runs the demand thread. So an unbound faulting thread would change its CPU with each fault, and
//! waking an idle CPU costs many times what the answer does. But a CPU on which only `SCHED_IDLE` threads run counts as
//! idle (`sched_idle_cpu` in the kernel's `kernel/sched/fair.c`): the faulting thread stays there and runs immediately.
//!
//! The price is that any other thread preempts such a demand thread. So a watchdog ([`super::watchdog_thread`]) returns
//! it to the normal policy when a fault waits too long. Leaving `SCHED_IDLE` needs CAP_SYS_NICE, or an RLIMIT_NICE of
//! 21. Without these, the priority is never lowered.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::sched::task;

/// The first length of the watchdog timer. The length doubles each time that the timer is restarted, up to
/// `LONGEST_TIMEOUT`. Setting a timer that expires before the next tick (4 ms, mostly) takes 11 us in a virtual
/// machine, because its host has to set a timer, too. Setting a longer one takes 0.7 us.
pub(super) const FIRST_TIMEOUT: Duration = Duration::from_millis(1);

/// The scheduling priority of one demand thread.
#[derive(Debug, Default)]
pub(crate) struct DemandPriority {
    /// The id of the thread while it runs. Only the thread itself changes it.
    thread: Mutex<Option<libc::pid_t>>,
    pub(super) level: AtomicU8,
    /// The watchdog timer. It exists as soon as the watchdog does.
    pub(super) timer: OnceLock<OwnedFd>,
    /// Until when the priority must not be lowered, after a fault that had to wait.
    pub(super) backoff_until: Mutex<Option<Instant>>,
}

/// The thread has its normal priority. Only the thread itself leaves this level.
pub(super) const NORMAL: u8 = 0;
/// The thread is changing its policy. Only the thread itself leaves this level.
const CHANGING: u8 = 1;
/// The thread runs under `SCHED_IDLE`. It leaves this level itself, or the watchdog does that after a timeout.
const LOWERED: u8 = 2;
/// The watchdog is changing the policy. Only the watchdog leaves this level.
const RAISING: u8 = 3;

impl DemandPriority {
    /// Called by the demand thread before it serves.
    pub(crate) fn begin(&self) {
        *lock(&self.thread) = Some(task::own_id());
    }

    /// Called by the demand thread at its end. Afterwards its id may belong to another thread.
    pub(crate) fn end(&self) {
        self.raise_own();
        *lock(&self.thread) = None;
    }

    pub(crate) fn is_lowered(&self) -> bool {
        self.level.load(Ordering::Relaxed) == LOWERED
    }

    fn change(&self, from: u8, to: u8) -> bool {
        self.level.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Called by the demand thread: changes its policy to `SCHED_IDLE`, with a timer. Returns whether it did. A policy
    /// that another program has set stays.
    pub(super) fn lower(&self, stopping: &AtomicBool, now: Instant) -> bool {
        if lock(&self.backoff_until).is_some_and(|until| now < until)
            || !self.change(NORMAL, CHANGING)
        {
            return false;
        }
        // Sequentially consistent: either this thread sees `stopping`, or the watchdog sees `CHANGING`.
        let lowered = !stopping.load(Ordering::SeqCst)
            && task::policy(0) == Some(libc::SCHED_OTHER)
            && self.arm_timer(FIRST_TIMEOUT)
            && task::set_policy(0, libc::SCHED_IDLE).is_ok();
        self.level.store(if lowered { LOWERED } else { NORMAL }, Ordering::SeqCst);
        lowered
    }

    /// Called by the demand thread: returns to the normal policy.
    pub(crate) fn raise_own(&self) {
        if self.is_lowered() && self.change(LOWERED, CHANGING) {
            // This is permitted: otherwise the priority would not have been lowered.
            make_normal(0);
            self.level.store(NORMAL, Ordering::SeqCst);
        }
    }

    /// Called by the watchdog: returns the thread to the normal policy. Returns whether that is done; if not, the
    /// watchdog has to call again.
    pub(super) fn raise_from_watchdog(&self) -> bool {
        let level = self.level.load(Ordering::SeqCst);
        if level == NORMAL {
            return true;
        }
        // The demand thread holds this lock only when it begins and ends, and may not get CPU time then. So the
        // watchdog does not wait for the lock.
        let Some(thread) = self.try_thread() else { return false };
        if level == LOWERED && !self.change(LOWERED, RAISING) {
            return false;
        }
        // A thread at the level `CHANGING` may not get CPU time. Its policy is changed, and its level checked again.
        thread.map(make_normal);
        if level == LOWERED {
            self.level.store(NORMAL, Ordering::SeqCst);
        }
        level == LOWERED
    }

    /// Called by the watchdog: whether the thread runs or waits for a CPU, rather than for storage.
    pub(super) fn wants_to_run(&self) -> bool {
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

    /// Called before the watchdog starts. Returns whether the timer could be created.
    pub(super) fn create_timer(&self) -> bool {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let created = timerfd_create(TimerfdClockId::Monotonic, flags);
        created.is_ok_and(|timer| self.timer.set(timer).is_ok())
    }

    /// Restarts the timer with this length. That clears an expiration which was not read. Returns whether it worked.
    pub(super) fn arm_timer(&self, length: Duration) -> bool {
        let Some(timer) = self.timer.get() else { return false };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok(end) = Timespec::try_from(length) else { return false };
        let once = Itimerspec { it_interval: zero, it_value: end };
        timerfd_settime(timer, TimerfdTimerFlags::empty(), &once).is_ok()
    }
}

/// Returns a thread (0: the calling thread) from `SCHED_IDLE` to the normal policy. Another policy, which another
/// program has set, stays.
pub(crate) fn make_normal(thread: libc::pid_t) {
    if task::policy(thread) == Some(libc::SCHED_IDLE) {
        // This fails only if the process has lost the permission since the watchdog tried it.
        let _ = task::set_policy(thread, libc::SCHED_OTHER);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::thread;

    use super::*;

    /// Whether a thread may leave `SCHED_IDLE`. If not, this prints that the test is skipped.
    fn may_raise(test: &str) -> bool {
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

    /// However the demand thread and the watchdog interleave: a thread at the level `NORMAL` has the normal policy.
    #[test]
    fn no_thread_keeps_a_lowered_priority() {
        if !may_raise("no_thread_keeps_a_lowered_priority") {
            return;
        }
        let (priority, stopping, done) = <(DemandPriority, AtomicBool, AtomicBool)>::default();
        assert!(priority.create_timer());
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    priority.raise_from_watchdog();
                }
            });
            scope.spawn(|| {
                priority.begin();
                for round in 0..20_000 {
                    priority.lower(&stopping, Instant::now());
                    if round % 3 == 0 {
                        priority.raise_own();
                    }
                    if round % 50 == 0 {
                        while !priority.raise_from_watchdog() {
                            thread::yield_now();
                        }
                        assert_eq!(task::policy(0), Some(libc::SCHED_OTHER), "round {round}");
                    }
                }
                priority.end();
                assert_eq!(task::policy(0), Some(libc::SCHED_OTHER));
                done.store(true, Ordering::Relaxed);
            });
        });
        // After the stop, no thread lowers its priority.
        stopping.store(true, Ordering::SeqCst);
        assert!(!priority.lower(&stopping, Instant::now()));
    }

    #[test]
    fn another_policy_stays() {
        if !may_raise("another_policy_stays") {
            return;
        }
        let priority = DemandPriority::default();
        assert!(priority.create_timer());
        thread::spawn(move || {
            task::set_policy(0, libc::SCHED_BATCH).expect("it is allowed");
            priority.begin();
            assert!(!priority.lower(&AtomicBool::default(), Instant::now()));
            priority.end();
            assert_eq!(task::policy(0), Some(libc::SCHED_BATCH));
        })
        .join()
        .expect("no assertion failed");
    }
}
