//! The messages of one slice. Events are applied when they are read; faults are queued.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::time::Instant;

use crate::fault::queued::{Fault, Ticket, Waited};
use crate::pager_state::PagerState;
use crate::source::error::SourceError;
use crate::uffd::{Journal, Message, MessageBatch};

/// The messages that were read and not yet answered. They survive a panic of the handler, so that no fault is lost.
#[derive(Debug)]
pub(crate) struct Inbox {
    batch: MessageBatch,
    pub(crate) faults: VecDeque<Fault>,
    /// The errors of faults among these that have waited. It is usually empty, and then costs nothing.
    pub(crate) failed: BTreeMap<Ticket, SourceError>,
    /// An event that cannot be served.
    pub(crate) unserved: Option<Message>,
    /// The error of reading messages while a fault was being answered.
    pub(crate) broken: Option<io::Error>,
}

impl Inbox {
    /// With a journal, messages survive this process after they were read. `unserved` is an event that a process before
    /// this one has read.
    pub(crate) fn new(journal: Option<Journal>, unserved: Option<Message>) -> Inbox {
        // Every thread waits for at most one page: there is room for more faulting threads than vCPUs.
        Inbox {
            batch: MessageBatch::journaled(journal),
            faults: VecDeque::with_capacity(256),
            failed: BTreeMap::new(),
            unserved,
            broken: None,
        }
    }

    /// Reads one batch without waiting, and returns the number of its messages. The caller holds the slice lock.
    ///
    /// All events of a batch are applied before any of its faults is answered. The kernel returns faults first, so that
    /// a fault may come before a REMOVE that happened earlier.
    pub(crate) fn receive(&mut self, shared: &PagerState, slice: usize) -> io::Result<usize> {
        shared.slices[slice].filler.uffd.read(&mut self.batch)?;
        let read_at = Instant::now();
        let mut count = 0;
        for message in self.batch.messages() {
            count += 1;
            match message {
                Message::Pagefault { address, thread_id, kind } => {
                    let (write_protected, waited) = (kind.write_protected, Waited::default());
                    let fault = Fault { address, thread_id, write_protected, read_at, waited };
                    self.faults.push_back(fault);
                }
                // If the page is in the file, the kernel would map it again without a fault: content that the guest
                // has given away would come back.
                Message::Remove { .. } if shared.backed => self.unserved = Some(message),
                // An unmapped page never faults again. In the state `Removed` it would read as zero.
                Message::Remove { start, end } | Message::Unmap { start, end } => {
                    shared.removed(slice, start..end);
                }
                // The pager does not enable these events: they come only from a userfaultfd of another process.
                Message::Fork { .. } | Message::Remap { .. } | Message::Unknown { .. } => {
                    self.unserved = Some(message);
                }
            }
        }
        self.batch.applied();
        Ok(count)
    }
}
