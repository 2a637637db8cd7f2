//! The user and the process on the other side of a unix socket, as the kernel reports them (unix(7), socket(7)).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

// From the kernel's asm-generic/socket.h. The crate libc lacks them for some targets.
const SO_PEERGROUPS: libc::c_int = 59;
const SO_PEERPIDFD: libc::c_int = 77;

/// The process that has connected, at the time of connect(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// 0 if this process does not see that process: it is in another PID namespace.
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Credentials {
    /// Whether it runs as this user or as root. Each side of a connection relies on the other: it gets the memory of a guest,
    /// or decides what is in it.
    pub(crate) fn is_own_or_root(&self) -> bool {
        [0, rustix::process::geteuid().as_raw()].contains(&self.uid)
    }
}

/// `SO_PEERCRED`. The function of rustix has no value for process id 0.
pub(crate) fn of(socket: impl AsFd) -> io::Result<Credentials> {
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of_val(&found) as libc::socklen_t;
    // SAFETY: the descriptor is open; `found` is valid for writes of `len` bytes, and `len` for reads and writes. Any
    // bytes are a valid `ucred`.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut len,
        )
    };
    match outcome {
        0 => Ok(Credentials { pid: found.pid, uid: found.uid, gid: found.gid }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The supplementary groups of the process (`SO_PEERGROUPS`).
pub(crate) fn groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    // The limit of the kernel (NGROUPS_MAX).
    let mut found = vec![0_u32; 65_536];
    let mut len = size_of_val(&found[..]) as libc::socklen_t;
    // SAFETY: the descriptor is open; `found` is valid for writes of `len` bytes, and `len` for reads and writes. Any
    // bytes are valid numbers.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERGROUPS,
            found.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    found.truncate(len as usize / size_of::<u32>());
    Ok(found)
}

/// A pidfd of the process, even if it has closed its end since (`SO_PEERPIDFD`). `None` before Linux 6.5.
pub(crate) fn pidfd(socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
    let mut pidfd: libc::c_int = -1;
    let mut len = size_of_val(&pidfd) as libc::socklen_t;
    // SAFETY: the descriptor is open; `pidfd` is valid for writes of `len` bytes, and `len` for reads and writes.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut len,
        )
    };
    if outcome == 0 {
        // SAFETY: the kernel has just created this descriptor, so that it has no other owner.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(pidfd) }));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        error => Err(error),
    }
}

/// Checks that this process may send signals to the process of a pidfd.
///
/// # Errors
/// As pidfd_send_signal(2): EPERM for another user without `CAP_KILL`, EINVAL for a process in a PID namespace that is
/// not below the one of this process, ESRCH for a process that has ended.
pub(crate) fn check_signals(pidfd: impl AsFd) -> io::Result<()> {
    // SAFETY: pidfd_send_signal(2) takes a descriptor, a number, no siginfo and no flags. Signal 0 is only a check.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            0,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn this_process_sees_itself() {
        let (one, _other) = UnixStream::pair().expect("a pair of sockets");
        let found = of(&one).expect("it has two sides");
        assert_eq!(found.pid, std::process::id() as i32);
        assert_eq!(found.uid, rustix::process::geteuid().as_raw());
        assert_eq!(found.gid, rustix::process::getegid().as_raw());
        let mut own: Vec<u32> = rustix::process::getgroups()
            .expect("it has some")
            .into_iter()
            .map(|gid| gid.as_raw())
            .collect();
        let mut of_peer = groups(&one).expect("it has two sides");
        own.sort_unstable();
        of_peer.sort_unstable();
        assert_eq!(of_peer, own);
    }
}
