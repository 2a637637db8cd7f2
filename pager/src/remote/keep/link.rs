//! The connection of a server to its keeper.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::error::KeepError;
use super::wire::{self, Accepted, DESCRIPTORS, FromKeeper, Orphan, ToKeeper, VERSION};
use crate::failure::FailurePolicy;
use crate::remote::serve::wire::timespec;
use crate::remote::serve::{AllowedUsers, KeepAt};

/// How long a server waits for each answer of its keeper, and for space in its queue.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The connection to a keeper. It closes when this process ends for any reason. The keeper waits for that.
#[derive(Debug)]
pub(crate) struct Link {
    socket: OwnedFd,
    /// Held from a request to its answer.
    turn: Mutex<()>,
}

/// What a keeper has held of a guest.
pub(crate) struct Kept {
    pub(crate) uffd: OwnedFd,
    pub(crate) connection: OwnedFd,
    pub(crate) process: OwnedFd,
    pub(crate) handover: OwnedFd,
    /// Its memory is a private mapping of the file of a dead server. Failures are reported to it. It has ended when it
    /// hangs up.
    pub(crate) shares: bool,
}

impl Link {
    /// Connects to the keeper, and sends it what this server serves, and where. Returns the listening socket of a dead
    /// server at the same path, too.
    pub(crate) fn connect(
        keep: &KeepAt,
        on_error: FailurePolicy,
        allow: &AllowedUsers,
        path: &Path,
    ) -> Result<(Link, Option<(OwnedFd, Orphan)>), KeepError> {
        let socket = wire::connect(&keep.socket, ANSWER_TIMEOUT)?;
        let link = Link { socket, turn: Mutex::new(()) };
        let hello = ToKeeper::Hello {
            version: VERSION,
            snapshot: keep.snapshot.clone(),
            on_error: on_error.into(),
            allow: allow.clone(),
            path: path.as_os_str().as_bytes().to_vec(),
        };
        match link.ask(&hello)? {
            (FromKeeper::Welcome { version: VERSION, orphan }, descriptors) => {
                Ok((link, descriptors.into_iter().next().zip(orphan)))
            }
            (FromKeeper::Welcome { version, .. }, _) => {
                Err(KeepError::Version { found: version, wanted: VERSION })
            }
            (other, _) => Err(wire::unclear(format!("{other:?}"))),
        }
    }

    /// Gives the keeper a duplicate of the listening socket. The keeper accepts its connections from now on.
    pub(crate) fn listen(
        &self,
        listener: BorrowedFd<'_>,
        identity: (u64, u64),
        passed: bool,
    ) -> Result<Door, KeepError> {
        let (here, there) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(wire::system("create a pair of sockets"))?;
        self.send(&ToKeeper::Listen { identity, passed }, &[listener, there.as_fd()])?;
        Ok(Door(here))
    }

    /// The server listens no longer.
    pub(crate) fn close(&self) {
        // A keeper that has ended accepts nothing.
        let _ = self.send(&ToKeeper::Close {}, &[]);
    }

    /// Takes over the next guest of a dead server, under the number `id`.
    pub(crate) fn take(&self, id: u64) -> Result<Option<Kept>, KeepError> {
        let (answer, descriptors) = self.ask(&ToKeeper::Take { id })?;
        match (answer, <[OwnedFd; DESCRIPTORS]>::try_from(descriptors)) {
            (FromKeeper::NoGuest {}, _) => Ok(None),
            (FromKeeper::Guest { shares }, Ok([uffd, connection, process, handover])) => {
                Ok(Some(Kept { uffd, connection, process, handover, shares }))
            }
            (other, _) => Err(wire::unclear(format!("{other:?}"))),
        }
    }

    /// Sends the keeper a guest: userfaultfd, connection, process, handover state. If this process dies after that, the
    /// message is still in the queue of the keeper.
    pub(crate) fn keep(
        &self,
        id: u64,
        descriptors: [BorrowedFd<'_>; DESCRIPTORS],
        shares: bool,
        connection: Option<u64>,
    ) -> Result<(), KeepError> {
        self.send(&ToKeeper::Keep { id, shares, connection }, &descriptors)
    }

    /// If this process dies, the client of this connection is not served by the next server.
    pub(crate) fn release(&self, connection: u64) {
        // A keeper that has ended holds nothing.
        let _ = self.send(&ToKeeper::Release { connection }, &[]);
    }

    pub(crate) fn forget(&self, id: u64) {
        // A keeper that has ended holds nothing.
        let _ = self.send(&ToKeeper::Forget { id }, &[]);
    }

    /// Whether the keeper lives.
    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::empty())];
        matches!(rustix::event::poll(&mut fds, Some(&timespec(Duration::ZERO))), Ok(0))
    }

    fn ask(&self, request: &ToKeeper) -> Result<(FromKeeper, Vec<OwnedFd>), KeepError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.send(request, &[])?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            if let Some(answer) = wire::receive(&self.socket, RecvFlags::DONTWAIT)? {
                return Ok(answer);
            }
            self.wait(PollFlags::IN, deadline)?;
        }
    }

    /// Sends one packet. If the queue is full, this waits until the keeper has read from it.
    fn send(&self, message: &ToKeeper, descriptors: &[BorrowedFd<'_>]) -> Result<(), KeepError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            match wire::send(&self.socket, message, descriptors, SendFlags::DONTWAIT) {
                Err(KeepError::Full) => self.wait(PollFlags::OUT, deadline)?,
                sent => return sent,
            }
        }
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<(), KeepError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(KeepError::Silent { after: ANSWER_TIMEOUT });
        }
        let mut fds = [PollFd::new(&self.socket, flags)];
        match rustix::event::poll(&mut fds, Some(&timespec(left))) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(wire::system("wait for the keeper")(error)),
        }
    }
}

/// Where the connections arrive that a keeper has accepted.
#[derive(Debug)]
pub(crate) struct Door(OwnedFd);

impl Door {
    /// The next connection and its number, if one has arrived.
    ///
    /// # Errors
    /// [`KeepError::Gone`]: the keeper has ended, or the server listens no longer and this was the last connection.
    /// [`KeepError::DescriptorLost`]: the limit of descriptors is reached. The connection can be taken later.
    pub(crate) fn next(&self) -> Result<Option<(OwnedFd, u64)>, KeepError> {
        let flags = RecvFlags::DONTWAIT;
        let Some((Accepted { connection }, descriptors)) =
            wire::receive::<Accepted>(&self.0, flags | RecvFlags::PEEK)?
        else {
            return Ok(None);
        };
        // The descriptor of the first look is a duplicate, and is kept. The packet itself is dropped.
        wire::drop_next(&self.0, flags)?;
        let stream = descriptors.into_iter().next();
        let stream = stream.ok_or_else(|| wire::unclear("no connection"))?;
        Ok(Some((stream, connection)))
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Kept {
    /// Whether the guest has ended.
    pub(super) fn has_ended(&self) -> bool {
        let mut fds = self.end();
        matches!(rustix::event::poll(&mut fds, Some(&timespec(Duration::ZERO))), Ok(1..))
    }

    /// The descriptors that become ready when the guest ends. Its messages are ignored.
    pub(super) fn end(&self) -> Vec<PollFd<'_>> {
        let mut fds = vec![PollFd::new(&self.process, PollFlags::IN)];
        if self.shares {
            fds.push(PollFd::new(&self.connection, PollFlags::empty()));
        }
        fds
    }

    /// The descriptors, in the order of the message.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; DESCRIPTORS] {
        [self.uffd.as_fd(), self.connection.as_fd(), self.process.as_fd(), self.handover.as_fd()]
    }
}
