//! Background population: loads what nobody has touched yet, and never in the way of who waits for a page.
//!
//! Threads of their own go through the source by offset, a part each at a time. Before every load and every
//! step of installing they look whether a fault waits or is being answered, and then step aside. The longer
//! nothing was asked for, the larger the steps. When no page is left the memory is taken out of the
//! userfaultfds: from then on neither the pager nor the source is needed. Zero pages are not filled in: for them the
//! kernel's own zeros are right.

use std::fmt;
use std::num::NonZeroU64;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::answer::{Desk, Trouble};
use crate::handler::{Panicked, RetryPolicy};
use crate::layout::Place;
use crate::page_state::PageState;
use crate::placement::Aside;
use crate::prefetch::Prefetch;
use crate::purpose::Purpose;
use crate::slice::Shared;
use crate::source::{Load, PageReader, SourceErrorKind};

/// Whether pages that nobody has touched are loaded in the background.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Populate {
    /// They are not.
    #[default]
    Off,
    /// While nothing has faulted for some milliseconds: short bursts first, longer ones the longer it is quiet.
    Idle,
    /// All the time, except while a fault waits or is being answered.
    Full,
}

/// How far the background population has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Population {
    /// None was asked for.
    #[default]
    Off,
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

/// What one worker takes at a time.
const PART_BYTES: u64 = 2 << 20;
/// Installed under the gate at once: at most this long a fault may have to wait for it, about 20 us.
const SHORTEST_STEP_BYTES: usize = 64 << 10;
/// And after a quiet time, about 150 us.
const LONGEST_STEP_BYTES: usize = 512 << 10;
/// Between looks, while faults are being answered.
const ASIDE: Duration = Duration::from_micros(50);
/// Guests that never stop faulting hold up `Full` this long at most, for each load.
const LONGEST_ASIDE: Duration = Duration::from_millis(10);
/// As long nothing must have faulted for `Idle` to begin.
const QUIET: Duration = Duration::from_millis(5);
/// While there is a prefetch, between looks whether the pager was stopped.
const AFTER_PREFETCH: Duration = Duration::from_millis(5);
/// The first burst of `Idle`, and the pause after each burst.
const FIRST_BURST_BYTES: u64 = 256 << 10;
const LONGEST_BURST_BYTES: u64 = 32 << 20;
const BURST_PAUSE: Duration = Duration::from_millis(1);

pub(crate) type OnComplete = Box<dyn Fn(Population) + Send + Sync>;

/// What the workers of a pager share.
pub(crate) struct Progress {
    mode: Populate,
    bytes_per_second: Option<NonZeroU64>,
    parts: Vec<(u64, u64)>,
    next_part: AtomicU64,
    unloadable: AtomicU64,
    state: Mutex<(Population, usize)>,
    changed: Condvar,
    /// When the next byte may come, under a rate limit.
    due: Mutex<Instant>,
    on_complete: Option<OnComplete>,
}

impl Progress {
    pub(crate) fn new(
        mode: Populate,
        bytes_per_second: Option<NonZeroU64>,
        workers: usize,
        on_complete: Option<OnComplete>,
        extents: impl Iterator<Item = (u64, u64)>,
        page_bytes: u64,
    ) -> Progress {
        let part_pages = (PART_BYTES / page_bytes).max(1);
        let mut parts = Vec::new();
        if mode != Populate::Off {
            for (first_page, pages) in extents {
                let cuts = (first_page..first_page + pages).step_by(part_pages as usize);
                parts.extend(cuts.map(|from| (from, (from + part_pages).min(first_page + pages))));
            }
        }
        let state = if mode == Populate::Off { Population::Off } else { Population::Running };
        Progress {
            mode,
            bytes_per_second,
            parts,
            next_part: AtomicU64::new(0),
            unloadable: AtomicU64::new(0),
            state: Mutex::new((state, workers)),
            changed: Condvar::new(),
            due: Mutex::new(Instant::now()),
            on_complete,
        }
    }

    pub(crate) fn state(&self) -> Population {
        self.lock().0
    }

    /// Waits until it is not `Running` any more, or for `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> Population {
        let running = |state: &mut (Population, usize)| state.0 == Population::Running;
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, running)
            .unwrap_or_else(PoisonError::into_inner);
        state.0
    }

    fn lock(&self) -> MutexGuard<'_, (Population, usize)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// One thread of the population.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) reader: Box<dyn PageReader>,
    pub(crate) retry: RetryPolicy,
    pub(crate) desk: Desk,
    pace: Pace,
    aside: Aside,
}

/// The pager was stopped, or the process is gone.
struct Ended;

/// A page was dealt with: all before this one need no load.
type NextPage = u64;

impl Worker {
    pub(crate) fn new(
        shared: Arc<Shared>,
        reader: Box<dyn PageReader>,
        retry: RetryPolicy,
    ) -> Worker {
        let pace = Pace {
            step_bytes: SHORTEST_STEP_BYTES,
            faults: 0,
            quiet_since: Instant::now(),
            burst: 0,
            burst_bytes: FIRST_BURST_BYTES,
        };
        Worker { shared, reader, retry, desk: Desk::new(usize::MAX), pace, aside: Aside::default() }
    }

    /// The thread's body. A source that panics has no more to say to this thread; the pages are left to faults.
    pub(crate) fn run(mut self) {
        self.aside.begin();
        // What will probably be asked for goes first.
        while self.shared.prefetch.wait(AFTER_PREFETCH) == Prefetch::Running {
            if stopped(&self.shared).is_err() {
                return;
            }
        }
        loop {
            let progress = &self.shared.population;
            let number = progress.next_part.fetch_add(1, Ordering::Relaxed);
            let Some(&(first, end)) = progress.parts.get(number as usize) else { break };
            if let Err(Ended) = self.load_part(first, end) {
                return;
            }
        }
        self.finish();
    }

    fn load_part(&mut self, first: u64, end: u64) -> Result<(), Ended> {
        let mut page = first;
        while page < end {
            if self.shared.states.of(page) != PageState::Missing {
                page += 1;
                continue;
            }
            page = match panic::catch_unwind(AssertUnwindSafe(|| self.load_page(page))) {
                Ok(next) => next?,
                Err(_) => {
                    // It may be in any state: not even its destructor is run.
                    std::mem::forget(std::mem::replace(&mut self.reader, Box::new(Panicked)));
                    self.give_up(page)
                }
            };
        }
        Ok(())
    }

    /// Loads until the page is not missing any more, or known to be zero, or given up.
    fn load_page(&mut self, page: u64) -> Result<NextPage, Ended> {
        let shared = Arc::clone(&self.shared);
        let page_bytes = shared.layout.page_bytes();
        // Parts are made of the layout's own pages.
        let Some(place) = shared.layout.at_page(page) else { return Ok(page + 1) };
        let offset = shared.layout.source_offset(place);
        let mut failed_loads = 0;
        let mut tries = 0;
        while shared.states.of(page) == PageState::Missing {
            self.pace.step_aside(&shared)?;
            self.aside.step(&shared);
            match self.reader.load(offset) {
                Ok(Load::Zero { range }) => {
                    // Left to the kernel, or to a fault.
                    let pages = range.end.saturating_sub(offset) / page_bytes;
                    let extent = shared.layout.extent(place.extent);
                    return Ok(page + pages.clamp(1, extent.end_page(page_bytes) - page));
                }
                Ok(Load::Pages(loaded)) => {
                    shared.slices[extent_slice(&shared, place)]
                        .counters
                        .read(loaded.cost.bytes_read);
                    let bytes = loaded.pages.len() as u64 * page_bytes;
                    let pace = &mut self.pace;
                    let purpose = Purpose::Populate;
                    let installed =
                        self.desk.populate(&shared, Some(place), purpose, loaded, |step| {
                            pace.between_steps(&shared)?;
                            *step = pace.step_bytes;
                            Some(())
                        });
                    match installed {
                        Ok(()) => {}
                        Err(Trouble::ProcessGone) => return Err(Ended),
                        Err(Trouble::Failed(_)) => return Ok(self.give_up(page)),
                    }
                    self.pace.loaded(&shared, bytes)?;
                    tries += 1;
                    if tries > 1 {
                        // The memory map is changing, and its demand thread sees to that.
                        pause(&shared, ASIDE)?;
                    }
                }
                Ok(Load::InFile { .. }) => return Ok(self.give_up(page)),
                Err(error)
                    if error.kind() == SourceErrorKind::Transient
                        && failed_loads < self.retry.retries =>
                {
                    pause(&shared, self.retry.pause(failed_loads))?;
                    failed_loads += 1;
                }
                Err(_) => return Ok(self.give_up(page)),
            }
        }
        Ok(page + 1)
    }

    fn give_up(&self, page: u64) -> NextPage {
        self.shared.population.unloadable.fetch_add(1, Ordering::Relaxed);
        page + 1
    }

    /// The last worker to end lets the memory go, if all of it is loaded.
    fn finish(&self) {
        let progress = &self.shared.population;
        {
            let mut state = progress.lock();
            state.1 -= 1;
            if state.1 > 0 {
                return;
            }
        }
        let mut unloadable = progress.unloadable.load(Ordering::Relaxed);
        unloadable += self.shared.slices.iter().map(|slice| slice.counters.poisoned()).sum::<u64>();
        let state = match unloadable {
            0 if self.shared.release().is_ok() => Population::Complete,
            pages => Population::Incomplete { pages },
        };
        progress.lock().0 = state;
        progress.changed.notify_all();
        if let Some(on_complete) = &progress.on_complete {
            // The caller's code, at the end of this thread: nothing is left to be harmed by its panic.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| on_complete(state)));
        }
    }
}

fn extent_slice(shared: &Shared, place: Place) -> usize {
    shared.layout.extent(place.extent).slice
}

/// When to go on, and how far at once.
struct Pace {
    step_bytes: usize,
    /// Faults at the last look.
    faults: u64,
    quiet_since: Instant,
    /// Bytes of the present burst (`Idle`), and how long it may get.
    burst: u64,
    burst_bytes: u64,
}

impl Pace {
    /// Waits until no fault waits or is being answered; in `Idle` until it has been quiet.
    fn step_aside(&mut self, shared: &Shared) -> Result<(), Ended> {
        let idle = shared.population.mode == Populate::Idle;
        let began = Instant::now();
        loop {
            self.look(shared);
            let busy = shared.demand();
            if busy {
                self.disturbed();
            }
            let aside = began.elapsed() < LONGEST_ASIDE;
            if !(busy && (aside || idle)) && !(idle && self.quiet_since.elapsed() < QUIET) {
                return stopped(shared);
            }
            let wait = if idle { BURST_PAUSE } else { ASIDE };
            pause(shared, wait)?;
        }
    }

    /// Between two steps of one load, which have the gate: faults first.
    fn between_steps(&mut self, shared: &Shared) -> Option<()> {
        let began = Instant::now();
        self.look(shared);
        while shared.demand() && began.elapsed() < LONGEST_ASIDE {
            self.disturbed();
            pause(shared, ASIDE).ok()?;
        }
        stopped(shared).ok()
    }

    fn look(&mut self, shared: &Shared) {
        let faults = shared.slices.iter().map(|slice| slice.counters.faults()).sum();
        if faults == self.faults {
            self.step_bytes = (self.step_bytes * 2).min(LONGEST_STEP_BYTES);
        } else {
            self.faults = faults;
            self.disturbed();
        }
    }

    fn disturbed(&mut self) {
        self.step_bytes = SHORTEST_STEP_BYTES;
        self.quiet_since = Instant::now();
        (self.burst, self.burst_bytes) = (0, FIRST_BURST_BYTES);
    }

    /// The pauses that the rate and the mode ask for.
    fn loaded(&mut self, shared: &Shared, bytes: u64) -> Result<(), Ended> {
        let progress = &shared.population;
        if let Some(rate) = progress.bytes_per_second {
            let cost = Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
            let due = {
                let mut due = progress.due.lock().unwrap_or_else(PoisonError::into_inner);
                *due = (*due).max(Instant::now()) + cost;
                *due
            };
            while let Some(wait) = due.checked_duration_since(Instant::now()) {
                pause(shared, wait)?;
            }
        }
        self.burst += bytes;
        if progress.mode == Populate::Idle && self.burst >= self.burst_bytes {
            (self.burst, self.burst_bytes) = (0, (self.burst_bytes * 2).min(LONGEST_BURST_BYTES));
            pause(shared, BURST_PAUSE)?;
        }
        Ok(())
    }
}

fn stopped(shared: &Shared) -> Result<(), Ended> {
    if shared.stopping.load(Ordering::Relaxed) { Err(Ended) } else { Ok(()) }
}

/// Sleeps, unless the pager stops: that unparks the thread.
fn pause(shared: &Shared, how_long: Duration) -> Result<(), Ended> {
    stopped(shared)?;
    thread::park_timeout(how_long);
    stopped(shared)
}
