//! The process on the other side of a connection, and whether it may be served.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::credentials::{self, Credentials};
use super::error::RefuseError;
use super::event::Consequence;
use super::options::AllowedUsers;

/// Checks that a connection comes from a process of the same user as this one, or of root.
///
/// # Errors
/// [`RefuseError::User`], or [`RefuseError::System`] if the user of the connection cannot be found.
pub fn check_user(stream: &UnixStream) -> Result<(), RefuseError> {
    allowed(stream, &AllowedUsers::default()).map(drop)
}

/// The process that has connected, if its user is allowed.
pub(super) fn allowed(
    stream: &UnixStream,
    others: &AllowedUsers,
) -> Result<Credentials, RefuseError> {
    let failed = |error| RefuseError::System { what: "get the user of the client", error };
    let found = credentials::of(stream).map_err(failed)?;
    if found.is_own_or_root() || others.uids.contains(&found.uid) {
        return Ok(found);
    }
    if others.gids.is_empty() {
        return Err(RefuseError::User { uid: found.uid });
    }
    let groups = credentials::groups(stream).map_err(failed)?;
    match others.gids.iter().any(|gid| *gid == found.gid || groups.contains(gid)) {
        true => Ok(found),
        false => Err(RefuseError::User { uid: found.uid }),
    }
}

/// Whether the limit of open files is reached, of this process or of the host.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// The process of a client.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) pid: i32,
    process: OwnedFd,
}

impl Peer {
    /// The process that has connected, if its user is allowed.
    ///
    /// # Errors
    /// [`RefuseError`]; why it may not be served.
    pub(crate) fn allowed(stream: &UnixStream, others: &AllowedUsers) -> Result<Peer, RefuseError> {
        Peer::of(stream, allowed(stream, others)?)
    }

    /// The process that has connected. `allowed` has returned `found`.
    pub(crate) fn of(stream: &UnixStream, found: Credentials) -> Result<Peer, RefuseError> {
        let Credentials { pid, .. } = found;
        let gone = |error: io::Error| match is_shortage(&error) {
            true => RefuseError::Shortage(error),
            false => RefuseError::Process { pid, error },
        };
        // A process that serves itself would fill memory that it uses itself.
        if pid == rustix::process::getpid().as_raw_nonzero().get() {
            return Err(gone(io::Error::other("it is the server itself")));
        }
        match credentials::pidfd(stream).map_err(gone)? {
            Some(process) => Ok(Peer { pid, process }),
            None => Peer::by_id(stream, pid),
        }
    }

    /// The process that has connected, by its id. For kernels without `SO_PEERPIDFD`.
    fn by_id(stream: &UnixStream, pid: i32) -> Result<Peer, RefuseError> {
        let system = |what| {
            move |error: rustix::io::Errno| RefuseError::System { what, error: error.into() }
        };
        // 0: it has no id here.
        let id = Pid::from_raw(pid).ok_or(RefuseError::PidNamespace)?;
        let process = rustix::process::pidfd_open(id, PidfdFlags::empty()).map_err(|error| {
            let error = io::Error::from(error);
            match is_shortage(&error) {
                true => RefuseError::Shortage(error),
                false => RefuseError::Process { pid, error },
            }
        })?;
        // If the process had ended before pidfd_open, its id could belong to another process now. But then its end of
        // the connection is closed.
        let mut fds = [PollFd::new(stream, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).map_err(system("check the connection"))?;
        if fds[0].revents().contains(PollFlags::HUP) {
            return Err(RefuseError::Left { bytes: 0, descriptors: 0 });
        }
        Ok(Peer { pid, process })
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

    /// Checks that this process may kill it. A process that has already ended is no error.
    pub(super) fn check_kill(&self) -> Result<(), RefuseError> {
        match credentials::check_signals(&self.process) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(RefuseError::Unkillable { pid: self.pid, error })
            }
            _ => Ok(()),
        }
    }

    /// Kills the process. A process that has already ended counts as killed.
    pub(crate) fn kill(&self) -> Consequence {
        match rustix::process::pidfd_send_signal(&self.process, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Consequence::Killed,
            Err(_) => Consequence::NotKilled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As before Linux 6.5, of a process in another PID namespace.
    #[test]
    fn a_process_without_an_id_is_refused_with_the_reason() {
        let (one, _other) = UnixStream::pair().expect("a pair of sockets");
        let error = Peer::by_id(&one, 0).expect_err("it has no id");
        assert!(matches!(error, RefuseError::PidNamespace), "{error}");
        for part in ["another PID namespace", "Linux 6.5", "the same PID namespace"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
