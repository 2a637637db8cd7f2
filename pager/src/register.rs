//! Registers a slice's extents with its userfaultfd.
#![allow(unsafe_code)]

use crate::error::StartError;
use crate::layout::Extent;
use crate::uffd::Uffd;

/// Registers all of them; answers whether all of their memory takes `UFFDIO_ZEROPAGE`.
pub(crate) fn all(uffd: &Uffd, extents: &[Extent]) -> Result<bool, StartError> {
    let mut zeropage = true;
    for extent in extents {
        let (host_addr, len_bytes) = (extent.host.start, extent.host.end - extent.host.start);
        // SAFETY: an extent is part of a `Region`, whose maker has promised that the memory is mapped,
        // theirs to decide about, and free of references until the pager has stopped; it stops before
        // the userfaultfd is closed.
        let registered = unsafe { uffd.register(host_addr, len_bytes) }
            .map_err(|errno| StartError::Register { host_addr, len_bytes, errno })?;
        zeropage &= registered.zeropage;
    }
    Ok(zeropage)
}
