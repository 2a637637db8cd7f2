//! Which pages of guest memory are this process' own: /proc/self/pagemap.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use snapfmt::MemoryRegion;
use snapfmt::layout::PAGE_BYTES;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::MemoryError;

/// Bits of an entry: Documentation/admin-guide/mm/pagemap.rst.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Of a file, or shared: nothing that this process has written into a private mapping.
const OF_FILE: u64 = 1 << 61;
const ENTRY_BYTES: usize = 8;
/// Entries read at once: 64 KiB, for 32 MiB of memory.
const ENTRIES: usize = 8192;

/// The ranges of source offsets whose pages belong to this process alone, in memory or swapped out. All other pages of a
/// private mapping have the content of what is mapped: zeros, or the pages of a file.
pub(crate) fn private_pages(
    memory: &GuestMemoryMmap,
    regions: &[MemoryRegion],
) -> Result<Vec<Range<u64>>, MemoryError> {
    let pagemap = File::open("/proc/self/pagemap")
        .map_err(MemoryError::system("cannot open /proc/self/pagemap"))?;
    let mut own: Vec<Range<u64>> = Vec::new();
    let mut entries_bytes = vec![0; ENTRIES * ENTRY_BYTES];
    for region in regions {
        let mapped = memory
            .iter()
            .find(|mapped| mapped.start_addr().0 == region.gpa && mapped.len() == region.len);
        let mapped = mapped.ok_or(MemoryError::Layout)?;
        let first = mapped.as_ptr() as u64 / PAGE_BYTES as u64;
        let pages = region.len / PAGE_BYTES as u64;
        for start in (0..pages).step_by(ENTRIES) {
            let count = (pages - start).min(ENTRIES as u64);
            let entries = &mut entries_bytes[..count as usize * ENTRY_BYTES];
            pagemap
                .read_exact_at(entries, (first + start) * ENTRY_BYTES as u64)
                .map_err(MemoryError::system("cannot read /proc/self/pagemap"))?;
            for (entry, page) in entries.as_chunks::<ENTRY_BYTES>().0.iter().zip(start..) {
                let entry = u64::from_ne_bytes(*entry);
                if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                    let at = region.source_offset + page * PAGE_BYTES as u64;
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
        let ranges = vmm::memory_layout(4 << 30).expect("it works");
        let memory = guest_memory::private(&ranges).expect("it works");
        let regions = to_regions(&ranges);
        assert!(private_pages(&memory, &regions).expect("it works").is_empty());
        memory.write_slice(&[1], GuestAddress(4096 * 5)).expect("it works");
        memory.write_slice(&[1], GuestAddress((4 << 30) + 4096)).expect("it works");
        let own = private_pages(&memory, &regions).expect("it works");
        // Above the hole at 3 GiB, guest addresses and source offsets differ by 1 GiB.
        for offset in [4096 * 5, (3 << 30) + 4096] {
            assert!(own.iter().any(|range| range.contains(&offset)), "{own:?}");
        }
        let bytes: u64 = own.iter().map(|range| range.end - range.start).sum();
        assert!(bytes <= 4 << 20, "{own:?}");
    }
}
