//! The messages of one slice: events are applied as they are read, faults wait in line.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use crate::slice::Shared;
use crate::uffd::{Journal, Message, MessageBatch};

/// A thread waits for the page at `address`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) address: u64,
    pub(crate) thread_id: u32,
    pub(crate) read_at: Instant,
}

/// What was read and not yet answered. Outlives a panic of the handler, so that no fault is lost.
#[derive(Debug)]
pub(crate) struct Inbox {
    batch: MessageBatch,
    pub(crate) faults: VecDeque<Fault>,
    /// An event that cannot be served.
    pub(crate) unserved: Option<Message>,
    /// Why messages could not be read while a fault was being answered.
    pub(crate) broken: Option<io::Error>,
}

impl Inbox {
    /// With a journal, messages that were read are not lost with this process.
    pub(crate) fn new(journal: Option<Journal>) -> Inbox {
        // Every thread waits for one page at most: room for more faulting threads than there are vCPUs.
        Inbox {
            batch: MessageBatch::journaled(journal),
            faults: VecDeque::with_capacity(256),
            unserved: None,
            broken: None,
        }
    }

    /// Reads one batch without waiting, and answers how many messages it had. The caller holds the gate
    /// of the slice.
    ///
    /// All events of a batch are applied before any of its faults is answered: the kernel hands out
    /// faults first, so that a fault may come before the REMOVE that was there first.
    pub(crate) fn receive(&mut self, shared: &Shared, slice: usize) -> io::Result<usize> {
        shared.slices[slice].filler.uffd.read(&mut self.batch)?;
        let read_at = Instant::now();
        let mut count = 0;
        for message in self.batch.messages() {
            count += 1;
            match message {
                Message::Pagefault { address, thread_id, .. } => {
                    self.faults.push_back(Fault { address, thread_id, read_at });
                }
                // Where the file has the page, the kernel would map it again and ask nobody: content that
                // was given away would come back.
                Message::Remove { .. } if shared.backed => self.unserved = Some(message),
                // An unmapped page is never asked for again; as a removed one it would read as zero.
                Message::Remove { start, end } | Message::Unmap { start, end } => {
                    shared.removed(slice, start..end);
                }
                // Never asked for, so they come only from a userfaultfd that somebody else has set up.
                Message::Fork { .. } | Message::Remap { .. } | Message::Unknown { .. } => {
                    self.unserved = Some(message);
                }
            }
        }
        self.batch.applied();
        Ok(count)
    }
}
