//! A mapping of this process. It is accessed by pointers and system calls, never by references.
#![allow(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};

/// A mapping. Dropping it unmaps the memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// A private mapping of zeros.
    ///
    /// # Errors
    /// As mmap(2).
    pub(crate) fn anonymous(len: usize) -> io::Result<Mapping> {
        Mapping::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// A shared mapping of the first `len` bytes of a file.
    ///
    /// # Errors
    /// As mmap(2).
    pub(crate) fn shared(file: std::os::fd::BorrowedFd<'_>, len: usize) -> io::Result<Mapping> {
        Mapping::map(len, libc::MAP_SHARED, std::os::fd::AsRawFd::as_raw_fd(&file))
    }

    fn map(len: usize, flags: i32, fd: i32) -> io::Result<Mapping> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Pages of a guest do not belong into a core dump. Without the advice only the dump is larger.
        // SAFETY: the advice changes no bytes of the new mapping.
        unsafe { libc::madvise(start, len, libc::MADV_DONTDUMP) };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Mapping { start, len })
    }

    /// The address of `len` bytes at `offset`. They are mapped as long as this object lives.
    pub(crate) fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset <= self.len && len <= self.len - offset, "{offset} + {len} of {}", self.len);
        // SAFETY: inside the mapping.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `map` has made this mapping, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

// SAFETY: the mapping belongs to the process, not to a thread. Each access has its own proof.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}
