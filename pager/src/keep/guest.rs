//! A guest that is kept, and what becomes of it when no server comes back.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::process::Signal;

use super::{Kept, Ledger};
use crate::failure::FailurePolicy;
use crate::pager::Pager;
use crate::serve::handshake::Answer;
use crate::serve::{SnapshotName, handshake};
use crate::source::{PageReader, PageSource, SourceError};

/// What a keeper has of one guest.
pub(super) struct Guest {
    pub(super) kept: Kept,
    pub(super) snapshot: SnapshotName,
    pub(super) on_error: FailurePolicy,
    pub(super) served: Served,
}

/// By whom.
pub(super) enum Served {
    /// The server with that number, under that id.
    By { server: u64, id: u64 },
    /// Nobody, from that moment on.
    Nobody { since: Instant },
    /// The keeper itself, by errors only.
    GivenUp { _pager: Option<Pager> },
}

impl Guest {
    /// From now on what the guest lacks fails by the policy: who waits, or touches such a page later, is not left
    /// waiting. What it has it keeps. Answers why that is not possible; then its process was killed.
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
        let ledger =
            Ledger::open(duplicate(self.kept.ledger.as_fd())?).map_err(|error| text(&error))?;
        let regions = handshake::regions(&ledger.record.regions).map_err(|error| text(&error))?;
        let uffd = handshake::userfaultfd(duplicate(self.kept.uffd.as_fd())?)
            .map_err(|error| text(&error))?;
        let mut builder = Pager::builder(Arc::new(NoServer))
            .regions(regions)
            .on_error(self.on_error)
            .foreign(uffd, duplicate(self.kept.process.as_fd())?)
            .recorded(ledger.records(true).map_err(|error| text(&error))?);
        if self.kept.shares {
            let told = UnixStream::from(duplicate(self.kept.connection.as_fd())?);
            builder = builder.backed().on_failure(move |failure| {
                let _ = Answer::Failure(failure.chain()).send(&told, None);
            });
        }
        builder.start().map_err(|error| text(&error))
    }

    /// Ends its process. One that has ended already is no error.
    pub(super) fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.kept.process, Signal::KILL);
    }
}

/// The source of a guest whose server does not come back.
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
        Err(SourceError::permanent("the page server is gone"))
    }
}
