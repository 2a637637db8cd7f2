//! The guest-physical addresses that RAM blocks get. The file does not have them.

use std::ops::Range;

use super::stream::MappedRam;
use crate::interchange::error::LayoutError;

const GIB: u64 = 1 << 30;
/// Other blocks get addresses from here on, which no x86 or ARM processor has: they have 52 bits at most.
const OTHERS: u64 = 1 << 52;

/// Each range of guest-physical addresses with its offset in the file. `main`: those of main memory, in the order of the
/// block, if the caller knows them.
pub(in super::super) fn placed(
    mapped: &MappedRam,
    main: Option<&[Range<u64>]>,
) -> Result<Vec<(Range<u64>, u64)>, LayoutError> {
    let (mut placed, mut others) = (Vec::new(), OTHERS);
    for (number, block) in mapped.blocks.iter().enumerate() {
        if number != mapped.main() {
            placed.push((others..others + block.len_bytes, block.pages_offset));
            // At least a page is between two blocks: adjacent ranges would be one region.
            others = (others + block.len_bytes + 1).next_multiple_of(GIB);
            continue;
        }
        let own = main_ranges(&mapped.machine, block.len_bytes);
        let ranges = main.unwrap_or(&own);
        let lengths = ranges.iter().map(|range| range.end.checked_sub(range.start));
        let sum = lengths.into_iter().try_fold(0u64, |sum, len| sum.checked_add(len?));
        if sum != Some(block.len_bytes) {
            let (found_bytes, expected_bytes) = (sum.unwrap_or(u64::MAX), block.len_bytes);
            return Err(LayoutError::OtherLength { found_bytes, expected_bytes });
        }
        let mut offset = block.pages_offset;
        for range in ranges {
            placed.push((range.clone(), offset));
            offset += range.end - range.start;
        }
    }
    Ok(placed)
}

/// Where the machine has main memory, if `max-ram-below-4g` is not set: `pc_init1` in hw/i386/pc_piix.c, `pc_q35_init` in
/// hw/i386/pc_q35.c, `microvm_memory_init` in hw/i386/microvm.c. Other machines: from 0 on.
fn main_ranges(machine: &str, len_bytes: u64) -> Vec<Range<u64>> {
    // Memory of at least the first size ends at the second, and continues at 4 GiB.
    let (from_bytes, low_end) = match machine {
        name if name.starts_with("pc-i440fx") => (0xe000_0000, 3 * GIB),
        name if name.starts_with("pc-q35") => (0xb000_0000, 2 * GIB),
        "microvm" => (3 * GIB, 3 * GIB),
        _ => (u64::MAX, u64::MAX),
    };
    if len_bytes < from_bytes || len_bytes == low_end {
        return vec![0..len_bytes];
    }
    vec![0..low_end, 4 * GIB..4 * GIB + (len_bytes - low_end)]
}
