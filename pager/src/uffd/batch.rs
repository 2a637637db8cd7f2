//! A buffer for messages.

use super::abi;
use super::journal::{BATCH_BYTES, Journal};
use super::message::Message;

/// A fixed buffer for a batch of messages. Reading into it allocates nothing.
#[derive(Debug)]
pub struct MessageBatch {
    bytes: [u8; BATCH_BYTES],
    filled_bytes: usize,
    /// The kernel writes the messages here first, if they must survive this process.
    pub(super) journal: Option<Journal>,
}

impl MessageBatch {
    /// An empty batch.
    pub fn new() -> MessageBatch {
        MessageBatch { bytes: [0; BATCH_BYTES], filled_bytes: 0, journal: None }
    }

    /// A batch whose messages stay in the journal until they are [`MessageBatch::applied`].
    pub(crate) fn journaled(journal: Option<Journal>) -> MessageBatch {
        MessageBatch { journal, ..MessageBatch::new() }
    }

    /// The messages of the last read were applied: removes them from the journal.
    pub(crate) fn applied(&self) {
        if let Some(journal) = &self.journal {
            journal.clear(self.filled_bytes);
        }
    }

    /// The messages of the last read, in the order of the kernel: page faults first, then other events.
    pub fn messages(&self) -> impl Iterator<Item = Message> + '_ {
        self.bytes[..self.filled_bytes].chunks_exact(abi::MESSAGE_BYTES).filter_map(Message::parse)
    }

    /// Whether the last read returned nothing.
    pub fn is_empty(&self) -> bool {
        self.filled_bytes == 0
    }

    pub(super) fn buffer(&mut self) -> &mut [u8; BATCH_BYTES] {
        &mut self.bytes
    }

    pub(super) fn set_filled(&mut self, bytes: usize) {
        self.filled_bytes = bytes.min(self.bytes.len());
    }
}

impl Default for MessageBatch {
    fn default() -> Self {
        MessageBatch::new()
    }
}
