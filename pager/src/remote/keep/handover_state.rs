//! The handover state of one guest, in a memfd that outlives the server which writes it.
//!
//! | offset | content |
//! |---|---|
//! | 0 | `SNAPKEEP`, then as little-endian numbers: version (4 bytes), length of the record (4), pages (8) |
//! | 4096 | the journal: messages that were read and may not be applied |
//! | 8192 | the state of each page, one byte each |
//! | after that, at a multiple of 4096 | the record: its process and its regions, in JSON |
//!
//! The memfd has mode 0600, and is sealed so that it cannot become shorter.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, Mode, SealFlags};
use serde::{Deserialize, Serialize};

use super::error::KeepError;
use super::wire::{VERSION, system};
use crate::install::page_state::PageStates;
use crate::install::records::Records;
use crate::mapping::Mapping;
use crate::remote::serve::handshake::RegionMessage;
use crate::uffd::Journal;

const MAGIC: [u8; 8] = *b"SNAPKEEP";
const JOURNAL_AT: usize = 4096;
const STATES_AT: usize = 8192;
const _: () = assert!(JOURNAL_AT + Journal::BYTES <= STATES_AT);
/// 2^32 pages are 16 TiB of guest memory with pages of 4 KiB.
const PAGES_LIMIT: u64 = 1 << 32;
const RECORD_LIMIT_BYTES: usize = 2 << 20;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// The process id of a guest, and its regions.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Record {
    pub(crate) pid: i32,
    pub(crate) regions: Vec<RegionMessage>,
}

/// The memfd, and its record.
#[derive(Debug)]
pub(crate) struct HandoverState {
    file: File,
    pages: usize,
    pub(crate) record: Record,
}

impl HandoverState {
    /// A new handover state, with this number of missing pages.
    pub(crate) fn create(record: Record, pages: u64) -> Result<HandoverState, KeepError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file =
            rustix::fs::memfd_create("snap-handover", flags).map_err(system("create a memfd"))?;
        rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(system("make it private"))?;
        let pages = checked(pages)?;
        let bytes = serde_json::to_vec(&record).map_err(super::wire::unclear)?;
        if bytes.len() > RECORD_LIMIT_BYTES {
            return Err(KeepError::HandoverState { why: "a record that is too long" });
        }
        let file = File::from(file);
        let failed = |error| KeepError::System { what: "write the handover state", error };
        let mut head = [0; 24];
        head[..8].copy_from_slice(&MAGIC);
        head[8..12].copy_from_slice(&VERSION.to_le_bytes());
        head[12..16].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        head[16..].copy_from_slice(&(pages as u64).to_le_bytes());
        file.write_all_at(&head, 0).map_err(failed)?;
        file.set_len((record_at(pages) + RECORD_LIMIT_BYTES) as u64).map_err(failed)?;
        file.write_all_at(&bytes, record_at(pages) as u64).map_err(failed)?;
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(system("seal the handover state"))?;
        Ok(HandoverState { file, pages, record })
    }

    /// A handover state that another process has created.
    pub(crate) fn open(descriptor: OwnedFd) -> Result<HandoverState, KeepError> {
        let file = File::from(descriptor);
        let failed = |error| KeepError::System { what: "read the handover state", error };
        let bad = |why| KeepError::HandoverState { why };
        if !rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SEALS)) {
            return Err(bad("no sealed file"));
        }
        let mut head = [0; 24];
        file.read_exact_at(&mut head, 0).map_err(failed)?;
        let number =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if head[..8] != MAGIC || number(8) != VERSION {
            return Err(bad("no handover state of this version"));
        }
        let pages = checked(u64::from(number(16)) | u64::from(number(20)) << 32)?;
        let len = number(12) as usize;
        let file_len = file.metadata().map_err(failed)?.len();
        if len > RECORD_LIMIT_BYTES || file_len < (record_at(pages) + RECORD_LIMIT_BYTES) as u64 {
            return Err(bad("a record that is too long"));
        }
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, record_at(pages) as u64).map_err(failed)?;
        let record = serde_json::from_slice(&bytes).map_err(super::wire::unclear)?;
        Ok(HandoverState { file, pages, record })
    }

    /// The page states and the journal, for the first pager or, with `resumed`, for one that continues.
    pub(crate) fn records(&self, resumed: bool) -> io::Result<Records> {
        let mapping = Arc::new(Mapping::shared(self.file.as_fd(), record_at(self.pages))?);
        Ok(Records {
            journal: Journal::within(Arc::clone(&mapping), JOURNAL_AT),
            states: PageStates::within(mapping, STATES_AT, self.pages),
            resumed,
        })
    }
}

impl AsFd for HandoverState {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn checked(pages: u64) -> Result<usize, KeepError> {
    let possible = usize::try_from(pages).ok().filter(|_| pages <= PAGES_LIMIT);
    possible.ok_or(KeepError::HandoverState { why: "too many pages" })
}

fn record_at(pages: usize) -> usize {
    STATES_AT + pages.next_multiple_of(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::page_state::PageState;

    fn record() -> Record {
        let region = RegionMessage {
            base_host_virt_addr: 4096,
            size: 8192,
            offset: 0,
            page_size: Some(4096),
            page_size_kib: None,
        };
        Record { pid: 7, regions: vec![region] }
    }

    #[test]
    fn a_handover_state_is_read_by_another_process() {
        let handover = HandoverState::create(record(), 5000).expect("it is made");
        let states = handover.records(false).expect("it is mapped").states;
        states.set(4999, PageState::Removed);
        let other =
            HandoverState::open(handover.file.try_clone().expect("one").into()).expect("it opens");
        assert_eq!((other.record.pid, other.record.regions.len(), other.pages), (7, 1, 5000));
        let found = other.records(true).expect("it is mapped");
        assert_eq!(found.states.of(4999), PageState::Removed);
        assert_eq!(found.states.of(0), PageState::Missing);
        assert!(found.journal.left().is_empty());
    }

    #[test]
    fn other_files_are_refused() {
        assert!(HandoverState::create(record(), PAGES_LIMIT + 1).is_err());
        let null = File::open("/dev/null").expect("there is one");
        assert!(matches!(HandoverState::open(null.into()), Err(KeepError::HandoverState { .. })));
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let head = |pages: u64, len: u32, file_len: u64| {
            let file = File::from(rustix::fs::memfd_create("x", flags).expect("a memfd"));
            let mut head = MAGIC.to_vec();
            head.extend(VERSION.to_le_bytes());
            head.extend(len.to_le_bytes());
            head.extend(pages.to_le_bytes());
            file.write_all_at(&head, 0).expect("it is written");
            file.set_len(file_len).expect("it is");
            rustix::fs::fcntl_add_seals(&file, SEALS).expect("it is sealed");
            HandoverState::open(file.into()).expect_err("it is refused").to_string()
        };
        assert!(head(u64::MAX, 0, 1 << 20).contains("too many pages"));
        assert!(head(1 << 20, 0, 1 << 20).contains("too long"));
        assert!(head(1, u32::MAX, 8 << 20).contains("too long"));
        assert!(head(1, 0, 8 << 20).contains("EOF"));
    }
}
