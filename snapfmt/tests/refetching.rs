//! Storage that holds a copy of other storage: what is damaged in the copy is fetched once more.

use std::io;
use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::sync::Mutex;

use snapfmt::{
    ChunkBuffer, Contents, MemoryRegion, PageIndex, ReadAt, ReadError, Snapshot, StateBlob,
    WriteOptions, write_snapshot,
};

/// A damaged copy, and the original, which may be damaged too.
struct Copied {
    copy: Mutex<Vec<u8>>,
    original: Vec<u8>,
    dropped: Mutex<Vec<Range<u64>>>,
}

impl ReadAt for Copied {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.copy.lock().unwrap().read_exact_at(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.original.len_bytes()
    }

    fn refetch(&self, bytes: Range<u64>) -> bool {
        let range = bytes.start as usize..bytes.end as usize;
        self.copy.lock().unwrap()[range.clone()].copy_from_slice(&self.original[range]);
        self.dropped.lock().unwrap().push(bytes);
        true
    }
}

const PAGES: u32 = 1024;

fn file() -> Vec<u8> {
    let memory: Vec<u8> =
        (0..PAGES as usize * 4096).map(|at| (at / 4096 % 251) as u8 + 1).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.snap");
    let len = memory.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    let states = [StateBlob { tag: 1, version: 1, bytes: vec![5; 100] }];
    let contents = Contents::new(&regions, &memory, &data).states(&states);
    let options = WriteOptions::default().dedupe(false);
    write_snapshot(&path, contents, &options, &|_| ControlFlow::Continue(())).unwrap();
    std::fs::read(path).unwrap()
}

fn read_all(snapshot: &Snapshot<Copied>) -> Result<(), ReadError> {
    let mut buffer = ChunkBuffer::new();
    for page in 0..PAGES {
        let bytes = snapshot.page(PageIndex(page), &mut buffer)?.expect("it is not zero");
        assert!(bytes.iter().all(|byte| *byte == (page % 251) as u8 + 1), "page {page}");
    }
    assert_eq!(snapshot.state(1)?.expect("it is there").bytes, [5; 100]);
    snapshot.metadata().map(drop)
}

#[test]
fn every_part_of_a_damaged_copy_is_fetched_once_more() {
    let original = file();
    let copy = original.iter().map(|byte| byte ^ 0x11).collect();
    let storage = Copied { copy: Mutex::new(copy), original, dropped: Mutex::default() };
    let snapshot = Snapshot::new(storage).unwrap();
    read_all(&snapshot).unwrap();
    let dropped = std::mem::take(&mut *snapshot.storage().dropped.lock().unwrap());
    for (at, range) in dropped.iter().enumerate() {
        assert!(!dropped[..at].contains(range), "{range:?} twice: {dropped:?}");
    }
    // A verifier heals what nothing has read before; here the paddings are left, which have no checksum.
    let verified = snapshot.verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(()));
    assert!(matches!(verified, Ok(_) | Err(ReadError::Corrupt(_))), "{verified:?}");
}

#[test]
fn a_damaged_original_is_fetched_once_more_and_then_an_error() {
    let mut original = file();
    let chunks = {
        let snapshot = Snapshot::new(original.clone()).unwrap();
        let section = snapshot.sections()[0];
        section.offset as usize..section.end() as usize
    };
    original[chunks].iter_mut().for_each(|byte| *byte ^= 1);
    let copy = Mutex::new(original.clone());
    let storage = Copied { copy, original, dropped: Mutex::default() };
    let snapshot = Snapshot::new(storage).unwrap();
    let mut buffer = ChunkBuffer::new();
    let read = snapshot.page(PageIndex(0), &mut buffer);
    assert!(matches!(read, Err(ReadError::Corrupt(_))), "{read:?}");
    assert_eq!(snapshot.storage().dropped.lock().unwrap().len(), 1);
}
