//! The demo guest: a guest that needs no kernel, and that detects when its memory has changed.
//!
//! It fills a working area with a mix of content like a real guest's, writes
//!
//! ```text
//! ready memory=128 work=32 pages=7196
//! ```
//!
//! to the serial port (sizes are in MiB, and the pages are those that are not zero). Then it runs one beat after
//! the other until it is stopped. Each beat walks a share of those pages, by default a quarter, scattered but in a
//! fixed order. It checks every word of them, rewrites one page in eight with words that depend on the number
//! of the beat, checks a few pages that must be zero, and writes one line:
//!
//! ```text
//! beat 1 ok
//! beat 2 BAD page=00000000000004d2
//! ```
//!
//! So the next beat detects a page that is lost, stale or foreign. The guest uses no interrupts and no clock, so
//! its memory after N beats is the same in every run, and [`page_bytes`] computes it.
//!
//! It works in ring 3, which runs natively even on hosts whose KVM emulates ring 0. Half of the working area is
//! at the bottom of guest memory and half at the very top, so that guests with more than 3 GiB use both memory
//! regions. The cost of booting depends on the working area, not on memory.

pub(crate) mod content;

use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

pub use crate::layout::PAGE_BYTES;
pub use content::{PageClass, WALKED_OF_256, in_working_set, page_bytes, page_class, page_version};

use crate::arch::{MAPPED_GIB_MAX, Mapping, PROGRAM_PARAMS_GPA, demo_guest_code, load_program};
use crate::layout::{LARGE_PAGE_BYTES, MemoryRange};

/// The working area is a multiple of this: each of its halves is made of large pages.
pub const WORK_ALIGN_BYTES: u64 = 2 * LARGE_PAGE_BYTES;
/// The largest working area that the page tables can map.
pub const WORK_MAX_BYTES: u64 = (MAPPED_GIB_MAX - 1) << 30;

/// Guest virtual address of the working area.
pub(crate) const WORK_VIRT: u64 = 1 << 30;
/// A prime above any number of pages: as the step of a walk it reaches each of them once.
const STRIDE: u64 = 2_654_435_761;

/// The configuration of the demo guest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DemoConfig {
    /// Size of the working area in bytes: a multiple of [`WORK_ALIGN_BYTES`].
    pub work_bytes: u64,
    /// How many of 256 pages that are not zero each beat reads: 1 to 256.
    pub walked_of_256: u32,
}

impl DemoConfig {
    /// A guest with a working area of this size, of which each beat reads a quarter.
    #[must_use]
    pub fn new(work_bytes: u64) -> DemoConfig {
        DemoConfig { work_bytes, walked_of_256: WALKED_OF_256 }
    }

    /// Sets [`DemoConfig::walked_of_256`].
    #[must_use]
    pub fn walked_of_256(mut self, walked_of_256: u32) -> DemoConfig {
        self.walked_of_256 = walked_of_256;
        self
    }
}

/// A working area that the guest cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// Not a multiple of [`WORK_ALIGN_BYTES`], or nothing.
    #[error(
        "working area of {work_bytes} bytes is not a positive multiple of {WORK_ALIGN_BYTES} bytes (4 MiB)"
    )]
    Unaligned {
        /// The requested size.
        work_bytes: u64,
    },
    /// Not a number of pages of 256.
    #[error("a beat cannot read {walked_of_256} of 256 pages: give 1 to 256")]
    Walk {
        /// The requested number.
        walked_of_256: u32,
    },
    /// Memory has no room for it.
    #[error(
        "working area of {work_bytes} bytes does not fit: a guest with {memory_bytes} bytes of memory \
         has room for {max_bytes}"
    )]
    TooLarge {
        /// The requested size.
        work_bytes: u64,
        /// Size of guest memory.
        memory_bytes: u64,
        /// Largest working area for it.
        max_bytes: u64,
    },
}

/// Where the working area is in guest physical memory: the pages of the first half, then the second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DemoPlan {
    work_bytes: u64,
    walked_of_256: u32,
    memory_bytes: u64,
    low: Range<u64>,
    high: Range<u64>,
}

impl DemoPlan {
    /// Places the working area in memory of the given layout.
    ///
    /// # Errors
    /// [`DemoError`] when its size is not a multiple of 4 MiB or it does not fit.
    pub fn new(config: &DemoConfig, memory: &[MemoryRange]) -> Result<DemoPlan, DemoError> {
        let DemoConfig { work_bytes, walked_of_256 } = *config;
        if !(1..=256).contains(&walked_of_256) {
            return Err(DemoError::Walk { walked_of_256 });
        }
        if work_bytes == 0 || !work_bytes.is_multiple_of(WORK_ALIGN_BYTES) {
            return Err(DemoError::Unaligned { work_bytes });
        }
        let memory_bytes = memory.iter().map(|range| range.len).sum();
        let max_bytes = max_work_bytes(memory);
        if work_bytes > max_bytes {
            return Err(DemoError::TooLarge { work_bytes, memory_bytes, max_bytes });
        }
        let half = work_bytes / 2;
        let end = memory.last().map_or(0, |last| last.gpa_range().end);
        Ok(DemoPlan {
            work_bytes,
            walked_of_256,
            memory_bytes,
            low: LARGE_PAGE_BYTES..LARGE_PAGE_BYTES + half,
            high: end - half..end,
        })
    }

    /// Number of pages in the working area.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.work_bytes / PAGE_BYTES
    }

    /// Guest physical address of a page of the working area.
    #[must_use]
    pub fn page_gpa(&self, page: u64) -> u64 {
        let offset = page * PAGE_BYTES;
        let half = self.work_bytes / 2;
        if offset < half { self.low.start + offset } else { self.high.start + (offset - half) }
    }

    /// The guest physical addresses that the guest uses: its code, its tables and the working area.
    pub(crate) fn touched(&self) -> Vec<Range<u64>> {
        vec![0..self.low.end, self.high.clone()]
    }

    /// Writes code, parameters and tables into memory that is otherwise zero.
    pub(crate) fn load(&self, memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
        let half = self.work_bytes / 2;
        let mappings = [
            Mapping { virt: 0, gpa: 0, len: LARGE_PAGE_BYTES },
            Mapping { virt: WORK_VIRT, gpa: self.low.start, len: half },
            Mapping { virt: WORK_VIRT + half, gpa: self.high.start, len: half },
        ];
        load_program(memory, demo_guest_code(), &mappings)?;
        let params = [
            self.pages(),
            STRIDE % self.pages(),
            self.memory_bytes >> 20,
            self.work_bytes >> 20,
            u64::from(self.walked_of_256),
        ];
        for (index, param) in params.into_iter().enumerate() {
            memory.write_obj(param, GuestAddress(PROGRAM_PARAMS_GPA + 8 * index as u64))?;
        }
        Ok(())
    }
}

/// Largest working area for a memory layout, in bytes.
#[must_use]
pub fn max_work_bytes(memory: &[MemoryRange]) -> u64 {
    let half = match memory {
        [] => 0,
        // Both halves share what the first large page leaves.
        [only] => only.len.saturating_sub(LARGE_PAGE_BYTES) / 2,
        [first, .., last] => first.len.saturating_sub(LARGE_PAGE_BYTES).min(last.len),
    };
    (2 * (half - half % LARGE_PAGE_BYTES)).min(WORK_MAX_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::PROGRAM_MAX_BYTES;
    use crate::layout::memory_layout;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_code_fits_at_its_place() {
        assert!((256..=PROGRAM_MAX_BYTES).contains(&demo_guest_code().len()));
    }

    #[test]
    fn halves_are_at_both_ends_of_memory() {
        let plan =
            DemoPlan::new(&DemoConfig::new(32 << 20), &memory_layout(4 * GIB).unwrap()).unwrap();
        assert_eq!(plan.page_gpa(0), 2 << 20);
        assert_eq!(plan.page_gpa(4095), (18 << 20) - 4096);
        assert_eq!(plan.page_gpa(4096), 5 * GIB - (16 << 20));
        assert_eq!(plan.page_gpa(8191), 5 * GIB - 4096);
    }

    #[test]
    fn the_walk_reaches_every_page() {
        for pages in [1024, 3 * 1024, 5 * 7 * 1024] {
            let (mut page, mut seen) = (0, vec![false; pages as usize]);
            for _ in 0..pages {
                page = (page + STRIDE % pages) % pages;
                assert!(!std::mem::replace(&mut seen[page as usize], true));
            }
        }
        const { assert!(WORK_MAX_BYTES / PAGE_BYTES < STRIDE) };
    }

    #[test]
    fn impossible_working_areas_are_named() {
        let memory = memory_layout(64 << 20).unwrap();
        let plan = |work_bytes| DemoPlan::new(&DemoConfig::new(work_bytes), &memory);
        assert_eq!(plan(0), Err(DemoError::Unaligned { work_bytes: 0 }));
        assert_eq!(plan(6 << 20), Err(DemoError::Unaligned { work_bytes: 6 << 20 }));
        assert!(plan(60 << 20).is_ok());
        let error = plan(64 << 20).unwrap_err();
        assert_eq!(
            error,
            DemoError::TooLarge {
                work_bytes: 64 << 20,
                memory_bytes: 64 << 20,
                max_bytes: 60 << 20
            }
        );
        // 2 MiB above the hole: that is the second half.
        let memory = memory_layout(3 * GIB + (2 << 20)).unwrap();
        assert_eq!(max_work_bytes(&memory), 4 << 20);
    }
}
