//! The guest's memory regions, and the source space they make when laid end to end.

use crate::error::{Corruption, Part, Problem, WriteError};
use crate::layout::{MAX_MEMORY_BYTES, PAGE_BYTES, REGION_RECORD_BYTES, max_regions, put, u64_at};
use crate::section::SectionKind;

/// A contiguous range of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Length in bytes, a multiple of 4096.
    pub len: u64,
    /// Offset of its first byte in the source space: the lengths of the regions before it.
    pub source_offset: u64,
}

/// Checks that the regions are whole pages, ascend without overlap and fill the source space. Returns the size of
/// memory in bytes, or the first wrong region and its error.
fn check(regions: &[MemoryRegion]) -> Result<u64, (usize, &'static str)> {
    let page = PAGE_BYTES as u64;
    let (mut gpa_free_from, mut memory_bytes) = (0, 0u64);
    for (number, region) in regions.iter().enumerate() {
        if region.len == 0 || !region.len.is_multiple_of(page) || !region.gpa.is_multiple_of(page) {
            return Err((number, "not whole pages"));
        }
        if region.gpa < gpa_free_from {
            return Err((number, "overlaps or precedes the region before it"));
        }
        if region.source_offset != memory_bytes {
            return Err((number, "source offset is not the sum of the lengths before it"));
        }
        memory_bytes = memory_bytes.saturating_add(region.len);
        if memory_bytes > MAX_MEMORY_BYTES {
            return Err((number, "more than 16 TiB in all"));
        }
        gpa_free_from = region.gpa.checked_add(region.len).ok_or((number, "ends above 2^64"))?;
    }
    Ok(memory_bytes)
}

/// Checks a writer's regions. Returns the size of memory in bytes.
pub(crate) fn validate(regions: &[MemoryRegion]) -> Result<u64, WriteError> {
    let memory_bytes = check(regions).map_err(|(index, problem)| WriteError::Regions {
        index,
        gpa: regions[index].gpa,
        problem,
    })?;
    let (found, max) = (regions.len() as u64, max_regions(memory_bytes));
    if found == 0 || found > max {
        return Err(WriteError::Limit { what: "the number of memory regions", min: 1, max, found });
    }
    Ok(memory_bytes)
}

pub(crate) fn encode(regions: &[MemoryRegion]) -> Vec<u8> {
    let mut bytes = vec![0; regions.len() * REGION_RECORD_BYTES];
    for (record, region) in bytes.chunks_exact_mut(REGION_RECORD_BYTES).zip(regions) {
        put(record, 0, &region.gpa.to_le_bytes());
        put(record, 8, &region.len.to_le_bytes());
        put(record, 16, &region.source_offset.to_le_bytes());
    }
    bytes
}

/// Parses a memory map with a correct checksum.
pub(crate) fn parse(
    bytes: &[u8],
    offset: u64,
    memory_bytes: u64,
) -> Result<Vec<MemoryRegion>, Corruption> {
    let corrupt =
        |at, problem| Corruption::new(Part::Section(SectionKind::MEMORY_MAP), at, problem);
    let regions: Vec<_> = bytes
        .chunks_exact(REGION_RECORD_BYTES)
        .map(|record| MemoryRegion {
            gpa: u64_at(record, 0),
            len: u64_at(record, 8),
            source_offset: u64_at(record, 16),
        })
        .collect();
    let total = check(&regions).map_err(|(number, _)| {
        let region = regions[number];
        corrupt(
            offset + (number * REGION_RECORD_BYTES) as u64,
            Problem::Region {
                gpa: region.gpa,
                len: region.len,
                source_offset: region.source_offset,
            },
        )
    })?;
    if total != memory_bytes {
        return Err(corrupt(
            offset,
            Problem::Field { field: "sum of region.len", expected: memory_bytes, found: total },
        ));
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(gpa: u64, len: u64, source_offset: u64) -> MemoryRegion {
        MemoryRegion { gpa, len, source_offset }
    }

    #[test]
    fn a_guest_with_a_hole_below_4_gib() {
        let regions = [region(0, 3 << 30, 0), region(4 << 30, 1 << 30, 3 << 30)];
        assert_eq!(validate(&regions).unwrap(), 4 << 30);
        assert_eq!(parse(&encode(&regions), 0, 4 << 30).unwrap(), regions);
    }

    /// A number of regions of this length, with gaps of the same length.
    fn scattered(regions: u64, len: u64) -> Vec<MemoryRegion> {
        (0..regions).map(|number| region(2 * number * len, len, number * len)).collect()
    }

    #[test]
    fn the_bound_grows_with_memory() {
        let (page, block) = (PAGE_BYTES as u64, 2 << 20);
        assert_eq!(validate(&scattered(1024, page)).unwrap(), 1024 * page);
        let too_many = validate(&scattered(1025, page)).unwrap_err().to_string();
        assert_eq!(too_many, "the number of memory regions is 1025, allowed are 1 to 1024");
        assert_eq!(validate(&scattered(5000, block)).unwrap(), 5000 * block);
        assert!(validate(&scattered(5000, block - page)).is_err());
        let regions = scattered(5000, block);
        assert_eq!(parse(&encode(&regions), 0, 5000 * block).unwrap(), regions);
    }

    #[test]
    fn bad_maps_are_refused() {
        let page = PAGE_BYTES as u64;
        for bad in [
            vec![],
            vec![region(0, 0, 0)],
            vec![region(1, page, 0)],
            vec![region(0, page + 1, 0)],
            vec![region(0, page, page)],
            vec![region(0, 2 * page, 0), region(page, page, 2 * page)],
            vec![region(0, !(page - 1), 0)],
            vec![region(!(page - 1), page, 0)],
        ] {
            assert!(validate(&bad).is_err(), "{bad:?}");
        }
    }
}
