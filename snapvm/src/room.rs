//! Whether there is address space for what comes next, where a limit (RLIMIT_AS, RLIMIT_DATA) may refuse it.
//!
//! A failed allocation in Rust ends the process, and with it a running guest. So large needs are tried beforehand.

use std::io;

use snapfmt::WriteOptions;
use snapfmt::layout::PAGE_BYTES;
use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionError;

/// Of a thread: its stack, and what the allocator takes for it.
pub const THREAD_BYTES: usize = 8 << 20;

/// Beside a guest's memory: threads, and the pager's buffers.
const GUEST_BYTES: u64 = 24 << 20;

/// Maps so many bytes and unmaps them again.
///
/// # Errors
/// As mmap(2).
pub fn check(bytes: usize) -> io::Result<()> {
    match MmapRegion::<()>::new(bytes) {
        Ok(_unused) => Ok(()),
        Err(MmapRegionError::Mmap(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// What a guest with so much memory needs.
pub(crate) fn of_guest(memory_bytes: u64) -> usize {
    usize::try_from(memory_bytes.saturating_add(GUEST_BYTES)).unwrap_or(usize::MAX)
}

/// What a writer needs for `data_bytes` of memory, at most: see [`snapfmt::write_snapshot`].
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
        check(1 << 20).expect("a MiB is there");
        // More than there are addresses.
        let error = check(1 << 50).expect_err("it is too much");
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory, "{error}");
    }
}
