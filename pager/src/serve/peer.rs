//! Who is on the other side: its process, and whether it may be served.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::error::RefuseError;

/// Refuses a connection from a process of another user than this process', unless it is root's.
///
/// # Errors
/// [`RefuseError::User`], or [`RefuseError::System`] when it cannot be seen who connects.
pub fn check_user(stream: &UnixStream) -> Result<(), RefuseError> {
    allowed(stream).map(drop)
}

/// The process that has connected, if its user may (unix(7), "SO_PEERCRED").
fn allowed(stream: &UnixStream) -> Result<Pid, RefuseError> {
    let credentials = rustix::net::sockopt::socket_peercred(stream)
        .map_err(|error| RefuseError::System { what: "see who connects", error: error.into() })?;
    let uid = credentials.uid;
    if uid != rustix::process::geteuid() && !uid.is_root() {
        return Err(RefuseError::User { uid: uid.as_raw() });
    }
    Ok(credentials.pid)
}

/// A client's process.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) pid: i32,
    process: OwnedFd,
}

impl Peer {
    /// The process that has connected. It must be of this process' user, or root's.
    pub(crate) fn of(stream: &UnixStream) -> Result<Peer, RefuseError> {
        let system = |what| {
            move |error: rustix::io::Errno| RefuseError::System { what, error: error.into() }
        };
        let pid = allowed(stream)?;
        let gone =
            |error: io::Error| RefuseError::Process { pid: pid.as_raw_nonzero().get(), error };
        // A process that serves itself would fill memory that it works with.
        if pid == rustix::process::getpid() {
            return Err(gone(io::Error::other("it is the server's own")));
        }
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(|error| gone(error.into()))?;
        // Had it ended in between, its number could be another process' by now; but then its end of the
        // connection is closed.
        let mut fds = [PollFd::new(stream, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).map_err(system("look at the connection"))?;
        if fds[0].revents().contains(PollFlags::HUP) {
            return Err(RefuseError::Left { bytes: 0, descriptors: 0 });
        }
        Ok(Peer { pid: pid.as_raw_nonzero().get(), process })
    }

    /// One that a keeper has kept.
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

    /// Ends it. One that has ended already is no error.
    pub(crate) fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::KILL);
    }
}
