//! Cuts the regions into slices, and converts between addresses, source offsets and page numbers.

use std::ops::Range;

use crate::region::{PAGE_BYTES, Region};

/// Slices are cut at addresses that are multiples of this: one page table, or one huge page.
const CUT_BYTES: u64 = 2 << 20;

/// A part of one region that belongs to one slice. Its pages have consecutive numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) host: Range<u64>,
    pub(crate) source_offset: u64,
    pub(crate) first_page: u64,
    pub(crate) slice: usize,
    /// The number of the region, in the order of addresses.
    pub(crate) region: usize,
}

/// All extents. The pages are numbered from 0 in the order of addresses.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// Sorted by address, and so by slice and by page number, too.
    extents: Vec<Extent>,
    /// Indexes of `extents`, sorted by source offset.
    by_source: Vec<usize>,
    /// For each slice, its part of `extents`.
    slices: Vec<Range<usize>>,
    page_bytes: u64,
    pages: u64,
}

/// A page: its number, its address, and the index of its extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) page: u64,
    pub(crate) host_addr: u64,
    pub(crate) extent: usize,
}

impl Layout {
    /// Cuts `regions`, which do not overlap, into at most `slices` parts of about equal size.
    pub(crate) fn cut(regions: &[Region], slices: usize) -> Layout {
        let mut regions: Vec<&Region> = regions.iter().collect();
        regions.sort_by_key(|region| region.host_addr());
        let page_bytes = regions.first().map_or(PAGE_BYTES, |region| region.page_bytes()) as u64;
        let total: u64 = regions.iter().map(|region| region.len_bytes()).sum();
        let share = total.div_ceil(slices.max(1) as u64).max(CUT_BYTES);

        let mut extents: Vec<Extent> = Vec::new();
        let (mut slice, mut in_slice, mut first_page) = (0, 0, 0);
        for (number, region) in regions.into_iter().enumerate() {
            let end = region.host_addr() + region.len_bytes();
            let mut start = region.host_addr();
            while start < end {
                if in_slice >= share {
                    (slice, in_slice) = (slice + 1, 0);
                }
                // Round the cut up, so that there are never more slices than requested.
                let cut = start
                    .saturating_add(share - in_slice)
                    .checked_next_multiple_of(CUT_BYTES.max(page_bytes))
                    .map_or(end, |cut| cut.min(end));
                extents.push(Extent {
                    host: start..cut,
                    source_offset: region.source_offset() + (start - region.host_addr()),
                    first_page,
                    slice,
                    region: number,
                });
                first_page += (cut - start) / page_bytes;
                in_slice += cut - start;
                start = cut;
            }
        }
        let count = extents.last().map_or(0, |last| last.slice + 1);
        let slices = (0..count)
            .map(|slice| {
                extents.partition_point(|extent| extent.slice < slice)
                    ..extents.partition_point(|extent| extent.slice <= slice)
            })
            .collect();
        let mut by_source: Vec<usize> = (0..extents.len()).collect();
        by_source.sort_by_key(|&index| extents[index].source_offset);
        Layout { extents, by_source, slices, page_bytes, pages: first_page }
    }

    pub(crate) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// The first page and the source offsets of each extent, sorted by source offset.
    pub(crate) fn by_source(&self) -> impl Iterator<Item = (u64, Range<u64>)> {
        self.by_source.iter().map(|&index| {
            let extent = &self.extents[index];
            let len = extent.host.end - extent.host.start;
            (extent.first_page, extent.source_offset..extent.source_offset + len)
        })
    }

    pub(crate) fn slices(&self) -> usize {
        self.slices.len()
    }

    pub(crate) fn extents_of(&self, slice: usize) -> &[Extent] {
        &self.extents[self.slices[slice].clone()]
    }

    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    pub(crate) fn extent(&self, index: usize) -> &Extent {
        &self.extents[index]
    }

    /// The page at the address.
    pub(crate) fn at_host(&self, host_addr: u64) -> Option<Place> {
        let index = self.extents.partition_point(|extent| extent.host.end <= host_addr);
        let extent = self.extents.get(index).filter(|extent| extent.host.start <= host_addr)?;
        let in_extent = (host_addr - extent.host.start) / self.page_bytes;
        Some(Place {
            page: extent.first_page + in_extent,
            host_addr: extent.host.start + in_extent * self.page_bytes,
            extent: index,
        })
    }

    /// The page with that number.
    pub(crate) fn at_page(&self, page: u64) -> Option<Place> {
        let after = self.extents.partition_point(|extent| extent.first_page <= page);
        let index = after.checked_sub(1)?;
        let extent = &self.extents[index];
        let host_addr = extent.host.start + (page - extent.first_page) * self.page_bytes;
        (host_addr < extent.host.end).then_some(Place { page, host_addr, extent: index })
    }

    /// Where the content of the page at `place` begins in the source.
    pub(crate) fn source_offset(&self, place: Place) -> u64 {
        let extent = &self.extents[place.extent];
        extent.source_offset + (place.host_addr - extent.host.start)
    }

    /// The page whose content begins at `source_offset`. `None` if no region has it, or no page begins there. `hint` is
    /// the extent to try first.
    pub(crate) fn at_source(&self, source_offset: u64, hint: usize) -> Option<Place> {
        let index = if self.extents[hint].offset_of(source_offset).is_some() {
            hint
        } else {
            let after =
                self.by_source.partition_point(|&i| self.extents[i].source_offset <= source_offset);
            self.by_source[after.checked_sub(1)?]
        };
        let extent = &self.extents[index];
        let at = extent.offset_of(source_offset)?;
        at.is_multiple_of(self.page_bytes).then(|| Place {
            page: extent.first_page + at / self.page_bytes,
            host_addr: extent.host.start + at,
            extent: index,
        })
    }

    /// The page numbers of the parts of a range of addresses that are in a slice.
    pub(crate) fn pages_in(
        &self,
        slice: usize,
        range: Range<u64>,
    ) -> impl Iterator<Item = Range<u64>> + '_ {
        let page_bytes = self.page_bytes;
        self.extents_of(slice).iter().filter_map(move |extent| {
            let start = range.start.max(extent.host.start);
            let end = range.end.min(extent.host.end);
            (start < end).then(|| {
                let first = extent.first_page + (start - extent.host.start) / page_bytes;
                let last = extent.first_page + (end - extent.host.start).div_ceil(page_bytes);
                first..last
            })
        })
    }
}

impl Extent {
    /// The number of its last page plus one.
    pub(crate) fn end_page(&self, page_bytes: u64) -> u64 {
        self.first_page + (self.host.end - self.host.start) / page_bytes
    }

    /// The distance of the source offset from the start of the extent.
    fn offset_of(&self, source_offset: u64) -> Option<u64> {
        let at = source_offset.checked_sub(self.source_offset)?;
        (at < self.host.end - self.host.start).then_some(at)
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn region(host_addr: u64, len: u64, source_offset: u64) -> Region {
        // SAFETY: no pager is started with it.
        unsafe { Region::new(host_addr, len, 4096, source_offset) }.expect("whole pages")
    }

    #[test]
    fn slices_are_cut_at_two_mib() {
        let layout = Layout::cut(&[region(3 * MIB, 9 * MIB, 0)], 2);
        let ends: Vec<_> = (0..2).map(|s| layout.extents_of(s)[0].host.clone()).collect();
        assert_eq!(ends, [3 * MIB..8 * MIB, 8 * MIB..12 * MIB]);
        assert_eq!(layout.pages(), 9 * 256);
    }

    #[test]
    fn small_memory_gets_fewer_slices() {
        assert_eq!(Layout::cut(&[region(MIB, 8192, 0)], 4).slices(), 1);
        assert_eq!(Layout::cut(&[region(2 * MIB, 4 * MIB, 0)], 8).slices(), 2);
    }

    proptest! {
        #[test]
        fn every_page_is_in_exactly_one_extent_and_found_both_ways(
            lens in prop::collection::vec(1u64..3000, 1..5),
            gaps in prop::collection::vec(0u64..700, 5),
            slices in 1usize..6,
            reversed: bool,
        ) {
            let mut host = 16 * MIB;
            let mut offset = 0;
            let mut regions = Vec::new();
            for (len, gap) in lens.iter().zip(&gaps) {
                let source = if reversed { 1 << 40 } else { 0 } + offset;
                regions.push(region(host, len * 4096, source));
                host += (len + gap) * 4096;
                offset += len * 4096;
            }
            if reversed {
                regions.reverse();
            }
            let layout = Layout::cut(&regions, slices);
            prop_assert!(layout.slices() <= slices);
            prop_assert_eq!(layout.pages(), lens.iter().sum::<u64>());
            let mut seen = vec![false; layout.pages() as usize];
            for region in &regions {
                for at in (0..region.len_bytes()).step_by(4096) {
                    let place = layout.at_host(region.host_addr() + at + 17).expect("in the region");
                    prop_assert_eq!(place.host_addr, region.host_addr() + at);
                    prop_assert_eq!(layout.at_page(place.page), Some(place));
                    let hint = (at as usize / 4096) % layout.extents.len();
                    prop_assert_eq!(layout.at_source(region.source_offset() + at, hint), Some(place));
                    prop_assert!(!std::mem::replace(&mut seen[place.page as usize], true));
                }
            }
            prop_assert!(layout.at_host(host + 4096).is_none());
            prop_assert!(layout.at_page(layout.pages()).is_none());
            prop_assert!(layout.at_source(3, 0).is_none());
            prop_assert!(layout.at_source(2 << 40, 0).is_none());
            let in_slices: u64 = (0..layout.slices())
                .flat_map(|slice| layout.pages_in(slice, 0..u64::MAX))
                .map(|pages| pages.end - pages.start)
                .sum();
            prop_assert_eq!(in_slices, layout.pages());
        }
    }
}
