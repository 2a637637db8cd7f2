//! Registers the extents of a slice with its userfaultfd.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;

use crate::error::StartError;
use crate::layout::Extent;
use crate::uffd::{Errno, Uffd};

/// Registers the extents. Returns whether all of their memory supports `UFFDIO_ZEROPAGE`. With `fault_around_off` the
/// kernel does not map pages of a file around a fault.
pub(crate) fn all(
    uffd: &Uffd,
    extents: &[Extent],
    fault_around_off: bool,
) -> Result<bool, StartError> {
    let mut zeropage = true;
    for extent in extents {
        let (host_addr, len_bytes) = (extent.host.start, extent.host.end - extent.host.start);
        // SAFETY: an extent is part of a `Region`. Its maker has promised that the memory is mapped, theirs to decide
        // about, and free of references until the pager has stopped. The pager stops before the userfaultfd is closed.
        let registered = unsafe { uffd.register_with(host_addr, len_bytes, fault_around_off) }
            .map_err(|errno| StartError::Register { host_addr, len_bytes, errno })?;
        zeropage &= registered.zeropage;
        advise(extent, libc::MADV_DONTFORK);
    }
    Ok(zeropage)
}

/// Registers the extents, which [`all`] has registered, for write protection, too.
pub(crate) fn protection(uffd: &Uffd, extents: &[Extent]) -> Result<(), (u64, Errno)> {
    for extent in extents {
        let (host_addr, len_bytes) = (extent.host.start, extent.host.end - extent.host.start);
        // SAFETY: as in `all`. The memory was registered there for missing faults with this userfaultfd, and stays so.
        unsafe { uffd.register_with_protection(host_addr, len_bytes) }
            .map_err(|errno| (host_addr, errno))?;
    }
    Ok(())
}

/// Lets forked children have the memory again after it is no longer paged.
pub(crate) fn forget(extents: &[Extent]) {
    extents.iter().for_each(|extent| advise(extent, libc::MADV_DOFORK));
}

/// Gives the pages of a range of an extent back to the kernel. The caller holds the locks of the slices, and the memory
/// is not registered.
pub(crate) fn discard(extent: &Extent, range: Range<u64>) -> io::Result<()> {
    let (start, end) = (range.start.max(extent.host.start), range.end.min(extent.host.end));
    let len = end.saturating_sub(start) as usize;
    // SAFETY: the range is in an extent, which is part of a `Region`. Its maker has promised that the memory is mapped,
    // theirs to decide about, and free of references. It stays mapped.
    match unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A forked child has no userfaultfd: it would read zeros in place of missing pages. Without the memory it ends by
/// SIGSEGV.
fn advise(extent: &Extent, advice: i32) {
    let len = (extent.host.end - extent.host.start) as usize;
    // SAFETY: this advice changes neither content nor access in this process. If the memory is gone, or is used for
    // something else by now, children get what the kernel gives by default.
    unsafe { libc::madvise(extent.host.start as *mut libc::c_void, len, advice) };
}
