//! The initial RAM disk: at the highest addresses of low memory that the kernel accepts.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::LinuxError;
use crate::layout::PAGE_BYTES;

/// Loads the file at the end of `room`. Returns its address and its length.
pub(super) fn load(
    file: &mut File,
    path: &Path,
    memory: &GuestMemoryMmap,
    room: Range<u64>,
) -> Result<(u64, u64), LinuxError> {
    let open = |source| LinuxError::Open { path: path.to_owned(), source };
    let len = file.metadata().map_err(open)?.len();
    let start = room.start.next_multiple_of(PAGE_BYTES);
    let space = room.end.saturating_sub(start) / PAGE_BYTES * PAGE_BYTES;
    if len > space {
        return Err(LinuxError::InitrdTooLong { path: path.to_owned(), found: len, room: space });
    }
    let gpa = start + (space - len.next_multiple_of(PAGE_BYTES));
    memory
        .read_exact_volatile_from(GuestAddress(gpa), file, len as usize)
        .map_err(|source| LinuxError::InitrdRead { path: path.to_owned(), source })?;
    Ok((gpa, len))
}
