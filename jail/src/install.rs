//! The system calls that install a filter, and rules of Landlock.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{sock_filter, sock_fprog};

/// Installs a filter for the calling thread, which must have NO_NEW_PRIVS, and for the threads that it starts later.
pub(crate) fn install(program: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = sock_fprog { len, filter: program.as_ptr().cast_mut() };
    let no_flags: libc::c_ulong = 0;
    // SAFETY: the kernel copies `len` instructions, which `program` points to, and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            no_flags,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Applies a ruleset to the calling thread, which must have NO_NEW_PRIVS, and to the threads that it starts later. The crate
/// `landlock` would need another descriptor for each thread, of which there may be no more.
pub(crate) fn restrict(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    let no_flags: libc::c_ulong = 0;
    // SAFETY: it takes numbers only. A descriptor of another kind is an error.
    let result =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), no_flags) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
