//! Translates source offsets (the order of the snapshot file) to guest physical addresses.

use std::ops::Range;

use snapfmt::MemoryRegion;
use vmm::MemoryRange;

/// The guest physical ranges of a range of source offsets. `regions` ascend by source offset.
pub fn gpa_ranges(
    regions: &[MemoryRegion],
    source: Range<u64>,
) -> impl Iterator<Item = Range<u64>> + '_ {
    let first = regions.partition_point(|r| r.source_offset + r.len <= source.start);
    let in_source = regions[first..].iter().take_while(move |r| r.source_offset < source.end);
    in_source.filter_map(move |region| {
        let start = source.start.max(region.source_offset);
        let end = source.end.min(region.source_offset + region.len);
        let to_gpa = |offset: u64| region.gpa + (offset - region.source_offset);
        (start < end).then(|| to_gpa(start)..to_gpa(end))
    })
}

/// A snapshot's memory map in the VMM's type.
#[must_use]
pub fn to_ranges(regions: &[MemoryRegion]) -> Vec<MemoryRange> {
    let to_range =
        |r: &MemoryRegion| MemoryRange { gpa: r.gpa, len: r.len, source_offset: r.source_offset };
    regions.iter().map(to_range).collect()
}

/// The VMM's memory layout in the snapshot's type.
#[must_use]
pub fn to_regions(ranges: &[MemoryRange]) -> Vec<MemoryRegion> {
    let to_region =
        |r: &MemoryRange| MemoryRegion { gpa: r.gpa, len: r.len, source_offset: r.source_offset };
    ranges.iter().map(to_region).collect()
}

/// The source offsets of ranges of guest physical addresses, which ascend like the regions.
pub(crate) fn source_ranges(regions: &[MemoryRegion], gpas: &[Range<u64>]) -> Vec<Range<u64>> {
    let in_region = |range: &Range<u64>| {
        let (start, end) = (range.start, range.end);
        regions.iter().filter_map(move |region| {
            let (start, end) = (start.max(region.gpa), end.min(region.gpa + region.len));
            let offset = |gpa: u64| region.source_offset + (gpa - region.gpa);
            (start < end).then(|| offset(start)..offset(end))
        })
    };
    gpas.iter().flat_map(in_region).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_ranges_map_around_the_hole() {
        let regions = to_regions(&vmm::memory_layout(4 << 30).expect("a layout"));
        let around: Vec<_> = gpa_ranges(&regions, (3 << 30) - 4096..(3 << 30) + 4096).collect();
        assert_eq!(around, [(3 << 30) - 4096..3 << 30, 4 << 30..(4 << 30) + 4096]);
    }
}
