//! The counters of a slice: its pages by state and by origin, its faults and its loads.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::install::page_state::PageState;
use crate::stats::{PageCounts, Stats};

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

/// The counters of a slice. Mostly its own demand thread writes them; others do when they install pages in the slice.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) total_pages: u64,
    /// By `PageState`. The counter of `Missing` counts the pages that are not missing.
    by_state: [AtomicU64; 4],
    by_origin: [AtomicU64; 7],
    faults: AtomicU64,
    spurious_faults: AtomicU64,
    bytes_read: AtomicU64,
    source_retries: AtomicU64,
    /// Faults that have waited for longer than `STALL`, without those that still do.
    stalls: AtomicU64,
}

impl Counters {
    pub(crate) fn of(total_pages: u64) -> Counters {
        Counters { total_pages, ..Counters::default() }
    }

    pub(crate) fn moved(&self, from: PageState, to: PageState, pages: u64) {
        // All pages begin as `Missing`, so that its counter is the number of pages that have another state.
        for (state, enters) in [(from, false), (to, true)] {
            let counter = &self.by_state[state as usize];
            match enters == (state != PageState::Missing) {
                true => counter.fetch_add(pages, Ordering::Relaxed),
                false => counter.fetch_sub(pages, Ordering::Relaxed),
            };
        }
    }

    pub(crate) fn installed(&self, origin: Origin, pages: u64) {
        self.by_origin[origin as usize].fetch_add(pages, Ordering::Relaxed);
    }

    /// About the number of present pages that are not zero in the source. Zero pages that were present and then reset count twice.
    pub(crate) fn data_pages(&self) -> u64 {
        let present = self.by_state[PageState::Present as usize].load(Ordering::Relaxed);
        present.saturating_sub(self.by_origin[Origin::Zero as usize].load(Ordering::Relaxed))
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

    pub(crate) fn stalled(&self, faults: u64) {
        self.stalls.fetch_add(faults, Ordering::Relaxed);
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
        stats.stalls += of(&self.stalls);
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
        counters.moved(PageState::Present, PageState::Missing, 8);
        let mut stats = Stats::default();
        counters.add_to(&mut stats);
        let expected = PageCounts { total: 100, missing: 97, present: 1, removed: 1, poisoned: 1 };
        assert_eq!(stats.pages, expected);
    }
}
