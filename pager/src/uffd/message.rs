//! Messages of a userfaultfd, parsed from the bytes that `read(2)` returned.

use std::os::fd::RawFd;

use super::{Journal, abi};

/// One event. Addresses are those of the process that owns the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// A thread touched a registered page and sleeps until the page is installed or woken.
    Pagefault {
        /// Address of the access: the exact one with `Features::EXACT_ADDRESS`, else that of its page.
        address: u64,
        /// What kind of access it was.
        kind: FaultKind,
        /// The faulting thread; 0 unless `Features::THREAD_ID` was granted.
        thread_id: u32,
    },
    /// `madvise(MADV_DONTNEED | MADV_REMOVE)`: the pages of `start..end` are about to go.
    Remove {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// `munmap` (or a mapping placed over): `start..end` is no longer registered.
    Unmap {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// `mremap`: the registered pages moved.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes moved.
        len: u64,
    },
    /// `fork`: a userfaultfd for the child's memory. The reader of the message owns `uffd` and closes it.
    Fork {
        /// A new file descriptor of the reading process.
        uffd: RawFd,
    },
    /// An event number unknown to this crate.
    Unknown {
        /// The number.
        event: u8,
    },
}

/// What an access that faulted wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultKind {
    /// It was a write.
    pub write: bool,
    /// A write to a page that is write-protected by userfaultfd.
    pub write_protected: bool,
    /// The page is in the page cache but not mapped.
    pub minor: bool,
}

impl Message {
    /// Parses one message of `MESSAGE_BYTES` bytes; `None` when `bytes` has another length.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Message> {
        if bytes.len() != abi::MESSAGE_BYTES {
            return None;
        }
        let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_ne_bytes).ok();
        let half = |at: usize| bytes[at..at + 4].try_into().map(u32::from_ne_bytes).ok();
        let event = bytes[0];
        Some(match u32::from(event) {
            abi::UFFD_EVENT_PAGEFAULT => {
                let flags = word(8)?;
                Message::Pagefault {
                    address: word(16)?,
                    kind: FaultKind {
                        write: flags & u64::from(abi::UFFD_PAGEFAULT_FLAG_WRITE) != 0,
                        write_protected: flags & u64::from(abi::UFFD_PAGEFAULT_FLAG_WP) != 0,
                        minor: flags & u64::from(abi::UFFD_PAGEFAULT_FLAG_MINOR) != 0,
                    },
                    thread_id: half(24)?,
                }
            }
            abi::UFFD_EVENT_REMOVE => Message::Remove { start: word(8)?, end: word(16)? },
            abi::UFFD_EVENT_UNMAP => Message::Unmap { start: word(8)?, end: word(16)? },
            abi::UFFD_EVENT_REMAP => {
                Message::Remap { from: word(8)?, to: word(16)?, len: word(24)? }
            }
            abi::UFFD_EVENT_FORK => Message::Fork { uffd: half(8)? as RawFd },
            _ => Message::Unknown { event },
        })
    }
}

/// How many messages one `read(2)` takes at most.
const BATCH_MESSAGES: usize = 64;
pub(super) const BATCH_BYTES: usize = BATCH_MESSAGES * abi::MESSAGE_BYTES;

/// A fixed buffer for a batch of messages: reading allocates nothing.
#[derive(Debug)]
pub struct MessageBatch {
    bytes: [u8; BATCH_BYTES],
    filled_bytes: usize,
    /// Where the kernel puts the messages first, if what was read must survive this process.
    pub(super) journal: Option<Journal>,
}

impl MessageBatch {
    /// An empty batch.
    pub fn new() -> MessageBatch {
        MessageBatch { bytes: [0; BATCH_BYTES], filled_bytes: 0, journal: None }
    }

    /// One whose messages are in the journal until they are [`MessageBatch::applied`].
    pub(crate) fn journaled(journal: Option<Journal>) -> MessageBatch {
        MessageBatch { journal, ..MessageBatch::new() }
    }

    /// What the messages of the last read say is done.
    pub(crate) fn applied(&self) {
        if let Some(journal) = &self.journal {
            journal.clear(self.filled_bytes);
        }
    }

    /// The messages of the last read, in the kernel's order: page faults first, then other events.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: u32, words: [u64; 3]) -> Vec<u8> {
        let mut bytes = vec![0; 8];
        bytes[0] = event as u8;
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    #[test]
    fn each_event_is_parsed() {
        assert_eq!(
            Message::parse(&message(abi::UFFD_EVENT_PAGEFAULT, [1, 0x7000, 42])),
            Some(Message::Pagefault {
                address: 0x7000,
                kind: FaultKind { write: true, ..FaultKind::default() },
                thread_id: 42
            })
        );
        assert_eq!(
            Message::parse(&message(abi::UFFD_EVENT_REMOVE, [0x1000, 0x3000, 0])),
            Some(Message::Remove { start: 0x1000, end: 0x3000 })
        );
        assert_eq!(
            Message::parse(&message(abi::UFFD_EVENT_UNMAP, [0x1000, 0x3000, 0])),
            Some(Message::Unmap { start: 0x1000, end: 0x3000 })
        );
        assert_eq!(
            Message::parse(&message(abi::UFFD_EVENT_REMAP, [1, 2, 3])),
            Some(Message::Remap { from: 1, to: 2, len: 3 })
        );
        assert_eq!(
            Message::parse(&message(abi::UFFD_EVENT_FORK, [9, 0, 0])),
            Some(Message::Fork { uffd: 9 })
        );
        assert_eq!(Message::parse(&message(0xff, [0; 3])), Some(Message::Unknown { event: 0xff }));
    }

    #[test]
    fn a_cut_message_is_none() {
        assert_eq!(Message::parse(&[abi::UFFD_EVENT_REMOVE as u8; 31]), None);
        assert_eq!(Message::parse(&[]), None);
    }
}
