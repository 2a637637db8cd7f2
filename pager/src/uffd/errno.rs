//! Error numbers, and the ioctl that returns them.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The number of an error as the kernel returned it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

/// # Safety
/// `request` is an ioctl of `fd` whose argument is a pointer to `T`, and its effect on memory is sound.
pub(super) unsafe fn ioctl<T>(
    fd: BorrowedFd<'_>,
    request: u32,
    argument: &mut T,
) -> Result<(), Errno> {
    // SAFETY: by this function's contract.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

impl Errno {
    pub(super) fn last() -> Errno {
        Errno(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from(*self).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}
