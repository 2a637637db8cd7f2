//! A server's side of its keeper.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, SendFlags};

use super::wire::{self, DESCRIPTORS, FromKeeper, KeepError, ToKeeper, VERSION};
use crate::failure::FailurePolicy;
use crate::serve::SnapshotName;
use crate::serve::wire::timespec;

/// The connection. It closes when this process ends, whatever ends it, and that is what the keeper waits for.
#[derive(Debug)]
pub(crate) struct Link(Mutex<OwnedFd>);

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
        let link = Link(Mutex::new(wire::connect(path)?));
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
        wire::send(&self.socket(), &ToKeeper::Keep { id, shares }, &descriptors, SendFlags::empty())
    }

    pub(crate) fn forget(&self, id: u64) {
        // One that is gone keeps nothing.
        let _ = wire::send(&self.socket(), &ToKeeper::Forget { id }, &[], SendFlags::empty());
    }

    /// Whether the keeper is there.
    pub(crate) fn is_alive(&self) -> bool {
        let socket = self.socket();
        let mut fds = [PollFd::new(&*socket, PollFlags::IN)];
        // It says nothing that it was not asked: what can be read is the end.
        matches!(rustix::event::poll(&mut fds, Some(&timespec(Duration::ZERO))), Ok(0))
    }

    fn ask(&self, question: &ToKeeper) -> Result<(FromKeeper, Vec<OwnedFd>), KeepError> {
        let socket = self.socket();
        wire::send(&socket, question, &[], SendFlags::empty())?;
        wire::receive(&socket, RecvFlags::empty())?.ok_or(KeepError::Gone)
    }

    fn socket(&self) -> MutexGuard<'_, OwnedFd> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
