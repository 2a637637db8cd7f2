//! Prefetch: a list of pages, in the order in which they will probably be needed, is installed in front of who runs.
//!
//! The list is a hint. Each of its pages is looked up, and one that is not missing, or in no region, is passed over; what
//! is decoded for it in vain is bounded. A page that cannot be had is left to the fault that may never come.
//! Faults overtake: they get the lock of memory between two small steps, and the thread keeps off their CPUs. It does not
//! wait until there are none, since to be in front of them is what it is for.

use std::fmt;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use crate::answer::{Desk, Trouble};
use crate::install::{Fill, Target};
use crate::loading::Claim;
use crate::placement::Aside;
use crate::purpose::Purpose;
use crate::sequence::Wanted;
use crate::slice::Shared;
use crate::source::{Load, PageSource};

/// How far the prefetch has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Prefetch {
    /// None was asked for.
    #[default]
    Off,
    /// Under way; also when the pager was stopped before its end.
    Running,
    /// At the end of the list.
    Done,
    /// Given up: what had to be decoded for the pages of the list was out of proportion, the source panicked, or there was no
    /// thread for it.
    GivenUp,
}

/// Installed under the gate at once: about 20 us that a fault may have to wait.
const STEP_BYTES: usize = 64 << 10;
/// Zero pages cost a fraction of that.
const ZERO_STEP_PAGES: u64 = 256;
/// When a fault has brought what was just being loaded, whoever runs has caught up: so many pages are left to its faults,
/// to get in front of it again. They come at the end. It takes four faults of a chunk each to get through them, and each costs
/// several times what it costs to load the same here: enough to be in front, and to stay there. With 512, eighty
/// faults were paid where ten do.
const LEAD_PAGES: usize = 64;
/// A list leads to at most so many decoded bytes for each byte of its pages (a chunk of 16 pages for each of them), and so
/// many in any case.
const DECODED_PER_LISTED: u64 = 16;
const DECODED_ANYHOW: u64 = 64 << 20;

/// Gives the pages, as ranges of source offsets: called on the thread that prefetches.
pub(crate) type PageList = Box<dyn FnOnce() -> Vec<Range<u64>> + Send>;

/// Called there before anything is installed; may wait.
pub(crate) type Ready = Box<dyn FnOnce() + Send>;

/// How far it has come, for those who wait for it.
pub(crate) struct PrefetchProgress {
    state: Mutex<Prefetch>,
    running: AtomicBool,
    changed: Condvar,
}

impl PrefetchProgress {
    pub(crate) fn new(wanted: bool) -> PrefetchProgress {
        let state = if wanted { Prefetch::Running } else { Prefetch::Off };
        PrefetchProgress {
            state: Mutex::new(state),
            running: AtomicBool::new(wanted),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn state(&self) -> Prefetch {
        *self.lock()
    }

    /// The same as whether the state is `Running`, without its lock.
    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    /// Waits until it is not `Running` any more, or for `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> Prefetch {
        let running = |state: &mut Prefetch| *state == Prefetch::Running;
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, running)
            .unwrap_or_else(PoisonError::into_inner);
        *state
    }

    pub(crate) fn ended(&self, state: Prefetch) {
        *self.lock() = state;
        self.running.store(false, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Prefetch> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PrefetchProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(f)
    }
}

/// The thread that prefetches.
pub(crate) struct Prefetcher {
    pub(crate) shared: Arc<Shared>,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) list: PageList,
    pub(crate) ready: Option<Ready>,
    /// The CPU on which the pager was started, and whoever started it goes on.
    pub(crate) started_on: usize,
}

/// The pager was stopped, or the process is gone.
struct Ended;

impl Prefetcher {
    /// The thread's body.
    pub(crate) fn run(self) {
        let shared = Arc::clone(&self.shared);
        let state = match panic::catch_unwind(AssertUnwindSafe(|| self.load())) {
            Ok(Ok(state)) => state,
            Ok(Err(Ended)) => return,
            Err(_) => Prefetch::GivenUp,
        };
        shared.prefetch.ended(state);
    }

    fn load(self) -> Result<Prefetch, Ended> {
        let Prefetcher { shared, source, list, mut ready, started_on } = self;
        let page_bytes = shared.layout.page_bytes();
        // A new thread begins on the CPU of who has made it, which then waits there for several milliseconds.
        let mut aside = Aside::default();
        aside.begin_off(started_on);
        let (ranges, mut budget) = within(list(), source.len_bytes());
        let mut desk = Desk::new(usize::MAX);
        let claim = Claim::new(&shared);
        // The second time for what was passed over.
        for leads in [true, false] {
            let Ok(mut sequence) = source.sequence(page_bytes as usize, ranges.clone()) else {
                return Ok(Prefetch::GivenUp);
            };
            let mut passed_over = false;
            loop {
                stopped(&shared)?;
                let load = sequence.next(&claim);
                if let Some(ready) = ready.take() {
                    ready();
                }
                aside.step(&shared);
                let loaded = match load {
                    None if claim.end() => {
                        passed_over = true;
                        break;
                    }
                    None => break,
                    Some(Ok(Load::Zero { range })) => {
                        fill_zero(&shared, range)?;
                        continue;
                    }
                    Some(Ok(Load::Pages(loaded))) => loaded,
                    // A page that cannot be had has its say when somebody waits for it. A file that the memory maps
                    // is somebody else's to fill.
                    Some(Ok(Load::InFile { .. }) | Err(_)) => continue,
                };
                shared.slices[0].counters.read(loaded.cost.bytes_read);
                match budget.checked_sub(loaded.bytes.len() as u64) {
                    Some(left) => budget = left,
                    None => return Ok(Prefetch::GivenUp),
                }
                let caught_up =
                    loaded.pages.iter().any(|page| !claim.is_wanted(page.source_offset));
                let step = |step: &mut usize| {
                    *step = STEP_BYTES;
                    stopped(&shared).ok()
                };
                match desk.populate(&shared, None, Purpose::Prefetch, loaded, step) {
                    // As above.
                    Ok(()) | Err(Trouble::Failed(_)) => {}
                    Err(Trouble::ProcessGone) => return Err(Ended),
                }
                let caught_up = claim.end() || caught_up;
                // A vCPU that was woken on this CPU would otherwise wait for the next tick, while others are idle.
                thread::yield_now();
                if leads && caught_up {
                    sequence.skip(LEAD_PAGES);
                    passed_over = true;
                }
            }
            if !passed_over {
                break;
            }
        }
        Ok(Prefetch::Done)
    }
}

/// The ranges as far as they are within the source, and how many bytes may be decoded for them.
pub(crate) fn within(mut ranges: Vec<Range<u64>>, len_bytes: u64) -> (Vec<Range<u64>>, u64) {
    for range in &mut ranges {
        range.end = range.end.min(len_bytes);
    }
    ranges.retain(|range| range.start < range.end);
    let listed = ranges.iter().fold(0u64, |sum, range| sum.saturating_add(range.end - range.start));
    (ranges, listed.saturating_mul(DECODED_PER_LISTED).saturating_add(DECODED_ANYHOW))
}

/// Fills the missing pages of a range that is zero.
fn fill_zero(shared: &Shared, range: Range<u64>) -> Result<(), Ended> {
    let page_bytes = shared.layout.page_bytes();
    let mut offset = range.start.next_multiple_of(page_bytes);
    while offset < range.end {
        let Some(place) = shared.layout.at_source(offset, 0) else {
            offset = offset.saturating_add(page_bytes);
            continue;
        };
        let extent = shared.layout.extent(place.extent);
        let pages = ((range.end - offset) / page_bytes)
            .min(extent.end_page(page_bytes) - place.page)
            .min(ZERO_STEP_PAGES);
        if pages == 0 {
            break;
        }
        stopped(shared)?;
        let target = Target {
            first_page: place.page,
            pages: pages as usize,
            host_addr: place.host_addr,
            page_bytes: page_bytes as usize,
        };
        // As for pages that are refused.
        let _ = shared.install_elsewhere(extent.slice, target, Fill::Zero, Purpose::Prefetch);
        offset += pages * page_bytes;
    }
    Ok(())
}

fn stopped(shared: &Shared) -> Result<(), Ended> {
    if shared.stopping.load(Ordering::Relaxed) { Err(Ended) } else { Ok(()) }
}
