//! Decides on which CPU a demand thread runs.
//!
//! An answer on the CPU of the faulting thread does not have to wake another CPU. That saves an interrupt between CPUs,
//! and in a virtual machine an exit to its host.

use std::fs::File;
use std::hint;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::fault::queued::Fault;
use crate::fault::slice::Slice;
use crate::pager_state::PagerState;
use crate::sched::cpus::{Cpus, NOWHERE};
use crate::sched::give_way::give_way;
use crate::sched::task;
use crate::sched::watchdog_thread::WatchdogTimer;

/// Where demand threads run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// On any CPU, as the scheduler decides.
    None,
    /// All on this CPU.
    Cpu(usize),
    /// Each on the CPU of the faulting thread, which the pager looks up now and then. Measured: 10 us a fault instead
    /// of 50 us. While only one thread faults and nothing else needs that CPU, the demand thread runs there under
    /// `SCHED_IDLE`, so that the scheduler does not move the faulting thread. This needs CAP_SYS_NICE or an RLIMIT_NICE
    /// of 21. Without it, following pays only for faulting threads that are bound to CPUs. If following is not possible
    /// (no `/proc`, affinity cannot be set), this is the same as `None`.
    #[default]
    Follow,
    /// On any CPU, and awake: for 1 ms after each fault they poll for the next one, so that it does not have to wake
    /// them. This costs a CPU while faults come.
    Spin,
}

/// Puts the calling demand thread on a CPU, by its placement.
#[derive(Debug)]
pub(crate) struct Follower {
    placement: Placement,
    /// The CPUs that this thread may use.
    allowed: Option<Cpus>,
    /// The CPU this thread is bound to.
    bound_to: Option<usize>,
    /// When this thread last looked up the CPU of the faulting thread, and when it last answered a fault.
    looked: Option<Instant>,
    answered: Option<Instant>,
    /// The thread that faulted last, and the number of its faults in a row.
    last: u32,
    in_a_row: u64,
    /// Several threads have faulted a short time ago.
    several: bool,
    /// The last fault came soon after the answer to the one before it.
    dense: bool,
    /// The mean time from an answer to the next fault.
    usual: Duration,
    /// The thread that was looked up last, and its `stat` file in `/proc`.
    followed: Option<(u32, File)>,
    timer: WatchdogTimer,
}

/// The time between two look-ups, which cost 3 us each.
const LOOK: Duration = Duration::from_millis(1);
/// A fault that is later than usual by this time may come from a thread that was moved to another CPU: waking that CPU,
/// and being woken by it, takes longer than this.
const LATE: Duration = Duration::from_micros(20);
/// The time between two look-ups when faults come late. That also happens when the thread does other work.
const LOOK_IF_LATE: Duration = Duration::from_micros(100);
/// After this number of faults in a row, a thread counts as the only one that faults.
const ALONE: u64 = 4;
/// The same if several threads have faulted. Until then no thread is followed, because this thread would delay the
/// others.
const ALONE_AGAIN: u64 = 16;
/// While the faults of several threads come within this time after the last answer, the demand thread stays awake for
/// the next one, and yields its CPU meanwhile.
const DENSE: Duration = Duration::from_micros(300);
const AWAKE: Duration = Duration::from_micros(100);
const SPIN: Duration = Duration::from_millis(1);

impl Follower {
    pub(crate) fn new(placement: Placement) -> Follower {
        Follower {
            placement,
            allowed: None,
            bound_to: None,
            looked: None,
            answered: None,
            last: 0,
            in_a_row: 0,
            several: false,
            dense: false,
            usual: Duration::ZERO,
            followed: None,
            timer: WatchdogTimer::default(),
        }
    }

    /// Called by the thread before it serves.
    pub(crate) fn begin(&mut self) {
        match self.placement {
            // A CPU that does not exist or is not allowed costs only speed.
            Placement::Cpu(cpu) => drop(Cpus::one(cpu).bind()),
            Placement::Follow => self.allowed = Cpus::of_this_thread().ok(),
            Placement::None | Placement::Spin => {}
        }
    }

    /// How long to poll for the next fault before sleeping, and what to do between two polls.
    pub(crate) fn awake(&self) -> Option<(Duration, fn())> {
        match self.placement {
            Placement::Spin => Some((SPIN, hint::spin_loop)),
            Placement::Follow if self.several && self.dense => Some((AWAKE, give_way)),
            _ => None,
        }
    }

    /// Called after each answer: looks up the CPU of the faulting thread, if it is time to.
    pub(crate) fn served(
        &mut self,
        fault: Fault,
        now: Instant,
        shared: &Arc<PagerState>,
        slice: usize,
    ) {
        if self.placement != Placement::Follow || fault.thread_id == 0 {
            return;
        }
        let own = &shared.slices[slice];
        self.follow(fault, now);
        self.publish(own);
        match &self.allowed {
            Some(allowed) if self.bound_to.is_some() && self.in_a_row >= ALONE => {
                self.timer.restart(shared, slice, allowed, now);
            }
            _ if self.bound_to.is_none() => own.priority.raise_own(),
            _ => {}
        }
    }

    /// Called when no fault is queued. With lowered priority, this thread runs only while the faulting thread does not
    /// run, or while it runs on another CPU. In the second case this thread should follow before the next fault.
    pub(crate) fn idle(&mut self, own: &Slice) {
        if self.bound_to.is_none() || !own.priority.is_lowered() {
            return;
        }
        let now = Instant::now();
        if self.looked.is_none_or(|at| now - at >= LOOK_IF_LATE) {
            self.look_up(now);
            self.publish(own);
        }
        if self.bound_to.is_none() {
            own.priority.raise_own();
        }
    }

    /// Does `work` while this thread is bound to no CPU. A thread that it creates may then start on an idle CPU.
    pub(crate) fn unbound<T>(&self, work: impl FnOnce() -> T) -> T {
        let bound = self.bound_to.zip(self.allowed);
        if let Some((_, allowed)) = bound {
            // A failure costs only speed, also below.
            let _ = allowed.bind();
        }
        let done = work();
        if let Some((cpu, _)) = bound {
            let _ = Cpus::one(cpu).bind();
        }
        done
    }

    /// Publishes the CPU that this thread is bound to.
    fn publish(&self, own: &Slice) {
        let bound_to = self.bound_to.unwrap_or(NOWHERE);
        if own.bound_to.load(Ordering::Relaxed) != bound_to {
            own.bound_to.store(bound_to, Ordering::Relaxed);
        }
    }

    /// Binds this thread to the CPU of the faulting thread, if it is time to look that up.
    fn follow(&mut self, fault: Fault, now: Instant) {
        let answered = self.answered.replace(now).unwrap_or(now);
        let after = fault.read_at.saturating_duration_since(answered);
        self.dense = after < DENSE;
        if fault.thread_id != self.last {
            self.several |= self.last != 0;
            (self.last, self.in_a_row) = (fault.thread_id, 0);
        }
        self.in_a_row += 1;
        if self.several && self.in_a_row < ALONE_AGAIN {
            return self.let_go();
        }
        self.several = false;
        let pause = if after > self.usual + LATE { LOOK_IF_LATE } else { LOOK };
        self.usual = (self.usual * 7 + after.min(DENSE)) / 8;
        if self.in_a_row != ALONE && self.looked.is_some_and(|at| now - at < pause) {
            return;
        }
        self.look_up(now);
    }

    /// Binds this thread to the CPU of the thread that faulted last.
    fn look_up(&mut self, now: Instant) {
        self.looked = Some(now);
        if let Some(cpu) = self.cpu_of(self.last)
            && self.bound_to != Some(cpu)
        {
            if Cpus::one(cpu).bind().is_err() {
                self.let_go();
                self.placement = Placement::None;
                return;
            }
            self.bound_to = Some(cpu);
        }
    }

    /// Lets this thread run on any CPU.
    fn let_go(&mut self) {
        if let (Some(_), Some(allowed)) = (self.bound_to.take(), &self.allowed) {
            // A failure costs only speed.
            let _ = allowed.bind();
        }
    }

    /// The CPU on which the thread runs, or ran last. `None` if the thread has ended.
    fn cpu_of(&mut self, thread_id: u32) -> Option<usize> {
        let stat = match self.followed.take() {
            Some((id, stat)) if id == thread_id => stat,
            _ => task::open(thread_id)?,
        };
        let cpu = task::last_cpu(&stat)?;
        self.followed = Some((thread_id, stat));
        Some(cpu)
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;

    fn fault_of(thread_id: u32) -> Fault {
        let (read_at, waited) = (Instant::now(), Default::default());
        Fault { address: 0, thread_id, write_protected: false, read_at, waited }
    }

    #[test]
    fn the_followed_cpu_is_that_of_the_thread() {
        std::thread::spawn(|| {
            // SAFETY: takes nothing and has no effect.
            let cpu = unsafe { libc::sched_getcpu() } as usize;
            Cpus::one(cpu).bind().expect("the CPU it runs on is allowed");
            // SAFETY: takes nothing and has no effect.
            let own_id = unsafe { libc::gettid() } as u32;
            let mut follower = Follower::new(Placement::Follow);
            follower.follow(fault_of(own_id), Instant::now());
            assert_eq!((follower.placement, follower.bound_to), (Placement::Follow, Some(cpu)));
        })
        .join()
        .expect("no assertion failed");
    }

    #[test]
    fn a_thread_that_has_ended_is_not_followed() {
        let mut follower = Follower::new(Placement::Follow);
        follower.follow(fault_of(u32::MAX), Instant::now());
        assert_eq!((follower.placement, follower.bound_to), (Placement::Follow, None));
        assert!(follower.followed.is_none());
    }
}
