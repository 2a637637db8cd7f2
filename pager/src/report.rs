//! Collects the statistics of a pager from its threads.

use std::time::Instant;

use crate::fault::latency::Distributions;
use crate::install::page_state::PageState;
use crate::layout::Extent;
use crate::pager_state::PagerState;
use crate::stats::{PageCounts, RegionStats, Stats};

impl PagerState {
    pub(crate) fn stats(&self) -> Stats {
        let mut stats = Stats { page_bytes: self.layout.page_bytes(), ..Stats::default() };
        let mut all = Distributions::new();
        let now = Instant::now();
        for slice in &self.slices {
            slice.counters.add_to(&mut stats);
            stats.stalled += slice.waiting.stalled(now);
            slice.recorder.by_region().iter().for_each(|of_region| all.add(of_region));
        }
        stats.stalls += stats.stalled;
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
