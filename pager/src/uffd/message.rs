//! Messages of a userfaultfd, parsed from the bytes that read(2) has returned.

use std::os::fd::RawFd;

use super::abi;

/// One event. Addresses are those of the process that owns the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// A thread has touched a registered page, and sleeps until the page is installed or the thread is woken.
    Pagefault {
        /// Address of the access. Without `Features::EXACT_ADDRESS`, the address of its page.
        address: u64,
        /// What kind of access it was.
        kind: FaultKind,
        /// The faulting thread; 0 unless `Features::THREAD_ID` was granted.
        thread_id: u32,
    },
    /// `madvise(MADV_DONTNEED | MADV_REMOVE)`: the pages of `start..end` are about to be removed.
    Remove {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// `munmap`, or a mapping placed over it: `start..end` is no longer registered.
    Unmap {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// `mremap`: the registered pages were moved.
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

/// The kind of an access that faulted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultKind {
    /// The access was a write.
    pub write: bool,
    /// The access was a write to a page that is write-protected by userfaultfd.
    pub write_protected: bool,
    /// The page is in the page cache but not mapped.
    pub minor: bool,
}

impl Message {
    /// Parses one message of `MESSAGE_BYTES` bytes. `None` if `bytes` has another length.
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
    fn a_short_message_is_not_parsed() {
        assert_eq!(Message::parse(&[abi::UFFD_EVENT_REMOVE as u8; 31]), None);
        assert_eq!(Message::parse(&[]), None);
    }
}
