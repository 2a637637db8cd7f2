//! Standing back: a demand thread that shares a CPU with the thread whose faults it answers runs there under
//! `SCHED_IDLE`, watched by a thread that ends this when something else wants that CPU.
//!
//! Why: the scheduler wakes a thread on another CPU if one is idle and its own is not, and while a fault is answered its
//! own runs the demand thread. So a faulting thread that nobody has bound would change its CPU with each fault, and
//! waking an idle CPU costs many times what the answer does. But a CPU on which nothing but `SCHED_IDLE` runs counts
//! as idle (`sched_idle_cpu` in the kernel's `kernel/sched/fair.c`): then the faulting thread stays where it is, and
//! goes on at once.
//!
//! The price is that any other thread keeps such a demand thread from running. The watch looks every millisecond
//! whether a fault waits and nothing has happened since the last look. Then the demand thread becomes an ordinary
//! one again, and stays so for a while, each time for longer. All changes are made by the watch: nobody else can
//! undo what it has just done. Leaving `SCHED_IDLE` takes CAP_SYS_NICE, or an RLIMIT_NICE of 21: where that is
//! refused nobody stands back.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::placement::Cpus;
use crate::slice::{Shared, Slice};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(1);
/// After so many looks without a fault a demand thread is an ordinary one again, and the watch sleeps.
const QUIET_LOOKS: u32 = 20;
/// After a fault that had to wait: not again before this, which doubles up to the longest.
const FIRST_BAN: Duration = Duration::from_millis(50);
const LONGEST_BAN: Duration = Duration::from_secs(2);

/// Of one demand thread.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    /// Its id, while it runs: set and taken away by itself.
    thread: Mutex<Option<libc::pid_t>>,
    /// It shares its CPU with the only thread that faults.
    wants: AtomicBool,
    /// It stands back: said by the watch.
    back: AtomicBool,
}

impl Standing {
    /// In the demand thread, before it serves.
    pub(crate) fn begin(&self) {
        // SAFETY: takes nothing and has no effect.
        *self.lock() = Some(unsafe { libc::gettid() });
    }

    /// In the demand thread, at its end: its id may be another thread's from then on.
    pub(crate) fn end(&self) {
        self.wants.store(false, Ordering::Relaxed);
        *self.lock() = None;
    }

    /// In the demand thread: whether it is to stand back. Answers whether the watch must be called for that.
    pub(crate) fn set(&self, wanted: bool) -> bool {
        self.wants.store(wanted, Ordering::Relaxed);
        wanted && !self.back.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Option<libc::pid_t>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the thread's policy from one to the other, if it is the first.
    fn change(&self, from: i32, to: i32) -> Changed {
        // A demand thread holds this lock only as it begins and ends. As it ends it may have been kept from running:
        // nobody waits for it here.
        let thread = match self.thread.try_lock() {
            Ok(thread) => thread,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Changed::Later,
        };
        match *thread {
            Some(id) if policy(id) == Some(from) && set_policy(id, to).is_ok() => Changed::Done,
            _ => Changed::Never,
        }
    }
}

#[derive(PartialEq, Eq)]
enum Changed {
    Done,
    /// It has ended, or somebody else has given it a policy.
    Never,
    Later,
}

/// The watch of a pager: a thread, from the first time that somebody wants to stand back.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    state: Mutex<State>,
    /// Somebody wants to stand back, or the pager stops.
    called: Condvar,
}

#[derive(Debug, Default)]
struct State {
    begun: bool,
    thread: Option<JoinHandle<()>>,
    called: bool,
    stopping: bool,
}

impl Watch {
    /// In a demand thread that wants to stand back. The watch may run on `cpus`.
    pub(crate) fn call(shared: &Arc<Shared>, cpus: &Cpus) {
        let mut state = shared.watch.lock();
        state.called = true;
        if !state.begun {
            state.begun = true;
            let (watched, cpus) = (Arc::clone(shared), *cpus);
            let thread = thread::Builder::new().name("pager-watch".into());
            // Without it nobody stands back: a matter of speed only.
            state.thread = thread.spawn(move || watch(&watched, &cpus)).ok();
        }
        drop(state);
        shared.watch.called.notify_one();
    }

    /// Ends it. All demand threads are ordinary ones then.
    pub(crate) fn stop(&self) {
        let thread = {
            let mut state = self.lock();
            // None begins any more.
            (state.stopping, state.begun) = (true, true);
            state.thread.take()
        };
        self.called.notify_one();
        if let Some(thread) = thread {
            // It has no code of others, and does not panic.
            let _ = thread.join();
        }
    }

    /// Sleeps until called or stopped, or for `timeout`. Answers whether to go on.
    fn sleep(&self, timeout: Option<Duration>) -> bool {
        let idle = |state: &mut State| !state.called && !state.stopping;
        let mut state = match timeout {
            None => self.called.wait_while(self.lock(), idle),
            Some(timeout) => {
                let waited =
                    self.called.wait_timeout_while(self.lock(), timeout, |state| !state.stopping);
                waited
                    .map(|(state, _)| state)
                    .map_err(|error| PoisonError::new(error.into_inner().0))
            }
        }
        .unwrap_or_else(PoisonError::into_inner);
        state.called = false;
        !state.stopping
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the watch knows of a demand thread.
struct Watched {
    back: bool,
    faults: u64,
    /// A fault was there at the last look.
    waited: bool,
    quiet_looks: u32,
    not_before: Instant,
    ban: Duration,
}

/// The thread's body.
fn watch(shared: &Shared, cpus: &Cpus) {
    // It begins where the demand thread is that called it.
    let _ = cpus.bind();
    // What cannot be undone is not done.
    if !may_raise_priorities() {
        return;
    }
    let new = |_: &Slice| Watched {
        back: false,
        faults: 0,
        waited: false,
        quiet_looks: 0,
        not_before: Instant::now(),
        ban: FIRST_BAN,
    };
    let mut all: Vec<Watched> = shared.slices.iter().map(new).collect();
    let mut go_on = shared.watch.sleep(None);
    while go_on {
        for (watched, slice) in all.iter_mut().zip(&shared.slices) {
            watched.look(slice);
        }
        let somebody = all.iter().any(|watched| watched.back);
        go_on = shared.watch.sleep(somebody.then_some(LOOK));
    }
    for (watched, slice) in all.iter_mut().zip(&shared.slices) {
        if watched.back {
            watched.come_forward(slice);
        }
    }
}

impl Watched {
    fn look(&mut self, slice: &Slice) {
        let wanted = slice.standing.wants.load(Ordering::Relaxed);
        let waits = slice.answering.load(Ordering::Relaxed) || slice.filler.uffd.readable();
        let faults = slice.counters.faults();
        let served = mem::replace(&mut self.faults, faults) != faults;
        let waited = mem::replace(&mut self.waited, waits);
        self.quiet_looks = if served { 0 } else { self.quiet_looks + 1 };
        if !self.back {
            if wanted && Instant::now() >= self.not_before {
                self.back =
                    slice.standing.change(libc::SCHED_OTHER, libc::SCHED_IDLE) == Changed::Done;
                slice.standing.back.store(self.back, Ordering::Relaxed);
                (self.waited, self.quiet_looks) = (false, 0);
            }
        } else if waits && waited && !served {
            self.come_forward(slice);
            self.not_before = Instant::now() + self.ban;
            self.ban = (self.ban * 2).min(LONGEST_BAN);
        } else if !wanted || self.quiet_looks >= QUIET_LOOKS {
            self.come_forward(slice);
        }
    }

    fn come_forward(&mut self, slice: &Slice) {
        let changed = slice.standing.change(libc::SCHED_IDLE, libc::SCHED_OTHER);
        self.back = changed == Changed::Later;
        slice.standing.back.store(self.back, Ordering::Relaxed);
        slice.standing.wants.store(self.back, Ordering::Relaxed);
    }
}

/// The scheduling policy of a thread of this process (0: the calling one).
fn policy(thread: libc::pid_t) -> Option<i32> {
    // SAFETY: takes a number.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    (policy >= 0).then_some(policy)
}

fn set_policy(thread: libc::pid_t, policy: i32) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: takes a number and a valid structure, and affects one thread's time of running only.
    let result = unsafe { libc::sched_setscheduler(thread, policy, &param) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether this thread may give threads a higher priority: tried on itself. The kernel asks for the same right when a
/// thread leaves `SCHED_IDLE`.
fn may_raise_priorities() -> bool {
    // SAFETY: takes numbers; the raw system call answers 20 less the nice value, of the calling thread.
    let answer = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) };
    let Ok(nice) = i32::try_from(20 - answer) else { return false };
    // SAFETY: takes numbers, and affects the calling thread only.
    let raised = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice - 1) } == 0;
    if raised {
        // SAFETY: as above. Lowering it is always allowed.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
    }
    raised
}
