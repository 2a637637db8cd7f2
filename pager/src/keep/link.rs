//! A server's side of its keeper.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::wire::{self, DESCRIPTORS, FromKeeper, KeepError, ToKeeper, VERSION};
use crate::failure::FailurePolicy;
use crate::serve::SnapshotName;
use crate::serve::wire::timespec;

/// How long a server waits for each answer of its keeper, and for room in its queue.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The connection. It closes when this process ends, whatever ends it, and that is what the keeper waits for.
#[derive(Debug)]
pub(crate) struct Link {
    socket: OwnedFd,
    /// Held from a question to its answer.
    turn: Mutex<()>,
}

/// What was kept of a guest.
pub(crate) struct Kept {
    pub(crate) uffd: OwnedFd,
    pub(crate) connection: OwnedFd,
    pub(crate) process: OwnedFd,
    pub(crate) ledger: OwnedFd,
    /// Its memory is a private mapping of a dead server's file; it is told of failures, and has ended when it hangs up.
    pub(crate) shares: bool,
}

impl Link {
    /// Tells the keeper at `path` what is served here.
    pub(crate) fn connect(
        path: &Path,
        snapshot: &SnapshotName,
        on_error: FailurePolicy,
    ) -> Result<Link, KeepError> {
        let link = Link { socket: wire::connect(path, PATIENCE)?, turn: Mutex::new(()) };
        let (snapshot, on_error) = (snapshot.clone(), on_error.into());
        match link.ask(&ToKeeper::Hello { version: VERSION, snapshot, on_error })? {
            (FromKeeper::Welcome { version: VERSION }, _) => Ok(link),
            (FromKeeper::Welcome { version }, _) => {
                Err(KeepError::Version { found: version, wanted: VERSION })
            }
            (other, _) => Err(wire::unclear(format!("{other:?}"))),
        }
    }

    /// The next guest of a server that has died; it is this server's from now on, by the number `id`.
    pub(crate) fn take(&self, id: u64) -> Result<Option<Kept>, KeepError> {
        let (answer, descriptors) = self.ask(&ToKeeper::Take { id })?;
        match (answer, <[OwnedFd; DESCRIPTORS]>::try_from(descriptors)) {
            (FromKeeper::Nobody {}, _) => Ok(None),
            (FromKeeper::Guest { shares }, Ok([uffd, connection, process, ledger])) => {
                Ok(Some(Kept { uffd, connection, process, ledger, shares }))
            }
            (other, _) => Err(wire::unclear(format!("{other:?}"))),
        }
    }

    /// Gives the keeper a guest: userfaultfd, connection, process, ledger. What was sent is kept, whatever becomes of
    /// this process: it waits in the keeper's queue.
    pub(crate) fn keep(
        &self,
        id: u64,
        descriptors: [BorrowedFd<'_>; DESCRIPTORS],
        shares: bool,
    ) -> Result<(), KeepError> {
        self.send(&ToKeeper::Keep { id, shares }, &descriptors)
    }

    pub(crate) fn forget(&self, id: u64) {
        // One that is gone keeps nothing.
        let _ = self.send(&ToKeeper::Forget { id }, &[]);
    }

    /// Whether the keeper is there.
    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        // It says nothing that it was not asked: what can be read is the end.
        matches!(rustix::event::poll(&mut fds, Some(&timespec(Duration::ZERO))), Ok(0))
    }

    fn ask(&self, question: &ToKeeper) -> Result<(FromKeeper, Vec<OwnedFd>), KeepError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.send(question, &[])?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = wire::receive(&self.socket, RecvFlags::DONTWAIT)? {
                return Ok(answer);
            }
            self.wait(PollFlags::IN, deadline)?;
        }
    }

    /// Sends one packet, for which the keeper makes room unless it is stopped.
    fn send(&self, message: &ToKeeper, descriptors: &[BorrowedFd<'_>]) -> Result<(), KeepError> {
        let deadline = Instant::now() + PATIENCE;
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
            return Err(KeepError::Silent { after: PATIENCE });
        }
        let mut fds = [PollFd::new(&self.socket, flags)];
        match rustix::event::poll(&mut fds, Some(&timespec(left))) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(wire::system("wait for the keeper")(error)),
        }
    }
}

impl Kept {
    /// Whether the guest is no more.
    pub(super) fn has_ended(&self) -> bool {
        let mut fds = self.end();
        matches!(rustix::event::poll(&mut fds, Some(&timespec(Duration::ZERO))), Ok(1..))
    }

    /// What becomes ready when it ends. What it says is not listened to.
    pub(super) fn end(&self) -> Vec<PollFd<'_>> {
        let mut fds = vec![PollFd::new(&self.process, PollFlags::IN)];
        if self.shares {
            fds.push(PollFd::new(&self.connection, PollFlags::empty()));
        }
        fds
    }

    /// In the order of the wire.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; DESCRIPTORS] {
        [self.uffd.as_fd(), self.connection.as_fd(), self.process.as_fd(), self.ledger.as_fd()]
    }
}
