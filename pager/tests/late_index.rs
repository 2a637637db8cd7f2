//! Storage on another host: what is announced before a part of the index has arrived.
#![allow(missing_docs)]

#[path = "support/snapshot.rs"]
mod snapshot;
mod support;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use pager::{Load, PageSource, SnapshotSource};
use snapfmt::{Codec, PageEntry, PageIndex, ReadAt, SectionKind, Snapshot};
use support::PAGE;

/// Four parts of the index, each of 2 MiB of memory.
const PAGES: usize = 2048;
const PART: usize = 512;

/// A file on another host. One part of its index arrives when it is read.
struct Far {
    file: File,
    late: Mutex<Option<Range<u64>>>,
    /// What was announced before that.
    announced: Mutex<Vec<Range<u64>>>,
}

impl ReadAt for Far {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        let mut late = self.late.lock().unwrap();
        if late.as_ref().is_some_and(|late| offset < late.end && late.start < end) {
            *late = None;
        }
        self.file.read_exact_at(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.file.len_bytes()
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn ahead_bytes(&self) -> u64 {
        32 << 20
    }

    fn would_wait(&self, bytes: Range<u64>) -> bool {
        self.late.lock().unwrap().as_ref().is_some_and(|late| late.start == bytes.start)
    }

    fn expect(&self, bytes: Range<u64>) {
        if self.late.lock().unwrap().is_some() {
            self.announced.lock().unwrap().push(bytes);
        }
    }
}

#[test]
fn chunks_are_announced_before_a_late_part_of_the_index_has_arrived() {
    let content = snapshot::content(PAGES);
    let folder = tempfile::tempdir().expect("a folder");
    let local = snapshot::stored(folder.path(), &content, Codec::Lz4);
    let far = Arc::new(Far {
        file: File::open(folder.path().join("lz4.snap")).expect("it was written"),
        late: Mutex::default(),
        announced: Mutex::default(),
    });
    let snapshot = Snapshot::new(Arc::clone(&far)).expect("it opens");
    let leaves = snapshot.sections().iter().find(|one| one.kind == SectionKind::INDEX_LEAVES);
    // The part of the first 512 pages is late.
    *far.late.lock().unwrap() = leaves.map(|leaves| leaves.offset..leaves.offset + 1);
    assert!(snapshot.entry_would_wait(PageIndex(0)) && !snapshot.entry_would_wait(PageIndex(512)));

    let source = SnapshotSource::new(Arc::new(snapshot));
    let all = 0..(PAGES * PAGE) as u64;
    let mut sequence = source.sequence(PAGE, vec![all]).expect("it has such pages");
    let mut order = Vec::new();
    while let Some(load) = sequence.next(&|_: u64| true) {
        let Load::Pages(loaded) = load.expect("it is readable") else { panic!("no page is zero") };
        for page in loaded.pages {
            let number = page.source_offset as usize / PAGE;
            assert_eq!(
                &loaded.bytes[page.buffer_offset..][..PAGE],
                &content[number * PAGE..][..PAGE]
            );
            order.push(number);
        }
    }
    assert!(order[..PAGES - PART].iter().all(|page| *page >= PART), "{order:?}");
    order.sort_unstable();
    assert!(order.into_iter().eq(0..PAGES), "each page is loaded once");
    let announced = far.announced.lock().unwrap();
    for page in PART..PAGES {
        let entry = local.entry(PageIndex(page as u32)).expect("it is readable");
        let PageEntry::Data { chunk, .. } = entry else { panic!("page {page}: {entry:?}") };
        let is_announced = announced.iter().any(|range| range.contains(&chunk.offset()));
        assert!(is_announced, "the chunk of page {page}");
    }
}
