//! Whether there is memory for what is about to be done, where a limit (RLIMIT_AS, RLIMIT_DATA) may say no.
//!
//! An allocation that fails ends the process, and with it a guest that runs: so it is tried before.

use std::io;

use snapfmt::WriteOptions;
use snapfmt::layout::PAGE_BYTES;
use vm_memory::MmapRegion;

/// Of a thread: its stack, and what the allocator takes for it.
pub(crate) const THREAD_BYTES: usize = 8 << 20;

/// Tells whether so much memory may be had.
///
/// # Errors
/// Of mmap(2).
pub(crate) fn check(bytes: usize) -> io::Result<()> {
    match MmapRegion::<()>::new(bytes) {
        Ok(_unused) => Ok(()),
        Err(vm_memory::mmap::MmapRegionError::Mmap(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Beside a guest's memory: threads, and what a pager reads into.
const GUEST_BYTES: u64 = 24 << 20;

/// As much as a guest with so much memory needs.
pub(crate) fn of_guest(memory_bytes: u64) -> usize {
    usize::try_from(memory_bytes.saturating_add(GUEST_BYTES)).unwrap_or(usize::MAX)
}

/// As much as a writer needs for `data_bytes` of memory, at most: see [`snapfmt::write_snapshot`].
pub(crate) fn of_writer(options: &WriteOptions, data_bytes: u64) -> usize {
    // Results under way and buffers; what a compressor has beside them grows with the chunk.
    let thread = THREAD_BYTES + (14 << 20) + 24 * options.chunk_pages * PAGE_BYTES;
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    // The index, and a table of pages, which holds its old and its new half when it grows.
    let pages = data_bytes / PAGE_BYTES as u64;
    let tables = pages * 8 + pages.min(1 << 20) * 48;
    thread * options.threads.get().min(4 * cpus) + usize::try_from(tables).unwrap_or(usize::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_had_is_an_error() {
        check(1 << 20).unwrap();
        // More than there are addresses.
        let error = check(1 << 50).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "{error}");
    }
}
