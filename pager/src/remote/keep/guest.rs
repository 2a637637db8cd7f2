//! A guest that a keeper holds, and its end if no server takes over.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::process::Signal;

use super::handover_state::HandoverState;
use super::link::Kept;
use crate::causes::with_causes;
use crate::failure::FailurePolicy;
use crate::pager::Pager;
use crate::remote::serve::SnapshotName;
use crate::remote::serve::handshake::{self, Answer};
use crate::source::error::SourceError;
use crate::source::load::PageReader;
use crate::source::page_source::PageSource;

/// What a keeper holds of one guest.
pub(super) struct Guest {
    pub(super) kept: Kept,
    pub(super) snapshot: SnapshotName,
    pub(super) on_error: FailurePolicy,
    pub(super) served: Served,
}

/// Which process serves a guest.
pub(super) enum Served {
    /// The server with this number, under this id.
    By { server: u64, id: u64 },
    /// No process, since this moment.
    Orphaned { since: Instant },
    /// The keeper itself. It only fails missing pages.
    GivenUp { _pager: Option<Pager> },
}

impl Guest {
    /// From now on the missing pages of the guest fail by the policy, so that no thread waits forever. The guest keeps
    /// its present pages.
    ///
    /// # Errors
    /// Why this is not possible. Then the process of the guest was killed.
    pub(super) fn give_up(&mut self) -> Result<(), String> {
        let started = self.start_failing();
        if started.is_err() {
            self.kill();
        }
        let (pager, outcome) = match started {
            Ok(pager) => (Some(pager), Ok(())),
            Err(error) => (None, Err(error)),
        };
        self.served = Served::GivenUp { _pager: pager };
        outcome
    }

    fn start_failing(&self) -> Result<Pager, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|error| text(&error));
        let handover = HandoverState::open(duplicate(self.kept.handover.as_fd())?)
            .map_err(|error| text(&error))?;
        let regions = handshake::regions(&handover.record.regions).map_err(|error| text(&error))?;
        let uffd = handshake::userfaultfd(duplicate(self.kept.uffd.as_fd())?)
            .map_err(|error| text(&error))?;
        let mut builder = Pager::builder(Arc::new(NoServer))
            .regions(regions)
            .on_error(self.on_error)
            .foreign(uffd, duplicate(self.kept.process.as_fd())?)
            .recorded(handover.records(true).map_err(|error| text(&error))?);
        if self.kept.shares {
            let clone = UnixStream::from(duplicate(self.kept.connection.as_fd())?);
            builder = builder.backed().on_failure(move |failure| {
                let _ = Answer::Failure(with_causes(failure)).send(&clone, None);
            });
        }
        builder.start().map_err(|error| text(&error))
    }

    /// Kills its process. A process that has already ended is no error.
    pub(super) fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.kept.process, Signal::KILL);
    }
}

/// The source of a guest that no server has taken over.
struct NoServer;

impl PageSource for NoServer {
    fn reader(&self, _page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        Ok(Box::new(NoServer))
    }

    fn len_bytes(&self) -> u64 {
        u64::MAX
    }
}

impl PageReader for NoServer {
    fn load(&mut self, _source_offset: u64) -> Result<crate::Load<'_>, SourceError> {
        Err(SourceError::permanent("the page server has ended"))
    }
}
