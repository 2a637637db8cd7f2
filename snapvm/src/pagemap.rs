//! Finds the pages of guest memory that only this process has.

use std::ops::Range;

use pager::Pagemap;
use snapfmt::MemoryRegion;
use snapfmt::layout::PAGE_BYTES;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::MemoryError;

/// The ranges of source offsets whose pages only this process has, in memory or swapped out. All other pages of a
/// private mapping have the content of the mapped file, or are zero. Where pages are installed by userfaultfd, these
/// ranges also have the kernel's zero pages, which use no memory: /proc/self/pagemap does not tell them apart.
pub(crate) fn private_pages(
    memory: &GuestMemoryMmap,
    regions: &[MemoryRegion],
) -> Result<Vec<Range<u64>>, MemoryError> {
    let mut pagemap =
        Pagemap::open().map_err(MemoryError::system("cannot open /proc/self/pagemap"))?;
    let mut own: Vec<Range<u64>> = Vec::new();
    for region in regions {
        let mapped = memory
            .iter()
            .find(|mapped| mapped.start_addr().0 == region.gpa && mapped.len() == region.len);
        let mapped = mapped.ok_or(MemoryError::Layout)?;
        let (start, end) = (region.source_offset, region.source_offset + region.len);
        for from in (start..end).step_by(Pagemap::MAX_PAGES * PAGE_BYTES) {
            let pages = ((end - from) as usize / PAGE_BYTES).min(Pagemap::MAX_PAGES);
            let entries = pagemap
                .entries(mapped.as_ptr() as u64 + (from - start), pages)
                .map_err(MemoryError::system("cannot read /proc/self/pagemap"))?;
            for (at, entry) in (from..).step_by(PAGE_BYTES).zip(entries) {
                if entry.is_private() {
                    match own.last_mut() {
                        Some(last) if last.end == at => last.end += PAGE_BYTES as u64,
                        _ => own.push(at..at + PAGE_BYTES as u64),
                    }
                }
            }
        }
    }
    Ok(own)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::{guest_memory, memory_map::to_regions};

    #[test]
    fn written_pages_are_found() {
        let ranges = vmm::memory_layout(4 << 30).unwrap();
        let memory = guest_memory::private(&ranges).unwrap();
        let regions = to_regions(&ranges);
        assert!(private_pages(&memory, &regions).unwrap().is_empty());
        memory.write_slice(&[1], GuestAddress(4096 * 5)).unwrap();
        memory.write_slice(&[1], GuestAddress((4 << 30) + 4096)).unwrap();
        let own = private_pages(&memory, &regions).unwrap();
        // Above the hole at 3 GiB, guest addresses and source offsets differ by 1 GiB.
        for offset in [4096 * 5, (3 << 30) + 4096] {
            assert!(own.iter().any(|range| range.contains(&offset)), "{own:?}");
        }
        let bytes: u64 = own.iter().map(|range| range.end - range.start).sum();
        assert!(bytes <= 4 << 20, "{own:?}");
    }
}
