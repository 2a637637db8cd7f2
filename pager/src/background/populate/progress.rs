//! The state that the loaders of a pager share.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::demand::Demand;
use super::plan::Plan;
use super::population::{Populate, Population};
use crate::sched::cpus::Cpus;
use crate::source::page_source::PageSource;
use crate::source::retry::RetryPolicy;

/// Called when the population has ended.
pub(crate) type OnComplete = Box<dyn Fn(Population) + Send + Sync>;

/// The upper limit of loaders. More of them only wait for each other.
const MOST_LOADERS: usize = 4;

/// With a single CPU, the rest is loaded when this many eighths of the data are installed. A guest that has needed so much
/// needs most of the rest, too. With chunks of 8 pages, a guest that touches a tenth of its pages at random needs 57 %.
const MOST_EIGHTHS: u64 = 5;

/// Loads ahead in place of the loaders of a pager whose memory is a mapping of a shared file.
pub(crate) trait LoadsAhead: Send + Sync {
    /// A thread has waited for `service` for the page at this source offset, in bytes.
    fn waited(&self, source_offset: u64, service: Duration);
    fn is_active(&self) -> bool;
    /// Threads wait so much that loading ahead has to start.
    fn begin(&self);
}

/// The options of background loading.
pub(crate) struct Options {
    pub(crate) mode: Populate,
    pub(crate) bytes_per_second: Option<NonZeroU64>,
    /// The number of loaders. `None`: by the number of CPUs.
    pub(crate) loaders: Option<usize>,
    pub(crate) on_complete: Option<OnComplete>,
    /// What a fault costs the faulting thread besides its answer.
    pub(crate) overhead: Duration,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) retry: RetryPolicy,
    /// The CPUs that the threads of the pager may use.
    pub(crate) cpus: Option<Cpus>,
    pub(crate) elsewhere: Option<Arc<dyn LoadsAhead>>,
}

/// The state that the loaders of a pager share.
pub(crate) struct Progress {
    pub(super) options: Options,
    pub(super) loaders: usize,
    /// Further loaders, for the CPUs of threads that wait for a disk.
    pub(super) spare_loaders: usize,
    /// With a single CPU: how much of the source's data has to be installed before the rest is loaded, too.
    rest_from_bytes: Option<u64>,
    /// Created by the first loader, because its cost depends on the size of the memory.
    pub(super) plan: OnceLock<Plan>,
    pub(super) demand: Demand,
    pub(super) unloadable: AtomicU64,
    /// A demand thread has waited for a page that a loader was loading: the guest has caught up with the loader.
    pub(super) caught_up: AtomicBool,
    /// Loaders are working.
    pub(super) active: AtomicBool,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    /// When the next byte may be loaded, under a rate limit.
    pub(super) due: Mutex<Instant>,
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
}

pub(super) struct State {
    pub(super) population: Population,
    /// The number of loaders that have not ended.
    pub(super) left: usize,
}

impl Progress {
    /// The progress for memory in this number of slices. Creating it costs the same for any size of memory.
    pub(crate) fn new(options: Options, slices: usize) -> Progress {
        let cpus = options.cpus.as_ref().map_or(1, Cpus::count);
        let by_cpus = match options.mode {
            // On a single CPU a loader would only take time from the threads that it loads for.
            Populate::Auto if cpus == 1 => 0,
            _ => cpus.saturating_sub(slices).clamp(1, MOST_LOADERS),
        };
        let loaders = options.loaders.unwrap_or(by_cpus);
        let spare_loaders = match options.mode {
            Populate::Auto if options.loaders.is_none() => {
                cpus.min(MOST_LOADERS).saturating_sub(loaders).min(slices)
            }
            _ => 0,
        };
        // The spare loader does that. The number is constant, and not to be found out again at each fault.
        let only_rest = options.mode == Populate::Auto && loaders == 0 && cpus == 1;
        let rest_from_bytes = only_rest.then(|| options.source.data_bytes() / 8 * MOST_EIGHTHS);
        let population = match options.mode {
            Populate::Off => Population::Off,
            Populate::Auto if loaders + spare_loaders == 0 => Population::Off,
            Populate::Auto => Population::Quiet,
            Populate::Idle | Populate::Full => Population::Running,
        };
        Progress {
            loaders,
            spare_loaders,
            rest_from_bytes,
            plan: OnceLock::new(),
            demand: Demand::new(options.overhead),
            unloadable: AtomicU64::new(0),
            caught_up: AtomicBool::new(false),
            active: AtomicBool::new(false),
            state: Mutex::new(State { population, left: loaders + spare_loaders }),
            changed: Condvar::new(),
            due: Mutex::new(Instant::now()),
            threads: Mutex::new(Vec::new()),
            options,
        }
    }

    pub(crate) fn state(&self) -> Population {
        self.lock().population
    }

    /// Whether loaders are working.
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Waits until the population has ended, or for `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> Population {
        let in_progress = |state: &mut State| !state.population.has_ended();
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, in_progress)
            .unwrap_or_else(PoisonError::into_inner);
        state.population
    }

    /// Pages were put back to missing. The caller holds the locks of the slices.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        if state.population == Population::Complete {
            state.population = Population::Reset;
        }
    }

    /// Called by a demand thread: a thread has waited for `service` for this page, of which `read` was the read from
    /// storage. Returns whether this can start the loading.
    pub(crate) fn waited(
        &self,
        page: u64,
        source_offset: u64,
        service: Duration,
        read: Duration,
        installed_bytes: impl FnOnce() -> u64,
    ) -> bool {
        if let Some(elsewhere) = &self.options.elsewhere {
            elsewhere.waited(source_offset, service);
            return true;
        }
        let counts = self.options.mode == Populate::Auto && self.loaders + self.spare_loaders > 0;
        if counts {
            self.demand.add(page, service, read);
        }
        counts
            && (self.loaders > 0 || self.demand.waits_for_disk() || self.is_rest(installed_bytes))
    }

    /// Whether there is a single CPU, and so much of the source's data is installed that the rest is to be loaded, too.
    pub(crate) fn is_rest(&self, installed_bytes: impl FnOnce() -> u64) -> bool {
        self.rest_from_bytes.is_some_and(|from| installed_bytes() >= from)
    }

    /// Whether the loading can begin before a thread waits.
    pub(crate) fn has_loaders(&self) -> bool {
        self.loaders > 0
    }

    /// Whether pages are being loaded ahead.
    pub(crate) fn loads_ahead(&self) -> bool {
        match &self.options.elsewhere {
            Some(elsewhere) => elsewhere.is_active(),
            None => self.is_active(),
        }
    }

    /// Called by a demand thread: it has waited for a page that a loader was loading.
    pub(crate) fn catch_up(&self) {
        self.caught_up.store(true, Ordering::Relaxed);
    }

    /// Lets sleeping loaders look at the state again.
    pub(super) fn wake(&self) {
        lock(&self.threads).iter().for_each(|loader| loader.thread().unpark());
    }

    /// Ends the loaders. The pager is stopping.
    pub(crate) fn stop(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        threads.iter().for_each(|loader| loader.thread().unpark());
        for thread in threads {
            // The thread catches its panics.
            let _ = thread.join();
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("mode", &self.options.mode).finish_non_exhaustive()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
