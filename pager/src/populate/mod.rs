//! Background loading: pages that no thread has touched yet are loaded by threads of their own.
//!
//! [`Populate`] says when. The parts of this folder:
//!
//! | module | what it decides |
//! |---|---|
//! | `demand` | whether threads wait for pages so much that loading ahead pays |
//! | `plan` | which 2 MiB of the source are loaded next |
//! | `pace` | when a loader pauses, and how much it installs at once |
//! | `loader` | the thread: loads a part, installs it, ends the population |
//!
//! A loader decodes without any lock, and installs 64 KiB at a time under the lock that demand threads take first.
//! When no page is left, the memory is taken out of the userfaultfds: from then on neither the pager nor the source is
//! needed. Zero pages are not filled in: for them the kernel's own zeros are right.

mod demand;
mod loader;
mod pace;
mod plan;

use std::fmt;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;

pub(crate) use self::demand::{Demand, Look, OVERHEAD, Waiting};
use self::loader::Loader;
pub(crate) use self::plan::Plan;
use crate::handler::RetryPolicy;
use crate::placement::Cpus;
use crate::slice::Shared;
use crate::source::PageSource;

/// When pages that no thread has touched are loaded in the background.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Populate {
    /// Never.
    Off,
    /// While threads wait for pages a good part of the time. Then loaders work at full speed, on CPUs on which no demand
    /// thread is; they stop when the waiting has ended, and begin again when it comes back. Memory of which little is
    /// touched stays small, and memory of which much is touched is there about as soon as if it had been loaded first.
    #[default]
    Auto,
    /// While nothing has faulted for some milliseconds: short bursts first, longer ones the longer it is quiet.
    Idle,
    /// From the start to the end, at full speed.
    Full,
}

/// How far the background loading has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Population {
    /// None was asked for.
    #[default]
    Off,
    /// [`Populate::Auto`]: nothing is loaded now, because threads do not wait for pages.
    Quiet,
    /// Under way; also when the pager was stopped before its end.
    Running,
    /// All is loaded, and the memory is out of the userfaultfds: neither the pager nor the source is needed
    /// any more. Pages that still count as missing are zero in the source and as zero in memory.
    Complete,
    /// Some pages could not be had. Those, and all else that is missing, are left to faults, as without population.
    Incomplete {
        /// How many pages.
        pages: u64,
    },
}

impl Population {
    fn has_ended(self) -> bool {
        matches!(self, Population::Off | Population::Complete | Population::Incomplete { .. })
    }
}

pub(crate) type OnComplete = Box<dyn Fn(Population) + Send + Sync>;

/// More loaders than this only wait for each other.
const MOST_LOADERS: usize = 4;

/// Loads ahead in the place of a pager whose pages are in a file that it shares with others.
pub(crate) trait LoadsAhead: Send + Sync {
    /// A thread has waited for `service` for the page at this offset.
    fn waited(&self, source_offset: u64, service: Duration);
    fn is_active(&self) -> bool;
    /// Threads wait so much that it is time.
    fn begin(&self);
}

/// What a pager is told of its background loading.
pub(crate) struct Options {
    pub(crate) mode: Populate,
    pub(crate) bytes_per_second: Option<NonZeroU64>,
    /// How many loaders; by the CPUs that there are if it was not said.
    pub(crate) loaders: Option<usize>,
    pub(crate) on_complete: Option<OnComplete>,
    /// What a fault costs the thread that waits, besides its answer.
    pub(crate) overhead: Duration,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) retry: RetryPolicy,
    /// The CPUs that the pager's threads may use.
    pub(crate) cpus: Option<Cpus>,
    pub(crate) elsewhere: Option<Arc<dyn LoadsAhead>>,
}

/// What the loaders of a pager share.
pub(crate) struct Progress {
    options: Options,
    loaders: usize,
    /// Made by the first loader: its size is that of the memory.
    plan: OnceLock<Plan>,
    demand: Demand,
    unloadable: AtomicU64,
    /// A demand thread waited for what a loader was just loading: the guest has caught up with it.
    caught_up: AtomicBool,
    /// Loaders are at work.
    active: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// When the next byte may come, under a rate limit.
    due: Mutex<Instant>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct State {
    population: Population,
    /// Loaders that are to end before the population has.
    left: usize,
}

impl Progress {
    /// For memory in so many slices. Costs the same for any size of it.
    pub(crate) fn new(options: Options, slices: usize) -> Progress {
        let cpus = options.cpus.as_ref().map_or(1, Cpus::count);
        let by_cpus = match options.mode {
            // On the only CPU a loader would just take turns with those that it loads for.
            Populate::Auto if cpus == 1 => 0,
            _ => cpus.saturating_sub(slices).clamp(1, MOST_LOADERS),
        };
        let loaders = options.loaders.unwrap_or(by_cpus);
        let population = match options.mode {
            Populate::Off => Population::Off,
            Populate::Auto if loaders == 0 => Population::Off,
            Populate::Auto => Population::Quiet,
            Populate::Idle | Populate::Full => Population::Running,
        };
        Progress {
            loaders,
            plan: OnceLock::new(),
            demand: Demand::new(options.overhead),
            unloadable: AtomicU64::new(0),
            caught_up: AtomicBool::new(false),
            active: AtomicBool::new(false),
            state: Mutex::new(State { population, left: loaders }),
            changed: Condvar::new(),
            due: Mutex::new(Instant::now()),
            threads: Mutex::new(Vec::new()),
            options,
        }
    }

    pub(crate) fn state(&self) -> Population {
        self.lock().population
    }

    /// Whether loaders are at work.
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Waits until it has ended, or for `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> Population {
        let under_way = |state: &mut State| !state.population.has_ended();
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, under_way)
            .unwrap_or_else(PoisonError::into_inner);
        state.population
    }

    /// In a demand thread: one has waited for `service` for this page. Answers whether that is heeded.
    pub(crate) fn waited(&self, page: u64, source_offset: u64, service: Duration) -> bool {
        if let Some(elsewhere) = &self.options.elsewhere {
            elsewhere.waited(source_offset, service);
            return true;
        }
        let heeded = self.options.mode == Populate::Auto && self.loaders > 0;
        if heeded {
            self.demand.add(page, service);
        }
        heeded
    }

    /// In a demand thread: threads wait so much that it is time to load ahead.
    pub(crate) fn demanded(shared: &Arc<Shared>) {
        match &shared.population.options.elsewhere {
            Some(elsewhere) => elsewhere.begin(),
            // Without threads for that, pages come on faults as before.
            None => drop(Progress::begin(shared)),
        }
    }

    /// Whether that is being done.
    pub(crate) fn loads_ahead(&self) -> bool {
        match &self.options.elsewhere {
            Some(elsewhere) => elsewhere.is_active(),
            None => self.is_active(),
        }
    }

    /// In a demand thread: it has waited for what a loader was just loading.
    pub(crate) fn catch_up(&self) {
        self.caught_up.store(true, Ordering::Relaxed);
    }

    /// Lets the loaders work. The first time their threads are made, which takes no part in the start of a pager.
    ///
    /// # Errors
    /// There is no thread to be had, and there were none before.
    pub(crate) fn begin(shared: &Arc<Shared>) -> std::io::Result<()> {
        let progress = &shared.population;
        let mut threads = lock(&progress.threads);
        // Under the lock of the threads: none is made after those were ended.
        if progress.state().has_ended() || shared.stopping.load(Ordering::SeqCst) {
            return Ok(());
        }
        progress.lock().population = Population::Running;
        progress.active.store(true, Ordering::Relaxed);
        if !threads.is_empty() {
            threads.iter().for_each(|loader| loader.thread().unpark());
            return Ok(());
        }
        for index in 0..progress.loaders {
            let loader = Loader::new(Arc::clone(shared));
            match spawn(format!("populate{index}"), move || loader.run()) {
                Ok(thread) => threads.push(thread),
                Err(error) if threads.is_empty() => {
                    progress.lock().population = Population::Off;
                    progress.active.store(false, Ordering::Relaxed);
                    return Err(error);
                }
                // Fewer do it, too.
                Err(_) => progress.lock().left -= 1,
            }
        }
        Ok(())
    }

    /// Ends the loaders, when the pager is stopping.
    pub(crate) fn stop(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        threads.iter().for_each(|loader| loader.thread().unpark());
        for thread in threads {
            // Its panics are caught inside.
            let _ = thread.join();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("mode", &self.options.mode).finish_non_exhaustive()
    }
}

/// What a loader takes: its stack, what the allocator gives it, a part of the file and what becomes of it.
const LOADER_BYTES: usize = 16 << 20;

/// Starts a thread that loads ahead, where there is address space for it (RLIMIT_AS): an allocation that fails
/// would end the process.
///
/// # Errors
/// As pthread_create(3).
pub(crate) fn spawn(
    name: String,
    body: impl FnOnce() + Send + 'static,
) -> std::io::Result<thread::JoinHandle<()>> {
    let mut room = Vec::<u8>::new();
    room.try_reserve_exact(LOADER_BYTES).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
    // Else the compiler leaves both out.
    drop(std::hint::black_box(room));
    thread::Builder::new().name(name).spawn(body)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pager was stopped, or the process is gone.
struct Ended;

fn stopped(shared: &Shared) -> Result<(), Ended> {
    if shared.stopping.load(Ordering::Relaxed) { Err(Ended) } else { Ok(()) }
}

/// Sleeps, unless the pager stops: that unparks the thread.
fn pause(shared: &Shared, how_long: Duration) -> Result<(), Ended> {
    stopped(shared)?;
    thread::park_timeout(how_long);
    stopped(shared)
}
