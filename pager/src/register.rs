//! Registers a slice's extents with its userfaultfd.
#![allow(unsafe_code)]

use crate::error::StartError;
use crate::layout::Extent;
use crate::uffd::Uffd;

/// Registers all of them; answers whether all of their memory takes `UFFDIO_ZEROPAGE`. With `one_by_one` the kernel does
/// not map pages of a file around a fault.
pub(crate) fn all(uffd: &Uffd, extents: &[Extent], one_by_one: bool) -> Result<bool, StartError> {
    let mut zeropage = true;
    for extent in extents {
        let (host_addr, len_bytes) = (extent.host.start, extent.host.end - extent.host.start);
        // SAFETY: an extent is part of a `Region`, whose maker has promised that the memory is mapped,
        // theirs to decide about, and free of references until the pager has stopped; it stops before
        // the userfaultfd is closed.
        let registered = unsafe { uffd.register_with(host_addr, len_bytes, one_by_one) }
            .map_err(|errno| StartError::Register { host_addr, len_bytes, errno })?;
        zeropage &= registered.zeropage;
        advise(extent, libc::MADV_DONTFORK);
    }
    Ok(zeropage)
}

/// Children get memory again when it is no longer paged.
pub(crate) fn forget(extents: &[Extent]) {
    extents.iter().for_each(|extent| advise(extent, libc::MADV_DOFORK));
}

/// A child has no userfaultfd: it would see zeros in place of missing pages. Without the memory it ends by SIGSEGV.
fn advise(extent: &Extent, advice: i32) {
    let len = (extent.host.end - extent.host.start) as usize;
    // SAFETY: this advice changes neither content nor access in this process. Of memory that is gone, or that
    // somebody else has there by now, children have what the kernel gives by default.
    unsafe { libc::madvise(extent.host.start as *mut libc::c_void, len, advice) };
}
