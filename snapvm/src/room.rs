//! Checks that the limits of the process (RLIMIT_AS, RLIMIT_DATA) leave address space for an operation.
//!
//! A failed allocation in Rust ends the process, and with it a running guest. So large allocations are tried
//! beforehand.

use std::io;

use snapfmt::WriteOptions;
use snapfmt::layout::PAGE_BYTES;
use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionError;

/// The address space of a thread: its stack, and what the allocator reserves for it.
pub const THREAD_BYTES: usize = 8 << 20;

/// The address space that a guest needs besides its memory: for threads, and the pager's buffers.
const GUEST_BYTES: u64 = 24 << 20;

/// Maps `bytes` of memory and unmaps them again.
///
/// # Errors
/// The error of mmap(2).
pub fn check(bytes: usize) -> io::Result<()> {
    match MmapRegion::<()>::new(bytes) {
        Ok(_unused) => Ok(()),
        Err(MmapRegionError::Mmap(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// The address space that a guest needs, in bytes.
pub(crate) fn of_guest(memory_bytes: u64) -> usize {
    usize::try_from(memory_bytes.saturating_add(GUEST_BYTES)).unwrap_or(usize::MAX)
}

/// The address space that a writer needs at most for `data_bytes` of memory: see [`snapfmt::write_snapshot`].
pub(crate) fn of_writer(options: &WriteOptions, data_bytes: u64, read_once: bool) -> usize {
    // Results and buffers have a fixed size. The memory of a compressor grows with the chunk.
    let thread = THREAD_BYTES + (14 << 20) + 24 * options.chunk_pages * PAGE_BYTES;
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    // The index, and a table of pages, which exists twice while it grows.
    let pages = data_bytes / PAGE_BYTES as u64;
    // A longer hash identifies a page that is read once.
    let entry_bytes = if read_once { 112 } else { 48 };
    let tables = pages * 8 + pages.min(1 << 20) * entry_bytes;
    thread * options.threads.get().min(4 * cpus) + usize::try_from(tables).unwrap_or(usize::MAX / 2)
}

/// The address space that a window needs at most: copies of pages, a byte for each page, and a thread.
pub(crate) fn of_window(staging_bytes: usize, memory_bytes: u64) -> usize {
    let pages = usize::try_from(memory_bytes / PAGE_BYTES as u64).unwrap_or(usize::MAX / 4);
    // An allocator rounds up.
    (staging_bytes + staging_bytes / 4).saturating_add(pages).saturating_add(THREAD_BYTES)
}

/// The address space for `bytes` of pages that are allocated one by one, with what an allocator and a table need for each.
pub(crate) fn of_kept_pages(bytes: usize) -> usize {
    bytes + bytes / 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_address_space_is_an_error() {
        check(1 << 20).expect("1 MiB can be mapped");
        // This is more than the address space.
        let error = check(1 << 50).expect_err("it is too much");
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory, "{error}");
    }
}
