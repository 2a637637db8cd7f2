//! Memory that changes after it was read, as that of a guest that runs while it is saved: the file has the bytes of the
//! first read, and there is no second one.

use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU8, Ordering};

use snapfmt::layout::PAGE_BYTES as PAGE;
use snapfmt::{
    ChunkBuffer, Contents, Existing, MemoryRegion, PageIndex, Parent, ReadAt, Snapshot, WriteError,
    WriteOptions, write_layer, write_snapshot,
};

const PAGES: usize = 2500;

fn go_on(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The content at the point in time: many equal pages, near and far, some that differ in one byte, and zeros.
fn before(page: usize) -> Vec<u8> {
    match page % 5 {
        0 => vec![0; PAGE],
        1 => vec![7; PAGE],
        2 => vec![(page / 700) as u8 + 1; PAGE],
        3 => {
            let mut bytes = vec![9; PAGE];
            bytes[page % PAGE] = 1;
            bytes
        }
        _ => (0..PAGE).map(|at| (at / 64 + page) as u8 | 1).collect(),
    }
}

/// A guest rewrites a page as soon as it was read: with the bytes of another one, so that pages which were equal
/// differ, and pages which differed are equal.
struct Rewritten {
    reads: Vec<AtomicU8>,
}

impl Rewritten {
    fn new() -> Self {
        Self { reads: (0..PAGES).map(|_| AtomicU8::new(0)).collect() }
    }

    fn most_reads(&self) -> u8 {
        self.reads.iter().map(|reads| reads.load(Ordering::SeqCst)).max().unwrap_or(0)
    }
}

impl ReadAt for Rewritten {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        for (number, bytes) in (offset as usize / PAGE..).zip(buf.chunks_mut(PAGE)) {
            let earlier = self.reads[number].fetch_add(1, Ordering::SeqCst);
            let content = before(number + earlier as usize);
            bytes.copy_from_slice(&content[..bytes.len()]);
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok((PAGES * PAGE) as u64)
    }
}

fn regions() -> [MemoryRegion; 1] {
    [MemoryRegion { gpa: 0, len: (PAGES * PAGE) as u64, source_offset: 0 }]
}

#[track_caller]
fn has_the_first_bytes(snapshot: &Snapshot) {
    let (mut buffer, mut bytes) = (ChunkBuffer::new(), vec![0; PAGE]);
    for number in 0..PAGES {
        snapshot.read_page(PageIndex(number as u32), &mut buffer, &mut bytes).unwrap();
        assert!(bytes == before(number), "page {number}");
    }
}

#[test]
fn equal_pages_that_are_rewritten_keep_the_bytes_of_the_first_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live.snap");
    let (regions, data) = (regions(), [0..(PAGES * PAGE) as u64]);
    for threads in [1, 4] {
        let memory = Rewritten::new();
        let contents = Contents::new(&regions, &memory, &data).read_once(&|| Ok(()));
        let options = WriteOptions::default()
            .threads(NonZeroUsize::new(threads).unwrap())
            .existing(Existing::Replace);
        let (header, _) = write_snapshot(&path, contents, &options, &go_on).unwrap();
        assert_eq!(memory.most_reads(), 1);
        // Of each five pages, one is zero, and two have few different contents.
        assert!(header.stored_pages <= header.data_pages / 2 + 10, "{header:?}");
        has_the_first_bytes(&Snapshot::open(&path).unwrap());
    }
}

#[test]
fn a_layer_reads_its_memory_once_too() {
    let folder = tempfile::tempdir().unwrap();
    let (base, layer) = (folder.path().join("base.snap"), folder.path().join("layer.snap"));
    let (regions, data) = (regions(), [0..(PAGES * PAGE) as u64]);
    let other: Vec<u8> = (0..PAGES).flat_map(|page| before(page / 2)).collect();
    let contents = Contents::new(&regions, &other, &data);
    write_snapshot(&base, contents, &WriteOptions::default(), &go_on).unwrap();
    let memory = Rewritten::new();
    let contents = Contents::new(&regions, &memory, &data).read_once(&|| Ok(()));
    let snapshot = Snapshot::open(&base).unwrap();
    let parent = Parent::new(&snapshot, "base.snap");
    write_layer(&layer, contents, &parent, &WriteOptions::default(), &go_on).unwrap();
    assert_eq!(memory.most_reads(), 1);
    has_the_first_bytes(&Snapshot::open(&layer).unwrap());
}

#[test]
fn no_file_appears_if_the_memory_was_not_that_of_one_point_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("live.snap");
    let (regions, data) = (regions(), [0..(PAGES * PAGE) as u64]);
    let memory = Rewritten::new();
    let failed = || Err(io::Error::other("a page was given back"));
    let contents = Contents::new(&regions, &memory, &data).read_once(&failed);
    let written = write_snapshot(&path, contents, &WriteOptions::default(), &go_on);
    assert!(matches!(written, Err(WriteError::Inconsistent { .. })), "{written:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
