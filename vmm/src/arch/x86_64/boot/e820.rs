//! The memory map that firmware would provide: which guest physical addresses are usable RAM.

use crate::arch::x86_64::address_map::{FIRMWARE_END, FIRMWARE_START};
use crate::layout::MemoryRange;

/// E820 and PVH use the same numbers: 1 is usable RAM, 2 is reserved.
pub(super) const RAM: u32 = 1;
pub(super) const RESERVED: u32 = 2;
/// The last kilobyte below the video memory belongs to a PC's BIOS, as kernels expect.
const BIOS_DATA_START: u64 = 0x9_fc00;

/// A range of addresses of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct E820Entry {
    pub(super) gpa: u64,
    pub(super) len: u64,
    pub(super) kind: u32,
}

/// The map of a guest with the given RAM.
pub(super) fn map(ranges: &[MemoryRange]) -> Vec<E820Entry> {
    let mut entries = vec![
        E820Entry { gpa: 0, len: BIOS_DATA_START, kind: RAM },
        E820Entry { gpa: FIRMWARE_START, len: FIRMWARE_END - FIRMWARE_START, kind: RESERVED },
    ];
    for range in ranges {
        let start = range.gpa.max(FIRMWARE_END);
        entries.push(E820Entry { gpa: start, len: range.gpa_range().end - start, kind: RAM });
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::memory_layout;

    #[test]
    fn ram_goes_around_the_firmware_and_the_hole() {
        let map = map(&memory_layout(4 << 30).unwrap());
        let found: Vec<_> = map.iter().map(|e| (e.gpa, e.gpa + e.len, e.kind)).collect();
        assert_eq!(
            found,
            [
                (0, 0x9_fc00, RAM),
                (0xe_0000, 0x10_0000, RESERVED),
                (0x10_0000, 3 << 30, RAM),
                (4 << 30, 5 << 30, RAM),
            ]
        );
    }
}
