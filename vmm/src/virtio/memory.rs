//! Guest memory for a thread that must not get a SIGBUS: every access lets the kernel populate its pages first.
//!
//! A page may be missing for a while (userfaultfd) or permanently (UFFDIO_POISON, a memory error of the host).
//! An access to the latter raises SIGBUS, and a thread in the middle of a copy cannot recover from that. So
//! the few bytes of rings, descriptors and headers are accessed only after madvise(2) with
//! MADV_POPULATE_READ or MADV_POPULATE_WRITE has populated their pages. It waits for a page as the access would,
//! and returns EFAULT or EHWPOISON where the access would raise SIGBUS. Bulk data is never accessed here: system
//! calls move it between a file and guest memory, and they return EFAULT.
//!
//! One case remains: a page that becomes unreadable between the two calls. Nothing in this process removes a
//! page while a device uses it. A hardware memory error can do so, and then the process ends as any other would.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, Permissions,
};

use super::fault::Fault;
use crate::discards::Discards;
use crate::give_back::advise;
use crate::layout::PAGE_BYTES;
use crate::written::WriteLog;

/// Buffers of one system call (IOV_MAX).
const IOVECS_MAX: usize = 1024;

/// Guest memory as devices see it.
pub(super) struct DeviceMemory {
    memory: Arc<GuestMemoryMmap>,
    discards: Discards,
    writes: WriteLog,
    /// An address in the first page that could not be read. `virtio-queue` treats any error of memory as
    /// the end of a chain, so the address is recorded here.
    unreadable_gpa: Cell<Option<u64>>,
}

/// A run of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) gpa: u64,
    pub(super) len: usize,
}

/// Which way [`DeviceMemory::transfer`] moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the file into guest memory.
    ToGuest,
    /// From guest memory to the file.
    FromGuest,
}

impl DeviceMemory {
    pub(super) fn new(memory: Arc<GuestMemoryMmap>) -> DeviceMemory {
        DeviceMemory {
            memory,
            discards: Discards::default(),
            writes: WriteLog::default(),
            unreadable_gpa: Cell::new(None),
        }
    }

    /// Records what is written and discarded.
    pub(super) fn with_writes(self, writes: WriteLog) -> DeviceMemory {
        DeviceMemory { writes, ..self }
    }

    /// Asks `discards` before memory is discarded.
    pub(super) fn with_discards(self, discards: Discards) -> DeviceMemory {
        DeviceMemory { discards, ..self }
    }

    /// A fault if a page could not be read since this was created.
    pub(super) fn check(&self) -> Result<(), Fault> {
        match self.unreadable_gpa.get() {
            Some(gpa) => Err(Fault::Unreadable { gpa: Some(gpa) }),
            None => Ok(()),
        }
    }

    /// Whether all of it is RAM.
    pub(super) fn is_ram(&self, segment: Segment) -> bool {
        GuestMemoryBackend::check_range(&*self.memory, GuestAddress(segment.gpa), segment.len)
    }

    /// Moves all bytes between the segments, in order, and `fd`. With an `offset`, `fd` is a file. Without one, it
    /// is a socket or a tap, and a single call moves as many bytes as it can. Returns the number of bytes moved;
    /// for a file it is smaller than the total only at the end of the file.
    ///
    /// # Errors
    /// `Err(Fault)` for a page that cannot be read; `Ok(Err)` for every error of the file.
    pub(super) fn transfer(
        &self,
        fd: BorrowedFd<'_>,
        offset: Option<u64>,
        segments: &[Segment],
        direction: Direction,
    ) -> Result<io::Result<usize>, Fault> {
        let mut iovecs = self.iovecs(segments)?;
        if direction == Direction::ToGuest {
            for segment in segments {
                self.writes.note(segment.gpa..segment.gpa.saturating_add(segment.len as u64));
            }
        }
        let mut rest = iovecs.as_mut_slice();
        let mut done = 0;
        while !rest.is_empty() {
            let moved = match one_transfer(fd, offset.map(|at| at + done as u64), rest, direction) {
                Ok(0) => break,
                Ok(moved) => moved,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    Some(libc::EFAULT | libc::EHWPOISON) => {
                        return Err(Fault::Unreadable { gpa: gpa_at(segments, done) });
                    }
                    _ => return Ok(Err(error)),
                },
            };
            done += moved;
            if offset.is_none() {
                break;
            }
            rest = advance(rest, moved);
        }
        Ok(Ok(done))
    }

    /// Discards the whole pages of a segment: they read as zeros from now on, and use no memory until they are
    /// written, unless discards are held. Returns the number of bytes. Private mappings of a file are left out, because the content of the
    /// file would appear there instead of zeros.
    pub(super) fn discard(&self, segment: Segment) -> u64 {
        self.discards.unless_held(|| self.discard_now(segment))
    }

    fn discard_now(&self, segment: Segment) -> u64 {
        let gpas = segment.gpa..segment.gpa.saturating_add(segment.len as u64);
        self.writes.note(gpas.clone());
        let mut discarded = 0;
        for region in self.memory.iter() {
            let advice = match (region.file_offset(), region.flags() & libc::MAP_SHARED != 0) {
                (None, false) => libc::MADV_DONTNEED,
                (Some(_), true) => libc::MADV_REMOVE,
                _ => continue,
            };
            // What the kernel does not take back stays as it is.
            discarded += advise(region, gpas.clone(), advice).unwrap_or(0);
        }
        discarded
    }

    /// The addresses of the segments in this process. Only the kernel dereferences these pointers.
    fn iovecs(&self, segments: &[Segment]) -> Result<Vec<libc::iovec>, Fault> {
        let mut iovecs = Vec::with_capacity(segments.len());
        for segment in segments {
            let slices = GuestMemoryBackend::get_slices(
                &*self.memory,
                GuestAddress(segment.gpa),
                segment.len,
            );
            for slice in slices {
                let slice = slice.map_err(|_| Fault::Driver("a buffer that is not in memory"))?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                iovecs.push(libc::iovec { iov_base, iov_len: slice.len() });
            }
        }
        Ok(iovecs)
    }

    /// Lets the kernel populate the pages that the next access touches.
    fn populate(&self, addr: GuestAddress, count: usize, access: Permissions) -> io::Result<()> {
        for slice in GuestMemoryBackend::get_slices(&*self.memory, addr, count) {
            // An address outside of memory is an error of the access itself.
            let Ok(slice) = slice else { return Ok(()) };
            let start = slice.ptr_guard().as_ptr() as usize;
            let first = start - start % PAGE_BYTES as usize;
            let len = start + slice.len() - first;
            let advice = match access {
                Permissions::Read | Permissions::No => libc::MADV_POPULATE_READ,
                Permissions::Write | Permissions::ReadWrite => libc::MADV_POPULATE_WRITE,
            };
            loop {
                // SAFETY: the pages are those of `slice`, so they are mapped for as long as
                // `self.memory` lives; populating them changes no byte and no mapping.
                let result = unsafe { libc::madvise(first as *mut libc::c_void, len, advice) };
                if result == 0 {
                    break;
                }
                let error = io::Error::last_os_error();
                if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

impl GuestMemory for DeviceMemory {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        GuestMemoryBackend::check_range(&*self.memory, addr, count)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, ()>>, GuestMemoryError> {
        if matches!(access, Permissions::Write | Permissions::ReadWrite) {
            self.writes.note(addr.0..addr.0.saturating_add(count as u64));
        }
        if let Err(error) = self.populate(addr, count, access) {
            self.unreadable_gpa.set(self.unreadable_gpa.get().or(Some(addr.0)));
            return Err(GuestMemoryError::IOError(error));
        }
        Ok(GuestMemoryBackend::get_slices(&*self.memory, addr, count))
    }
}

fn one_transfer(
    fd: BorrowedFd<'_>,
    offset: Option<u64>,
    iovecs: &[libc::iovec],
    direction: Direction,
) -> io::Result<usize> {
    let fd = fd.as_raw_fd();
    let count = iovecs.len().min(IOVECS_MAX) as libc::c_int;
    let iovecs = iovecs.as_ptr();
    let at = match offset.map(i64::try_from) {
        Some(Err(_)) => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        Some(Ok(at)) => Some(at),
        None => None,
    };
    let moved = match (direction, at) {
        // SAFETY: `count` iovecs of guest memory, which stays mapped during the call, to which no
        // reference exists, and whose bytes may change at any time.
        (Direction::ToGuest, Some(at)) => unsafe { libc::preadv(fd, iovecs, count, at) },
        // SAFETY: as above; the kernel only reads it.
        (Direction::FromGuest, Some(at)) => unsafe { libc::pwritev(fd, iovecs, count, at) },
        // SAFETY: as the first.
        (Direction::ToGuest, None) => unsafe { libc::readv(fd, iovecs, count) },
        // SAFETY: as the second.
        (Direction::FromGuest, None) => unsafe { libc::writev(fd, iovecs, count) },
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// The rest of the buffers after `moved` bytes.
fn advance(iovecs: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    while let Some(len) = iovecs.get(whole).map(|iovec| iovec.iov_len).filter(|&len| len <= moved) {
        moved -= len;
        whole += 1;
    }
    let rest = iovecs.get_mut(whole..).unwrap_or_default();
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(moved).cast();
        first.iov_len -= moved;
    }
    rest
}

/// The address of the byte at `done` of the segments.
fn gpa_at(segments: &[Segment], mut done: usize) -> Option<u64> {
    for segment in segments {
        if done < segment.len {
            return Some(segment.gpa + done as u64);
        }
        done -= segment.len;
    }
    None
}
