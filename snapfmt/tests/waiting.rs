//! Storage on another host: a thread asks whether a page would wait, and is called back.

use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex};

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{
    Codec, Contents, MemoryRegion, PageEntry, PageIndex, Parent, ReadAt, ReadError, Snapshot,
    WhenHere, WriteOptions, write_layer, write_snapshot,
};

/// Storage whose bytes have come only where they were asked for.
#[derive(Default)]
struct Far {
    bytes: Vec<u8>,
    come: Mutex<Vec<Range<u64>>>,
    asked: Mutex<Vec<(Range<u64>, WhenHere)>>,
}

impl Far {
    fn come(&self, result: impl Fn() -> io::Result<()>) -> Vec<Range<u64>> {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        let end = |(range, here): (Range<u64>, WhenHere)| {
            self.come.lock().unwrap().push(range.clone());
            here(result());
            range
        };
        asked.into_iter().map(end).collect()
    }
}

impl ReadAt for Far {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.read_exact_at(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.bytes.len_bytes()
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn would_wait(&self, bytes: Range<u64>) -> bool {
        !self.come.lock().unwrap().iter().any(|come| come.contains(&bytes.start))
    }

    fn when_here(&self, bytes: Range<u64>, here: WhenHere) {
        self.asked.lock().unwrap().push((bytes, here));
    }
}

/// A layer with page 1, on a snapshot with pages 0 to 3 of 8.
fn chain() -> (Snapshot<Arc<Far>>, [Arc<Far>; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let (base, layer) = (folder.path().join("base.snap"), folder.path().join("layer.snap"));
    let len = (8 * PAGE_BYTES) as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let proceed = |_| ControlFlow::Continue(());
    let options = WriteOptions::default().codec(Codec::Raw);
    let mut memory: Vec<u8> = (0..len).map(|at| (at / 4096) as u8 + 1).collect();
    memory[4 * PAGE_BYTES..].fill(0);
    let whole = [0..len];
    write_snapshot(&base, Contents::new(&regions, &memory, &whole), &options, &proceed).unwrap();
    let onto = Snapshot::open(&base).unwrap();
    memory[PAGE_BYTES..2 * PAGE_BYTES].fill(77);
    let page = [PAGE_BYTES as u64..2 * PAGE_BYTES as u64];
    let parent = Parent::new(&onto, "base.snap");
    let contents = Contents::new(&regions, &memory, &page);
    write_layer(&layer, contents, &parent, &options, &proceed).unwrap();
    let far = [layer, base]
        .map(|path| Arc::new(Far { bytes: std::fs::read(path).unwrap(), ..Far::default() }));
    (Snapshot::chain(far.clone()).unwrap(), far)
}

/// What the call-backs have got.
type Results = Arc<Mutex<Vec<Result<(), ReadError>>>>;

fn ask(snapshot: &Snapshot<Arc<Far>>, page: u32, results: &Results) {
    let results = Arc::clone(results);
    let readable = move |result| results.lock().unwrap().push(result);
    snapshot.when_readable(PageIndex(page), Box::new(readable));
}

#[test]
fn a_page_waits_for_the_index_of_all_layers_and_then_for_its_chunk() {
    let (snapshot, [layer, base]) = chain();
    let results = Results::default();
    let pages = [0, 1, 2, 7].map(PageIndex);
    assert!(pages.iter().all(|page| snapshot.entry_would_wait(*page)));
    ask(&snapshot, 2, &results);
    // Both are asked for at the same time.
    assert_eq!(layer.come(|| Ok(())).len(), 1);
    assert!(results.lock().unwrap().is_empty());
    assert_eq!(base.come(|| Ok(())).len(), 1);
    assert!(matches!(results.lock().unwrap().pop(), Some(Ok(()))));
    assert!(!pages.iter().any(|page| snapshot.entry_would_wait(*page)));
    for (page, far, other) in [(1, &layer, &base), (2, &base, &layer)] {
        let Ok(PageEntry::Data { chunk, .. }) = snapshot.entry(PageIndex(page)) else {
            panic!("page {page} has no chunk");
        };
        assert!(snapshot.chunk_would_wait(chunk));
        ask(&snapshot, page, &results);
        assert_eq!(far.come(|| Ok(())), [chunk.offset()..chunk.end()]);
        assert!(other.come(|| Ok(())).is_empty());
        assert!(matches!(results.lock().unwrap().pop(), Some(Ok(()))));
        assert!(!snapshot.chunk_would_wait(chunk));
        // What is there is not asked for.
        ask(&snapshot, page, &results);
        assert!(matches!(results.lock().unwrap().pop(), Some(Ok(()))));
    }
    ask(&snapshot, 7, &results);
    assert!(matches!(results.lock().unwrap().pop(), Some(Ok(()))), "a zero page");
}

#[test]
fn the_first_error_is_the_answer_and_names_the_layer() {
    let (snapshot, [layer, base]) = chain();
    let results = Results::default();
    ask(&snapshot, 2, &results);
    base.come(|| Err(io::ErrorKind::NotFound.into()));
    layer.come(|| Ok(()));
    let results = std::mem::take(&mut *results.lock().unwrap());
    let [Err(error)] = &results[..] else { panic!("{results:?}") };
    assert!(matches!(error, ReadError::InParent { layer: 1, .. }), "{error:?}");
    assert!(
        matches!(error.root(), ReadError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    );
}
