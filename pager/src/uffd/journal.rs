//! Messages that outlive the process which has read them.
//!
//! A REMOVE that was read is known to nobody else: the kernel lets the thread that removes go on. Were it lost with a
//! process that is killed in that moment, the pages would later be filled with what the guest has given
//! away. So `read(2)` itself writes into memory that another process keeps, and a message stays there
//! until its effect is in the page states, which are kept as well.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use super::message::BATCH_BYTES;
use super::{Message, Uffd, abi};
use crate::mapping::Mapping;

/// Room for one batch, in a mapping that is shared with a file.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    mapping: Arc<Mapping>,
    offset: usize,
}

#[cfg_attr(not(feature = "serve"), allow(dead_code))]
impl Journal {
    /// How much of the mapping it takes.
    pub(crate) const BYTES: usize = BATCH_BYTES;

    pub(crate) fn within(mapping: Arc<Mapping>, offset: usize) -> Journal {
        let journal = Journal { mapping, offset };
        // A page that is there cannot fail the read half way, after the kernel has forgotten the message. Refused
        // (RLIMIT_MEMLOCK): then it can, if it was swapped out and the machine has no memory.
        // SAFETY: locks mapped pages, and changes no content.
        unsafe { libc::mlock(journal.start().cast(), Journal::BYTES) };
        journal
    }

    /// Reads messages into the journal, and from there into `bytes`.
    pub(super) fn read(&self, uffd: &Uffd, bytes: &mut [u8; BATCH_BYTES]) -> io::Result<usize> {
        // SAFETY: `start` is valid for writes of that many bytes; no reference into it exists.
        let read = unsafe { uffd.read_now(self.start(), Journal::BYTES) }?;
        self.copy_to(&mut bytes[..read.min(Journal::BYTES)]);
        Ok(read)
    }

    /// Forgets what is in the first `bytes`.
    pub(crate) fn clear(&self, bytes: usize) {
        // A process that is killed has done all that comes before what it has done: only the compiler could
        // change the order.
        compiler_fence(Ordering::SeqCst);
        for at in (0..bytes.min(Journal::BYTES)).step_by(abi::MESSAGE_BYTES) {
            // SAFETY: inside the journal. The first byte is the number of the event, and 0 is none.
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

    fn copy_to(&self, bytes: &mut [u8]) {
        let from = self.mapping.at(self.offset, bytes.len()).as_ptr();
        // SAFETY: valid for reads of that many bytes, and no overlap with memory of Rust's.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    fn start(&self) -> *mut u8 {
        self.mapping.at(self.offset, Journal::BYTES).as_ptr()
    }
}
