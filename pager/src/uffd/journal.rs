//! Messages that survive the process which has read them.
//!
//! After a REMOVE was read, the kernel lets the removing thread continue, and only the reading process knows the
//! message. If that process is killed then, the pages would later get the content that the guest has given away. So
//! read(2) itself writes into memory that another process keeps. A message stays there until its effect is in the page
//! states, which that process keeps, too.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use super::abi;
use super::message::Message;
use crate::mapping::Mapping;

/// The limit of messages that one read(2) takes.
const BATCH_MESSAGES: usize = 64;
pub(super) const BATCH_BYTES: usize = BATCH_MESSAGES * abi::MESSAGE_BYTES;

/// Space for one batch, in a mapping that is shared with a file.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    mapping: Arc<Mapping>,
    offset: usize,
}

#[cfg_attr(not(feature = "serve"), allow(dead_code))]
impl Journal {
    /// The size of the journal in the mapping.
    pub(crate) const BYTES: usize = BATCH_BYTES;

    pub(crate) fn within(mapping: Arc<Mapping>, offset: usize) -> Journal {
        let journal = Journal { mapping, offset };
        // A resident page cannot fail the read after the kernel has removed the message from its queue. If the lock is
        // refused (RLIMIT_MEMLOCK), the read can fail so, when the page was swapped out and the host has no memory.
        // SAFETY: this locks mapped pages, and changes no content.
        unsafe { libc::mlock(journal.start().cast(), Journal::BYTES) };
        journal
    }

    /// Clears the messages in the first `bytes`.
    pub(crate) fn clear(&self, bytes: usize) {
        // A process that is killed has executed all instructions before the last one: only the compiler could change
        // the order.
        compiler_fence(Ordering::SeqCst);
        for at in (0..bytes.min(Journal::BYTES)).step_by(abi::MESSAGE_BYTES) {
            // SAFETY: inside the journal. The first byte is the number of the event, and 0 means no event.
            unsafe { self.start().wrapping_add(at).write_volatile(0) };
        }
        compiler_fence(Ordering::SeqCst);
    }

    /// The messages that were read and may not have been applied.
    pub(crate) fn left(&self) -> Vec<Message> {
        let mut bytes = [0; BATCH_BYTES];
        self.copy_to(&mut bytes);
        let messages = bytes.chunks_exact(abi::MESSAGE_BYTES).filter(|message| message[0] != 0);
        messages.filter_map(Message::parse).collect()
    }

    pub(super) fn copy_to(&self, bytes: &mut [u8]) {
        let from = self.mapping.at(self.offset, bytes.len()).as_ptr();
        // SAFETY: valid for reads of that many bytes, and it does not overlap with `bytes`.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Valid for writes of [`Journal::BYTES`] bytes.
    pub(super) fn start(&self) -> *mut u8 {
        self.mapping.at(self.offset, Journal::BYTES).as_ptr()
    }
}
