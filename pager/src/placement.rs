//! On which CPU a demand thread runs. A fault that is answered on the faulting thread's own CPU saves
//! waking another one: an interrupt between processors, and in a virtual machine an exit to its host.
#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::hint;
use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::deference::Lease;
use crate::inbox::Fault;
use crate::slice::{Shared, Slice};
use crate::task;

/// Where demand threads run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// Wherever the scheduler puts them.
    None,
    /// All on this CPU.
    Cpu(usize),
    /// Each on the CPU on which the thread that faults runs, looked up now and then: measured, 10 us a fault instead of
    /// 50. While one thread faults and nothing else wants that CPU, the demand thread runs there under `SCHED_IDLE`, so
    /// that the scheduler leaves the faulting thread where it is. Without CAP_SYS_NICE (or an RLIMIT_NICE of 21) it cannot, and
    /// following pays only where faulting threads are bound to CPUs. Where following is not possible (no `/proc`,
    /// affinity may not be set), the same as `None`.
    #[default]
    Follow,
    /// Wherever the scheduler puts them, and awake: for a millisecond after each fault they look for the next
    /// one all the time, so that nobody has to be woken to answer it. Costs a CPU while faults come.
    Spin,
}

/// Puts the calling thread where its placement says.
#[derive(Debug)]
pub(crate) struct Follower {
    placement: Placement,
    /// The CPUs that it may run on.
    allowed: Option<Cpus>,
    /// The CPU this thread is bound to.
    bound_to: Option<usize>,
    /// When it last looked, and answered.
    looked: Option<Instant>,
    answered: Option<Instant>,
    /// The thread that faulted last, and how many faults it has had in a row.
    last: u32,
    in_a_row: u64,
    /// Others have faulted, too, a short time ago.
    several: bool,
    /// The last fault came soon after the answer to the one before it.
    dense: bool,
    /// How long after an answer the next fault comes: a mean of the last ones.
    usual: Duration,
    /// The thread that was looked up last, and its `stat` file.
    followed: Option<(u32, File)>,
    lease: Lease,
}

/// Between two looks, of 3 us each.
const LOOK: Duration = Duration::from_millis(1);
/// A fault that comes so much later than usual may come from a thread that was moved to another CPU: waking that, and
/// being woken by it, takes longer than this.
const LATE: Duration = Duration::from_micros(20);
/// Between two looks when faults come late, as they do also when the thread has other things to do.
const LOOK_IF_LATE: Duration = Duration::from_micros(100);
/// After so many faults in a row a thread is taken for the only one that faults.
const ALONE: u64 = 4;
/// The same, when there were several: then it is followed no more, for it would be in the way of the others.
const ALONE_AGAIN: u64 = 16;
/// While the faults of several threads come so soon after the answer to the one before, the demand thread stays awake for
/// the next one, and lets others run meanwhile.
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
            lease: Lease::default(),
        }
    }

    /// In the thread, before it serves.
    pub(crate) fn begin(&mut self) {
        match self.placement {
            // A CPU that is not there or not allowed is a matter of speed only.
            Placement::Cpu(cpu) => drop(Cpus::one(cpu).bind()),
            Placement::Follow => self.allowed = Cpus::of_this_thread().ok(),
            Placement::None | Placement::Spin => {}
        }
    }

    /// How long to look for the next fault before sleeping, and what to do between two looks.
    pub(crate) fn awake(&self) -> Option<(Duration, fn())> {
        match self.placement {
            Placement::Spin => Some((SPIN, hint::spin_loop)),
            Placement::Follow if self.several && self.dense => Some((AWAKE, thread::yield_now)),
            _ => None,
        }
    }

    /// A fault of that thread (0: unknown) was answered just now: look where it runs, if it is time to.
    pub(crate) fn served(
        &mut self,
        fault: Fault,
        now: Instant,
        shared: &Arc<Shared>,
        slice: usize,
    ) {
        if self.placement != Placement::Follow || fault.thread_id == 0 {
            return;
        }
        let own = &shared.slices[slice];
        self.follow(fault, now);
        self.tell(own);
        match &self.allowed {
            Some(allowed) if self.bound_to.is_some() && self.in_a_row >= ALONE => {
                self.lease.take(shared, slice, allowed, now);
            }
            _ if self.bound_to.is_none() => own.standing.come_forward(),
            _ => {}
        }
    }

    /// There is nothing to answer although this thread runs: standing back, it does so only while the one that faults does
    /// not, or while that runs on another CPU. Then it is better there before the next fault.
    pub(crate) fn idle(&mut self, own: &Slice) {
        if self.bound_to.is_none() || !own.standing.is_back() {
            return;
        }
        let now = Instant::now();
        if self.looked.is_none_or(|at| now - at >= LOOK_IF_LATE) {
            self.look(now);
            self.tell(own);
        }
        if self.bound_to.is_none() {
            own.standing.come_forward();
        }
    }

    /// Does something while this thread is bound to no CPU: a thread that it makes may run at once on an idle one.
    pub(crate) fn unbound<T>(&self, work: impl FnOnce() -> T) -> T {
        let bound = self.bound_to.zip(self.allowed);
        if let Some((_, allowed)) = bound {
            // A matter of speed only, as below.
            let _ = allowed.bind();
        }
        let done = work();
        if let Some((cpu, _)) = bound {
            let _ = Cpus::one(cpu).bind();
        }
        done
    }

    /// Tells others where it is bound to.
    fn tell(&self, own: &Slice) {
        let bound_to = self.bound_to.unwrap_or(NOWHERE);
        if own.bound_to.load(Ordering::Relaxed) != bound_to {
            own.bound_to.store(bound_to, Ordering::Relaxed);
        }
    }

    /// Binds this thread to the CPU of the one that faulted, if it is time to look.
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
        self.look(now);
    }

    /// Binds this thread to the CPU of the one that faulted last.
    fn look(&mut self, now: Instant) {
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

    /// To wherever the scheduler puts it.
    fn let_go(&mut self) {
        if let (Some(_), Some(allowed)) = (self.bound_to.take(), &self.allowed) {
            // A matter of speed only.
            let _ = allowed.bind();
        }
    }

    /// The CPU on which the thread runs, or ran last. One that has ended meanwhile is not found: the next one
    /// will be.
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

/// Keeps a thread that loads in the background off the CPUs of demand threads, as long as there are others.
#[derive(Debug, Default)]
pub(crate) struct Aside {
    allowed: Option<Cpus>,
    avoided: Vec<usize>,
}

impl Aside {
    /// In the thread, before it works.
    pub(crate) fn begin(&mut self) {
        self.allowed = Cpus::of_this_thread().ok();
    }

    /// The same; until the first step it keeps off this CPU, too, if there are others.
    pub(crate) fn begin_off(&mut self, cpu: usize) {
        self.begin();
        let rest = self.allowed.map(|allowed| allowed.without(&cpu));
        if let Some(rest) = rest.filter(|rest| !rest.is_empty()) {
            // A matter of speed only.
            let _ = rest.bind();
            self.avoided = vec![cpu];
        }
    }

    /// In the thread, now and then.
    pub(crate) fn step(&mut self, shared: &Shared) {
        let Some(allowed) = &self.allowed else { return };
        let bound = || {
            let bound = shared.slices.iter().map(|slice| slice.bound_to.load(Ordering::Relaxed));
            bound.filter(|&cpu| cpu != NOWHERE)
        };
        if bound().eq(self.avoided.iter().copied()) {
            return;
        }
        self.avoided.clear();
        self.avoided.extend(bound());
        let rest = self.avoided.iter().fold(*allowed, Cpus::without);
        // A matter of speed only.
        let _ = if rest.is_empty() { allowed.bind() } else { rest.bind() };
    }
}

/// The CPU on which the calling thread runs now.
pub(crate) fn this_cpu() -> usize {
    // SAFETY: takes nothing and has no effect.
    let cpu = unsafe { libc::sched_getcpu() };
    usize::try_from(cpu).unwrap_or(NOWHERE)
}

/// Of a demand thread that is bound to no CPU.
pub(crate) const NOWHERE: usize = usize::MAX;

/// A set of CPUs.
#[derive(Clone, Copy)]
pub(crate) struct Cpus(libc::cpu_set_t);

impl Cpus {
    fn none() -> Cpus {
        // SAFETY: all zero bits are an empty cpu_set_t.
        Cpus(unsafe { mem::zeroed() })
    }

    /// One that has a number beyond what a set can hold is the empty set, to which nothing can be bound.
    fn one(cpu: usize) -> Cpus {
        let mut cpus = Cpus::none();
        if cpu < libc::CPU_SETSIZE as usize {
            // SAFETY: `cpu` is within the set.
            unsafe { libc::CPU_SET(cpu, &mut cpus.0) };
        }
        cpus
    }

    fn without(mut self, cpu: &usize) -> Cpus {
        if *cpu < libc::CPU_SETSIZE as usize {
            // SAFETY: `cpu` is within the set.
            unsafe { libc::CPU_CLR(*cpu, &mut self.0) };
        }
        self
    }

    fn is_empty(&self) -> bool {
        self.count() == 0
    }

    pub(crate) fn count(&self) -> usize {
        // SAFETY: a valid set.
        unsafe { libc::CPU_COUNT(&self.0) as usize }
    }

    /// Those that the calling thread may run on.
    pub(crate) fn of_this_thread() -> io::Result<Cpus> {
        let mut cpus = Cpus::none();
        // SAFETY: 0 is the calling thread; the set is valid and of the given size.
        let result = unsafe { libc::sched_getaffinity(0, mem::size_of_val(&cpus.0), &mut cpus.0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cpus) }
    }

    /// Lets the calling thread run on these only.
    pub(crate) fn bind(&self) -> io::Result<()> {
        // SAFETY: 0 is the calling thread; the set is valid and of the given size.
        let result = unsafe { libc::sched_setaffinity(0, mem::size_of_val(&self.0), &self.0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl fmt::Debug for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: the numbers are within the set.
        let within = |cpu: &usize| unsafe { libc::CPU_ISSET(*cpu, &self.0) };
        f.debug_set().entries((0..libc::CPU_SETSIZE as usize).filter(within)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault_of(thread_id: u32) -> Fault {
        Fault { address: 0, thread_id, read_at: Instant::now() }
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
    fn a_thread_that_is_gone_is_followed_no_further() {
        let mut follower = Follower::new(Placement::Follow);
        follower.follow(fault_of(u32::MAX), Instant::now());
        assert_eq!((follower.placement, follower.bound_to), (Placement::Follow, None));
        assert!(follower.followed.is_none());
    }

    #[test]
    fn sets_of_cpus_hold_what_fits() {
        let cpus = [Cpus::one(3), Cpus::one(usize::MAX), Cpus::one(3).without(&3)];
        assert_eq!(cpus.map(|cpus| cpus.is_empty()), [false, true, true]);
        assert_eq!(format!("{:?}", Cpus::one(70)), "{70}");
    }
}
