//! The process on the other side of a connection, and whether it may be served.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::error::RefuseError;

/// Checks that a connection comes from a process of the same user as this one, or of root.
///
/// # Errors
/// [`RefuseError::User`], or [`RefuseError::System`] if the user of the connection cannot be found.
pub fn check_user(stream: &UnixStream) -> Result<(), RefuseError> {
    allowed(stream).map(drop)
}

/// The process that has connected, if its user is allowed (unix(7), "SO_PEERCRED").
pub(super) fn allowed(stream: &UnixStream) -> Result<Pid, RefuseError> {
    let credentials = rustix::net::sockopt::socket_peercred(stream).map_err(|error| {
        RefuseError::System { what: "get the user of the client", error: error.into() }
    })?;
    let uid = credentials.uid;
    if uid != rustix::process::geteuid() && !uid.is_root() {
        return Err(RefuseError::User { uid: uid.as_raw() });
    }
    Ok(credentials.pid)
}

/// Whether the limit of open files is reached, of this process or of the host.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// A pidfd of the process that has connected, even if it has closed its end since (SO_PEERPIDFD). `None` before Linux
/// 6.5.
#[allow(unsafe_code)]
fn connected(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
    // From the kernel's asm-generic/socket.h. The crate libc lacks it for some targets.
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut pidfd: libc::c_int = -1;
    let mut len = size_of_val(&pidfd) as libc::socklen_t;
    // SAFETY: the descriptor is open; `pidfd` is valid for writes of `len` bytes, and `len` for reads and writes.
    let outcome = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
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

/// The process of a client.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) pid: i32,
    process: OwnedFd,
}

impl Peer {
    /// The process that has connected. `allowed` has returned `pid`.
    pub(crate) fn of(stream: &UnixStream, pid: Pid) -> Result<Peer, RefuseError> {
        let system = |what| {
            move |error: rustix::io::Errno| RefuseError::System { what, error: error.into() }
        };
        let gone = |error: io::Error| match is_shortage(&error) {
            true => RefuseError::Shortage(error),
            false => RefuseError::Process { pid: pid.as_raw_nonzero().get(), error },
        };
        // A process that serves itself would fill memory that it uses itself.
        if pid == rustix::process::getpid() {
            return Err(gone(io::Error::other("it is the server itself")));
        }
        if let Some(process) = connected(stream).map_err(gone)? {
            return Ok(Peer { pid: pid.as_raw_nonzero().get(), process });
        }
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(|error| gone(error.into()))?;
        // If the process had ended before pidfd_open, its id could belong to another process now. But then its end of
        // the connection is closed.
        let mut fds = [PollFd::new(stream, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).map_err(system("check the connection"))?;
        if fds[0].revents().contains(PollFlags::HUP) {
            return Err(RefuseError::Left { bytes: 0, descriptors: 0 });
        }
        Ok(Peer { pid: pid.as_raw_nonzero().get(), process })
    }

    /// A client that a keeper has held.
    pub(crate) fn kept(pid: i32, process: OwnedFd) -> Peer {
        Peer { pid, process }
    }

    /// Becomes readable when the process ends.
    pub(crate) fn process(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.process.try_clone()
    }

    /// Kills the process. A process that has already ended is no error.
    pub(crate) fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::KILL);
    }
}
