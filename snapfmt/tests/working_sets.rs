//! Files with a working set: the set is read back, its pages are at the front, and it changes no page.
#![cfg(feature = "zstd")]

mod common;

use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use snapfmt::layout::PAGE_BYTES as PAGE;
use snapfmt::{
    Changes, ChunkBuffer, Codec, Contents, Corruption, Existing, Header, HotPages, MemoryRegion,
    Metadata, PageEntry, PageIndex, Parent, Phase, Problem, ReadAt, ReadError, ReadOrder,
    SectionKind, Snapshot, StateBlob, WorkingSet, WriteError, WriteOptions, copy_snapshot,
    write_layer, write_snapshot, write_with_set,
};

const PAGES: usize = 1300;

fn go_on(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Zero, compressible, incompressible, and equal to others.
fn memory() -> Vec<u8> {
    let mut memory = vec![0; PAGES * PAGE];
    let mut random = 1u64;
    for (number, page) in memory.chunks_mut(PAGE).enumerate() {
        for (at, byte) in page.iter_mut().enumerate() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *byte = match number % 5 {
                0 => 0,
                1 | 2 => (at / 60) as u8 ^ (number / 5) as u8 | 1,
                3 => random as u8,
                _ => (at / 70) as u8 | 1,
            };
        }
        if matches!(number % 5, 1 | 2) {
            page[..2].copy_from_slice(&(number as u16).to_le_bytes());
        }
    }
    memory
}

fn contents(memory: &dyn ReadAt) -> Contents<'_> {
    const REGIONS: [MemoryRegion; 1] =
        [MemoryRegion { gpa: 0, len: (PAGES * PAGE) as u64, source_offset: 0 }];
    Contents::new(&REGIONS, memory, &[0..(PAGES * PAGE) as u64])
        .metadata(Metadata::default().tool("test"))
}

fn set(pages: &[(u32, Phase)]) -> WorkingSet {
    let pages: Vec<_> = pages.iter().map(|(page, phase)| (PageIndex(*page), *phase)).collect();
    WorkingSet::join([&pages[..]])
}

/// Writes, verifies, and reads everything back.
fn store(
    path: &Path,
    memory: &Vec<u8>,
    parent: Option<&Parent<'_>>,
    hot: &HotPages<'_>,
    options: &WriteOptions,
) -> Header {
    let header =
        write_with_set(path, contents(memory), parent, hot, options, &go_on).expect("written").0;
    let snapshot = Snapshot::open(path).expect("it opens");
    snapshot.verify_chain(NonZeroUsize::MIN, &go_on).expect("it is good");
    assert_eq!(snapshot.working_set().expect("it is good").as_ref(), Some(hot.set));
    assert!(read_all(&snapshot) == *memory);
    header
}

fn read_all(snapshot: &Snapshot) -> Vec<u8> {
    let mut memory = vec![0; snapshot.header().memory_bytes as usize];
    let mut buffer = ChunkBuffer::new();
    for (number, bytes) in memory.chunks_mut(PAGE).enumerate() {
        snapshot.read_page(PageIndex(number as u32), &mut buffer, bytes).unwrap();
    }
    memory
}

fn offset_of(snapshot: &Snapshot, page: u32) -> Option<u64> {
    match snapshot.entry(PageIndex(page)).unwrap() {
        PageEntry::Data { chunk, .. } => Some(chunk.offset()),
        _ => None,
    }
}

#[test]
fn the_set_is_at_the_front_by_phase_and_in_the_order_of_touching() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hot.snap");
    let memory = memory();
    // Every sixth page, backwards; half of them in an early phase.
    let hot: Vec<u32> = (0..PAGES as u32).rev().filter(|page| page % 6 == 1).collect();
    let (late, early) = hot.split_at(hot.len() / 2);
    let pages: Vec<_> = early
        .iter()
        .map(|page| (*page, Phase::FirstOutput))
        .chain(late.iter().map(|page| (*page, Phase::Later)))
        .collect();
    let set = set(&pages);
    for front in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
        let options = WriteOptions::default().existing(Existing::Replace);
        store(&path, &memory, None, &HotPages::new(&set).front(front), &options);
        let snapshot = Snapshot::open(&path).unwrap();
        let cold = (0..PAGES as u32).filter(|page| page % 6 != 1);
        // A page outside of the set may share the slot of an equal page in it.
        let first_cold =
            cold.filter(|page| page % 5 != 4).filter_map(|page| offset_of(&snapshot, page)).min();
        let places = |pages: &[u32]| -> Vec<u64> {
            let stored = pages.iter().filter(|page| *page % 5 != 4);
            stored.filter_map(|page| offset_of(&snapshot, *page)).collect()
        };
        let (early, late) = (places(early), places(late));
        // Except the last few: within a chunk, pages ascend.
        let in_order = |places: &[u64]| places.windows(33).all(|of| of[0] <= of[32]);
        assert!(in_order(&early) && in_order(&late), "{front}");
        assert!(
            early.iter().max() < late.iter().min() && late.iter().max() < first_cold.as_ref(),
            "{front}"
        );
        let metadata = snapshot.metadata().unwrap();
        assert!(metadata.storage.contains_key("zstd"));
        assert!(metadata.storage.contains_key(front.name()));
    }
}

#[test]
fn the_same_input_gives_the_same_bytes_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let memory = memory();
    let pages: Vec<_> =
        (0..PAGES as u32).filter(|p| p % 3 == 0).map(|p| (p, Phase::Later)).collect();
    let set = set(&pages);
    let hot = HotPages::new(&set).front(Codec::Lz4);
    let stored = |name: &str, threads, memory: &Vec<u8>| {
        let path = folder.path().join(name);
        let threads = NonZeroUsize::new(threads).unwrap();
        store(&path, memory, None, &hot, &WriteOptions::default().threads(threads));
        let header = Snapshot::open(&path).unwrap().header().clone();
        (common::without_id(std::fs::read(&path).unwrap()), header)
    };
    let (one, _) = stored("one", 1, &memory);
    let (four, _) = stored("four", 4, &memory);
    assert!(one == four);
    // Writing it again from itself gives the same file.
    let again = read_all(&Snapshot::open(folder.path().join("four")).unwrap());
    let (again, _) = stored("again", 2, &again);
    assert!(one == again);
}

#[test]
fn a_layer_leaves_unchanged_pages_in_its_parent() {
    let folder = tempfile::tempdir().unwrap();
    let (base, layer) = (folder.path().join("base.snap"), folder.path().join("layer.snap"));
    let mut memory = memory();
    write_snapshot(&base, contents(&memory), &WriteOptions::default(), &go_on).unwrap();
    let parent = Snapshot::open(&base).unwrap();
    let parent = Parent::new(&parent, "base.snap");
    memory[7 * PAGE..8 * PAGE].fill(9);
    memory[8 * PAGE..9 * PAGE].fill(0);
    memory[700 * PAGE..701 * PAGE].fill(9);
    let set = set(&[
        (8, Phase::FirstOutput),
        (7, Phase::FirstOutput),
        (6, Phase::FirstSecond),
        (0, Phase::Later),
    ]);
    let hot = HotPages::new(&set).front(Codec::Raw);
    let header = store(&layer, &memory, Some(&parent), &hot, &WriteOptions::default());
    // Page 7 and its equal, 700; page 8 is zero and was not.
    assert_eq!((header.data_pages, header.stored_pages), (2, 1));
    assert_eq!(header.parent_pages, PAGES as u64 - 3);

    let mut elsewhere = contents(&memory);
    elsewhere.regions = &[];
    let error =
        write_with_set(&layer, elsewhere, Some(&parent), &hot, &WriteOptions::default(), &go_on);
    assert!(matches!(error, Err(WriteError::Parent(_))));
}

#[test]
fn a_copy_has_the_same_memory_and_state_and_another_set() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut memory = memory();
    let states = [StateBlob { tag: 5, version: 2, bytes: b"state".to_vec() }];
    let whole = contents(&memory).states(&states);
    write_snapshot(path("base"), whole, &WriteOptions::default(), &go_on).unwrap();
    let base = Snapshot::open(path("base")).unwrap();
    memory[3 * PAGE..4 * PAGE].fill(1);
    let parent = Parent::new(&base, "base");
    write_layer(path("layer"), contents(&memory), &parent, &WriteOptions::default(), &go_on)
        .unwrap();

    let copied = |from: &str, to: &str, set: &WorkingSet, parent_path| {
        let snapshot = Snapshot::open(path(from)).unwrap();
        let changes = Changes::new(set.clone(), snapshot.metadata().unwrap().tool("copier"))
            .parent_path(parent_path);
        let header = copy_snapshot(path(to), &snapshot, &changes, &go_on)?;
        let copy = Snapshot::open(path(to)).unwrap();
        copy.verify_chain(NonZeroUsize::MIN, &go_on).expect("it is good");
        assert_ne!(header.id, snapshot.header().id);
        assert_eq!(header.parent_id, snapshot.header().parent_id);
        assert!(read_all(&copy) == read_all(&snapshot));
        assert_eq!(copy.working_set().unwrap().as_ref(), Some(set));
        assert_eq!(copy.metadata().unwrap().tool, "copier");
        assert_eq!(copy.state(5).unwrap(), snapshot.state(5).unwrap());
        Ok::<_, WriteError>(())
    };
    let (small, large) =
        (set(&[(3, Phase::Later)]), set(&[(1, Phase::FirstOutput), (900, Phase::Later)]));
    copied("base", "first", &small, None).unwrap();
    copied("first", "second", &large, None).unwrap();
    copied("layer", "third", &small, None).unwrap();
    copied("layer", "fourth", &small, Some(path("base"))).unwrap();
    assert_eq!(
        Snapshot::open(path("fourth")).unwrap().parent_hint().unwrap().unwrap().path,
        path("base")
    );
    let exists = copied("base", "first", &small, None);
    assert!(matches!(exists, Err(WriteError::Exists { .. })));
    let beyond = set(&[(PAGES as u32, Phase::Later)]);
    let error = copied("base", "fifth", &beyond, None).unwrap_err();
    assert!(matches!(error, WriteError::Limit { found: 1301, max: 1300, .. }), "{error}");
    assert!(!path("fifth").exists());
}

/// Damage is an error when the set is read, and only then: pages are read without it.
#[test]
fn a_damaged_set_is_named_and_pages_are_read_without_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hot.snap");
    let memory = memory();
    let set = set(&[(1, Phase::FirstOutput), (2, Phase::FirstOutput), (900, Phase::Later)]);
    store(&path, &memory, None, &HotPages::new(&set), &WriteOptions::default());
    let good = std::fs::read(&path).unwrap();
    let snapshot = Snapshot::new(good.clone()).unwrap();
    let of_kind = |s: &&snapfmt::Section| s.kind == SectionKind::WORKING_SET;
    let section = *snapshot.sections().iter().find(of_kind).unwrap();
    let mut bad = good.clone();
    bad[section.offset as usize + 20] ^= 1;
    let snapshot = Snapshot::new(bad).unwrap();
    let error = snapshot.working_set().unwrap_err();
    let ReadError::Corrupt(Corruption { problem: Problem::Checksum { .. }, offset, .. }) = error
    else {
        panic!("{error}");
    };
    assert_eq!(offset, section.offset);
    let mut bytes = [0; PAGE];
    snapshot.read_page(PageIndex(2), &mut ChunkBuffer::new(), &mut bytes).unwrap();
    assert!(bytes == memory[2 * PAGE..3 * PAGE]);
    assert!(snapshot.verify(NonZeroUsize::MIN, &go_on).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_set_and_any_chunk_size_give_the_same_memory(
        pages in prop::collection::vec((0..PAGES as u32, 0usize..4), 0..300),
        chunk_pages in 1usize..40,
        dedupe: bool,
        front in prop::sample::select(vec![None, Some(Codec::Raw), Some(Codec::Lz4)]),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let pages: Vec<_> =
            pages.into_iter().map(|(page, phase)| (page, Phase::ALL[phase])).collect();
        let options = WriteOptions::default().chunk_pages(chunk_pages).dedupe(dedupe);
        let set = set(&pages);
        store(&folder.path().join("x"), &memory(), None, &HotPages::new(&set).front(front), &options);
    }
}

/// Adjacent chunks are loaded with one read, and are the same as one by one.
#[test]
fn chunks_are_read_ahead() {
    let memory = memory();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plain.snap");
    write_snapshot(&path, contents(&memory), &WriteOptions::default(), &go_on).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    let mut extents = Vec::new();
    let count = snapshot.leaf_count();
    snapshot
        .for_each_entry(0..count, |_, entry| {
            if let PageEntry::Data { chunk, .. } = entry {
                extents.push(chunk);
            }
            Ok(())
        })
        .unwrap();
    extents.sort_unstable();
    extents.dedup();
    let (mut ahead, mut single) = (ChunkBuffer::new(), ChunkBuffer::new());
    let mut reads = 0;
    // Forwards once, then back to the first, which may have been replaced.
    for extent in extents.iter().chain(&extents[..1]) {
        reads += u64::from(
            snapshot
                .fetch_chunk_ahead(*extent, u64::MAX, ReadOrder::Announced, &mut ahead)
                .unwrap()
                > 0,
        );
        let chunk = snapshot.decode_chunk(*extent, &mut ahead).unwrap();
        assert!(chunk.bytes() == snapshot.chunk(*extent, &mut single).unwrap().bytes());
    }
    let bytes: u64 = extents.iter().map(|extent| u64::from(extent.len_bytes())).sum();
    assert!(reads <= bytes.div_ceil(snapfmt::READ_AHEAD_BYTES) + 2, "{reads} for {bytes}");
    // Only as far as requested.
    let first = extents[0];
    let mut buffer = ChunkBuffer::new();
    assert_eq!(
        snapshot.fetch_chunk_ahead(first, first.end(), ReadOrder::Announced, &mut buffer).unwrap(),
        u64::from(first.len_bytes())
    );
    // Bytes that were read ahead from one snapshot are not used for another; and a chunk must be fetched to be decoded.
    let other = Snapshot::open(&path).unwrap();
    assert!(other.fetch_chunk_ahead(first, 0, ReadOrder::Sequential, &mut buffer).unwrap() > 0);
    assert!(other.decode_chunk(extents[1], &mut buffer).is_err());
}

/// Storage that records which bytes are announced and read.
struct Noting {
    file: std::fs::File,
    expected: Mutex<Vec<Range<u64>>>,
    read: Mutex<Vec<Range<u64>>>,
}

impl ReadAt for Noting {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.read.lock().unwrap().push(offset..offset + buf.len() as u64);
        self.file.read_exact_at(buf, offset)
    }

    fn len_bytes(&self) -> std::io::Result<u64> {
        self.file.len_bytes()
    }

    fn expect(&self, bytes: Range<u64>) {
        self.file.expect(bytes.clone());
        self.expected.lock().unwrap().extend((!bytes.is_empty()).then_some(bytes));
    }
}

/// A snapshot of `memory`, and what is announced and read from now on.
fn noted() -> (tempfile::TempDir, Arc<Noting>, Snapshot<Arc<Noting>>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plain.snap");
    write_snapshot(&path, contents(&memory()), &WriteOptions::default(), &go_on).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let storage = Arc::new(Noting { file, expected: Mutex::default(), read: Mutex::default() });
    let snapshot = Snapshot::new(Arc::clone(&storage)).unwrap();
    storage.read.lock().unwrap().clear();
    (folder, storage, snapshot)
}

/// Each part of the index is announced to the storage once before it is read.
#[test]
fn announced_entries_are_read() {
    let (_folder, storage, snapshot) = noted();
    // Pages of two leaves, in any order; one is of no memory.
    let pages = [1299, 1, 1200, 3, u32::MAX].map(PageIndex);
    snapshot.expect_entries(&pages);
    let expected = storage.expected.lock().unwrap().clone();
    assert_eq!(expected.len(), 1, "{expected:?}");
    assert!(storage.read.lock().unwrap().is_empty());
    for page in &pages[..4] {
        snapshot.entry(*page).unwrap();
    }
    let read = storage.read.lock().unwrap().clone();
    assert_eq!(read.len(), 2);
    let within = |read: &Range<u64>| expected[0].start <= read.start && read.end <= expected[0].end;
    assert!(read.iter().all(within), "{read:?} {expected:?}");
    snapshot.expect_entries(&pages);
    assert_eq!(storage.expected.lock().unwrap().len(), 1);
}

/// The first read of a part of the index announces the parts near it.
#[test]
fn the_parts_of_the_index_near_the_first_one_are_announced() {
    let (_folder, storage, snapshot) = noted();
    // One page of each of three leaves.
    for page in [1200, 1, 600] {
        snapshot.entry(PageIndex(page)).unwrap();
    }
    let (expected, read) = (storage.expected.lock().unwrap(), storage.read.lock().unwrap());
    assert_eq!((expected.len(), read.len()), (1, 3), "{expected:?} {read:?}");
    let within = |read: &Range<u64>| expected[0].start <= read.start && read.end <= expected[0].end;
    assert!(read.iter().all(within), "{read:?} {expected:?}");
}
