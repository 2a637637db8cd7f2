//! Where guest memory is in the guest's physical address space.
//!
//! RAM begins at address 0. A PC keeps the last gigabyte below 4 GiB for devices (the local APIC at
//! 0xfee0_0000 and the IOAPIC at 0xfec0_0000 among them), so RAM that does not fit below 3 GiB
//! continues at 4 GiB:
//!
//! ```text
//! gpa            0               3 GiB      4 GiB                      4 GiB + (size - 3 GiB)
//!                |  region 0     | MMIO hole |  region 1                |
//! source_offset  0               3 GiB                                 size
//! ```

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use crate::arch::{MMIO_HOLE_END, MMIO_HOLE_START};

/// Size of a page in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// Memory sizes, region borders and memory slots are multiples of this: one large page.
pub const LARGE_PAGE_BYTES: u64 = 2 << 20;
/// Memory of the smallest guest: one large page for the payload's tables and one for everything else.
pub const MEMORY_MIN_BYTES: u64 = 2 * LARGE_PAGE_BYTES;
/// Memory of the largest guest.
pub const MEMORY_MAX_BYTES: u64 = 1 << 40;

/// A run of guest RAM, and where its bytes are when all runs are written one after the other.
///
/// All three fields are in bytes and multiples of [`LARGE_PAGE_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRange {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset of the first byte in the concatenation of all ranges.
    pub source_offset: u64,
}

impl MemoryRange {
    /// Guest physical addresses of this range.
    #[must_use]
    pub fn gpa_range(&self) -> Range<u64> {
        self.gpa..self.gpa + self.len
    }
}

/// A memory size that no guest can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Guest memory comes in large pages.
    #[error("memory of {memory_bytes} bytes is not a multiple of {LARGE_PAGE_BYTES} bytes (2 MiB)")]
    Unaligned {
        /// The requested size.
        memory_bytes: u64,
    },
    /// Less than [`MEMORY_MIN_BYTES`].
    #[error(
        "memory of {memory_bytes} bytes is below the minimum of {MEMORY_MIN_BYTES} bytes (4 MiB)"
    )]
    TooSmall {
        /// The requested size.
        memory_bytes: u64,
    },
    /// More than [`MEMORY_MAX_BYTES`].
    #[error(
        "memory of {memory_bytes} bytes is above the maximum of {MEMORY_MAX_BYTES} bytes (1 TiB)"
    )]
    TooLarge {
        /// The requested size.
        memory_bytes: u64,
    },
}

/// The ranges of a guest with `memory_bytes` of RAM, by rising address: one, or two when the RAM
/// does not fit below the MMIO hole.
///
/// # Errors
/// [`LayoutError`] when the size is not a multiple of 2 MiB between 4 MiB and 1 TiB.
pub fn memory_layout(memory_bytes: u64) -> Result<Vec<MemoryRange>, LayoutError> {
    if memory_bytes < MEMORY_MIN_BYTES {
        return Err(LayoutError::TooSmall { memory_bytes });
    }
    if memory_bytes > MEMORY_MAX_BYTES {
        return Err(LayoutError::TooLarge { memory_bytes });
    }
    if !memory_bytes.is_multiple_of(LARGE_PAGE_BYTES) {
        return Err(LayoutError::Unaligned { memory_bytes });
    }
    let low_bytes = memory_bytes.min(MMIO_HOLE_START);
    let mut ranges = vec![MemoryRange { gpa: 0, len: low_bytes, source_offset: 0 }];
    if memory_bytes > low_bytes {
        ranges.push(MemoryRange {
            gpa: MMIO_HOLE_END,
            len: memory_bytes - low_bytes,
            source_offset: low_bytes,
        });
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_below_the_hole_is_one_range() {
        for size in [MEMORY_MIN_BYTES, 64 << 20, 3 * GIB] {
            let ranges = memory_layout(size).unwrap();
            assert_eq!(ranges, [MemoryRange { gpa: 0, len: size, source_offset: 0 }]);
        }
    }

    #[test]
    fn memory_that_meets_the_hole_continues_above_it() {
        let size = 3 * GIB + LARGE_PAGE_BYTES;
        assert_eq!(
            memory_layout(size).unwrap(),
            [
                MemoryRange { gpa: 0, len: 3 * GIB, source_offset: 0 },
                MemoryRange { gpa: 4 * GIB, len: LARGE_PAGE_BYTES, source_offset: 3 * GIB },
            ]
        );
        let total: u64 = memory_layout(MEMORY_MAX_BYTES).unwrap().iter().map(|r| r.len).sum();
        assert_eq!(total, MEMORY_MAX_BYTES);
    }

    #[test]
    fn impossible_sizes_are_named() {
        assert_eq!(memory_layout(0), Err(LayoutError::TooSmall { memory_bytes: 0 }));
        assert_eq!(
            memory_layout((64 << 20) + 4096),
            Err(LayoutError::Unaligned { memory_bytes: (64 << 20) + 4096 })
        );
        assert_eq!(memory_layout(u64::MAX), Err(LayoutError::TooLarge { memory_bytes: u64::MAX }));
    }
}
