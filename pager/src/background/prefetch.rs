//! Prefetch: installs a list of pages, in the order in which the guest will probably need them, before it does.
//!
//! The list is a hint. A page that is not missing, or is in no region, is skipped, and the bytes that are decoded for
//! the list are limited. A page that cannot be loaded is left to a fault, which may never come. Faults go first: they
//! get the slice lock between two small steps, and this thread avoids their CPUs. The thread does not pause while
//! faults come, because it must load pages before the guest touches them.

use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use crate::background::claim::Claim;
use crate::background::ended::{Ended, stopped};
use crate::background::page_list::{PageList, Ready, within};
use crate::background::prefetch_progress::Prefetch;
use crate::fault::resolver::{ResolveError, Resolver};
use crate::install::kernel::{Fill, Target};
use crate::install::reason::InstallReason;
use crate::pager_state::PagerState;
use crate::sched::avoid_demand_cpus::AvoidDemandCpus;
use crate::sched::give_way::give_way;
use crate::source::load::Load;
use crate::source::page_source::PageSource;
use crate::source::sequence::Wanted;

/// The number of bytes installed each time the slice lock is held. A fault may wait about 20 us for that.
const STEP_BYTES: usize = 64 << 10;
/// The same for zero pages, which cost a fraction of that.
const ZERO_STEP_PAGES: u64 = 256;
/// If a fault has installed a page that was just being loaded, the guest has caught up. Then this many pages are left
/// to its faults, and loaded at the end, so that the prefetch is ahead again. The guest needs about four faults of one
/// chunk each for them, and each costs several times what the load costs here: that is enough to stay ahead. With 512
/// pages, eighty faults were needed instead of ten.
const LEAD_PAGES: usize = 64;

/// The thread that prefetches.
pub(crate) struct Prefetcher {
    pub(crate) shared: Arc<PagerState>,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) list: PageList,
    pub(crate) ready: Option<Ready>,
    /// The CPU of the thread that has started the pager and continues there.
    pub(crate) started_on: usize,
}

impl Prefetcher {
    /// The body of the thread.
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
        // A new thread starts on the CPU of the thread that created it, and would delay that for several milliseconds.
        let mut avoid = AvoidDemandCpus::default();
        avoid.begin_off(started_on);
        let (ranges, mut budget) = within(list(), source.len_bytes());
        let mut resolver = Resolver::new(usize::MAX);
        let claim = Claim::new(&shared);
        // The second round is for pages that were skipped.
        for leads in [true, false] {
            let Ok(mut sequence) = source.sequence(page_bytes as usize, ranges.clone()) else {
                return Ok(Prefetch::GivenUp);
            };
            let mut skipped = false;
            loop {
                stopped(&shared)?;
                let load = sequence.next(&claim);
                if let Some(ready) = ready.take() {
                    ready();
                }
                avoid.step(&shared);
                let loaded = match load {
                    None if claim.end() => {
                        skipped = true;
                        break;
                    }
                    None => break,
                    Some(Ok(Load::Zero { range })) => {
                        fill_zero(&shared, range)?;
                        continue;
                    }
                    Some(Ok(Load::Pages(loaded))) => loaded,
                    // The error of a page is reported if a thread touches it. A file that the memory maps is filled by
                    // its source.
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
                match resolver.install_ahead(&shared, None, InstallReason::Prefetch, loaded, step) {
                    // As above: left to a fault.
                    Ok(()) | Err(ResolveError::Failed(_)) => {}
                    Err(ResolveError::ProcessGone) => return Err(Ended),
                }
                let caught_up = claim.end() || caught_up;
                // Without this, a vCPU that was woken on this CPU would wait for the next tick, even if other CPUs are
                // idle.
                give_way();
                if leads && caught_up {
                    sequence.skip(LEAD_PAGES);
                    skipped = true;
                }
            }
            if !skipped {
                break;
            }
        }
        Ok(Prefetch::Done)
    }
}

/// Fills the missing pages of a zero range.
fn fill_zero(shared: &PagerState, range: Range<u64>) -> Result<(), Ended> {
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
        // A page that the kernel refuses is left to a fault.
        let _ = shared.install_elsewhere(extent.slice, target, Fill::Zero, InstallReason::Prefetch);
        offset += pages * page_bytes;
    }
    Ok(())
}
