//! Figures: counters per slice, and what is made of them.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::latency::{Distributions, LatencyStep, Times};
use crate::layout::Extent;
use crate::page_state::PageState;
use crate::populate::Population;
use crate::prefetch::Prefetch;
use crate::slice::Shared;

/// What a pager has done so far.
///
/// While it runs the numbers are read one by one, and a page is usable a moment before it is counted:
/// they may be behind by the faults in progress. What [`crate::Pager::stop`] answers is exact.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Bytes in a page.
    pub page_bytes: u64,
    /// All pages by what they are now.
    pub pages: PageCounts,
    /// Installed pages by why they were.
    pub installed: PagesByOrigin,
    /// How far the background population has come.
    pub population: Population,
    /// How far the prefetch has come.
    pub prefetch: Prefetch,
    /// Page-fault messages answered.
    pub faults: u64,
    /// Those among them whose page was there already: another fault had brought it.
    pub spurious_faults: u64,
    /// Bytes that the source has read from storage.
    pub bytes_read: u64,
    /// Loads that were tried again after a transient error.
    pub source_retries: u64,
    /// How long faults took.
    #[serde(flatten)]
    pub times: Times,
    /// The whole distribution of `times.service`: the steps that hold values, ascending.
    pub service_steps: Vec<LatencyStep>,
}

/// The figures of one region.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RegionStats {
    /// Where it begins in memory.
    pub host_addr: u64,
    /// Where it begins in the source.
    pub source_offset: u64,
    /// Its pages by what they are now.
    pub pages: PageCounts,
    /// How long its faults took. Of memory in more than eight regions this is not known.
    pub times: Option<Times>,
}

/// Pages by their state. `total` is the sum of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageCounts {
    /// All pages of all regions.
    pub total: u64,
    /// Never loaded.
    pub missing: u64,
    /// In memory.
    pub present: u64,
    /// Given back by the guest and not touched since.
    pub removed: u64,
    /// Could not be had.
    pub poisoned: u64,
}

/// Pages by what brought them. Where no page was removed, the sum is the number of present pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PagesByOrigin {
    /// The faulting page, from the source.
    pub demand: u64,
    /// Others that came with it.
    pub fault_around: u64,
    /// Loaded in the background, before anybody asked.
    pub populated: u64,
    /// Loaded from a list of pages that will probably be asked for, zero pages included.
    pub prefetched: u64,
    /// Zero pages: zero in the source, or given back and touched again.
    pub zero: u64,
    /// Were in memory before the pager could install them.
    pub existing: u64,
    /// Faults answered by a file that other processes share. These pages count as missing.
    pub file: u64,
}

impl AddAssign for PageCounts {
    fn add_assign(&mut self, other: PageCounts) {
        self.total += other.total;
        self.missing += other.missing;
        self.present += other.present;
        self.removed += other.removed;
        self.poisoned += other.poisoned;
    }
}

/// Why a page is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Demand,
    FaultAround,
    Zero,
    Existing,
    File,
    Populated,
    Prefetched,
}

/// The counters of a slice. Mostly written by its own thread; by others only when their chunks reach in.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) total_pages: u64,
    /// By `PageState`; those of `Missing` count what has left that state.
    by_state: [AtomicU64; 4],
    by_origin: [AtomicU64; 7],
    faults: AtomicU64,
    spurious_faults: AtomicU64,
    bytes_read: AtomicU64,
    source_retries: AtomicU64,
}

impl Counters {
    pub(crate) fn of(total_pages: u64) -> Counters {
        Counters { total_pages, ..Counters::default() }
    }

    pub(crate) fn moved(&self, from: PageState, to: PageState, pages: u64) {
        // Missing is never entered, so its counter is that of the pages that left it.
        let from_counter = &self.by_state[from as usize];
        match from {
            PageState::Missing => from_counter.fetch_add(pages, Ordering::Relaxed),
            _ => from_counter.fetch_sub(pages, Ordering::Relaxed),
        };
        self.by_state[to as usize].fetch_add(pages, Ordering::Relaxed);
    }

    pub(crate) fn installed(&self, origin: Origin, pages: u64) {
        self.by_origin[origin as usize].fetch_add(pages, Ordering::Relaxed);
    }

    pub(crate) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    pub(crate) fn poisoned(&self) -> u64 {
        self.by_state[PageState::Poisoned as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn spurious(&self) {
        self.spurious_faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn retried(&self) {
        self.source_retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_to(&self, stats: &mut Stats) {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let state = |state: PageState| of(&self.by_state[state as usize]);
        stats.pages += PageCounts {
            total: self.total_pages,
            missing: self.total_pages.saturating_sub(state(PageState::Missing)),
            present: state(PageState::Present),
            removed: state(PageState::Removed),
            poisoned: state(PageState::Poisoned),
        };
        stats.installed.demand += of(&self.by_origin[Origin::Demand as usize]);
        stats.installed.fault_around += of(&self.by_origin[Origin::FaultAround as usize]);
        stats.installed.zero += of(&self.by_origin[Origin::Zero as usize]);
        stats.installed.existing += of(&self.by_origin[Origin::Existing as usize]);
        stats.installed.file += of(&self.by_origin[Origin::File as usize]);
        stats.installed.prefetched += of(&self.by_origin[Origin::Prefetched as usize]);
        stats.installed.populated += of(&self.by_origin[Origin::Populated as usize]);
        stats.faults += of(&self.faults);
        stats.spurious_faults += of(&self.spurious_faults);
        stats.bytes_read += of(&self.bytes_read);
        stats.source_retries += of(&self.source_retries);
    }
}

impl Shared {
    pub(crate) fn stats(&self) -> Stats {
        let mut stats = Stats { page_bytes: self.layout.page_bytes(), ..Stats::default() };
        let mut all = Distributions::new();
        for slice in &self.slices {
            slice.counters.add_to(&mut stats);
            slice.recorder.by_region().iter().for_each(|of_region| all.add(of_region));
        }
        stats.times = all.times();
        stats.service_steps = all.service_steps();
        stats.population = self.population.state();
        stats.prefetch = self.prefetch.state();
        stats
    }

    pub(crate) fn region_stats(&self) -> Vec<RegionStats> {
        let mut regions: Vec<RegionStats> = Vec::new();
        for extent in (0..self.layout.slices()).flat_map(|slice| self.layout.extents_of(slice)) {
            if extent.region == regions.len() {
                let Extent { source_offset, .. } = *extent;
                let host_addr = extent.host.start;
                regions.push(RegionStats { host_addr, source_offset, ..RegionStats::default() });
            }
            let pages = (extent.host.end - extent.host.start) / self.layout.page_bytes();
            let of_region = &mut regions[extent.region];
            of_region.pages.total += pages;
            for page in extent.first_page..extent.first_page + pages {
                *of_region.pages.in_state(self.states.of(page)) += 1;
            }
        }
        let by_slice: Vec<_> = self.slices.iter().map(|slice| slice.recorder.by_region()).collect();
        let apart = by_slice.iter().all(|of_slice| of_slice.len() == regions.len());
        for (index, region) in regions.iter_mut().enumerate().filter(|_| apart) {
            let mut all = Distributions::new();
            by_slice.iter().for_each(|of_slice| all.add(&of_slice[index]));
            region.times = Some(all.times());
        }
        regions
    }
}

impl PageCounts {
    fn in_state(&mut self, state: PageState) -> &mut u64 {
        match state {
            PageState::Missing => &mut self.missing,
            PageState::Present => &mut self.present,
            PageState::Removed => &mut self.removed,
            PageState::Poisoned => &mut self.poisoned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_always_sum_up_to_the_total() {
        let counters = Counters::of(100);
        counters.moved(PageState::Missing, PageState::Present, 10);
        counters.moved(PageState::Present, PageState::Removed, 4);
        counters.moved(PageState::Missing, PageState::Poisoned, 1);
        counters.moved(PageState::Removed, PageState::Present, 3);
        let mut stats = Stats::default();
        counters.add_to(&mut stats);
        let expected = PageCounts { total: 100, missing: 89, present: 9, removed: 1, poisoned: 1 };
        assert_eq!(stats.pages, expected);
    }
}
