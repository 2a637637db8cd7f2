//! Returns guest memory to the host's kernel.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::layout::PAGE_BYTES;

/// Drops the pages that only this mapping has: `gpas`, of whole pages, then has the content of the mapped file, or zeros
/// if the memory is anonymous. Shared mappings are left out.
///
/// # Errors
/// That of madvise(2).
pub fn drop_private_pages(memory: &GuestMemoryMmap, gpas: Range<u64>) -> io::Result<()> {
    for region in memory.iter().filter(|region| region.flags() & libc::MAP_PRIVATE != 0) {
        advise(region, gpas.clone(), libc::MADV_DONTNEED)?;
    }
    Ok(())
}

/// Calls madvise(2) for the whole pages of `gpas` that are in the region. Returns how many bytes these are.
pub(crate) fn advise(
    region: &GuestRegionMmap,
    gpas: Range<u64>,
    advice: libc::c_int,
) -> io::Result<u64> {
    let (first, last) = (region.start_addr().0, region.start_addr().0 + region.len());
    let start = gpas.start.checked_next_multiple_of(PAGE_BYTES).unwrap_or(last).max(first);
    let end = gpas.end.min(last) / PAGE_BYTES * PAGE_BYTES;
    if start >= end {
        return Ok(0);
    }
    let at = region.as_ptr().wrapping_add((start - first) as usize);
    loop {
        // SAFETY: whole pages of a region that stays mapped as long as `region` lives, and to which no reference
        // exists: guest memory may change at any time. They stay mapped.
        if unsafe { libc::madvise(at.cast(), (end - start) as usize, advice) } == 0 {
            return Ok(end - start);
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return Err(error);
        }
    }
}
