//! Chains of layers: any history of a memory is read back from its layers, and an invalid chain is refused with its
//! reason.

mod common;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use snapfmt::layout::PAGE_BYTES as PAGE;
use snapfmt::{
    ChainError, ChunkBuffer, Contents, Header, MemoryRegion, PageEntry, PageIndex, Parent, Parents,
    ReadError, SectionKind, Snapshot, WriteError, WriteOptions, write_layer, write_snapshot,
};

const PAGES: usize = 1300;

fn go_on(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn page(kind: u8, seed: u64) -> Vec<u8> {
    match kind % 3 {
        0 => vec![0; PAGE],
        1 => (0..PAGE).map(|at| (at / 64) as u8 ^ seed as u8 | 1).collect(),
        _ => {
            let mut page = vec![0; PAGE];
            page[seed as usize % PAGE] = 1;
            page
        }
    }
}

/// Writes a memory to a file, as a layer of `parent` if there is one.
fn store(path: &Path, memory: &[u8], parent: Option<&Path>, options: &WriteOptions) -> Header {
    let len = memory.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    let contents = Contents::new(&regions, &memory, &data);
    match parent {
        None => write_snapshot(path, contents, options, &go_on).unwrap().0,
        Some(parent) => {
            let name = parent.file_name().unwrap();
            let snapshot = Snapshot::open(parent).unwrap();
            let parent = Parent::new(&snapshot, name);
            write_layer(path, contents, &parent, options, &go_on).unwrap().0
        }
    }
}

fn read_all(snapshot: &Snapshot) -> Vec<u8> {
    let mut memory = vec![0; snapshot.header().memory_bytes as usize];
    let mut buffer = ChunkBuffer::new();
    for (number, bytes) in memory.chunks_mut(PAGE).enumerate() {
        snapshot.read_page(PageIndex(number as u32), &mut buffer, bytes).unwrap();
    }
    memory
}

/// Changes to a memory: page, kind, seed.
fn changes() -> impl Strategy<Value = Vec<(usize, u8, u64)>> {
    prop::collection::vec((0..PAGES, 0u8..3, 0u64..50), 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_history_is_read_back(history in prop::collection::vec(changes(), 1..6), dedupe: bool) {
        let folder = tempfile::tempdir().unwrap();
        let options = WriteOptions::default().dedupe(dedupe);
        let mut memory = vec![0; PAGES * PAGE];
        let mut before: Option<(PathBuf, Vec<u8>)> = None;
        for (number, changes) in history.iter().enumerate() {
            for (at, kind, seed) in changes {
                memory[at * PAGE..(at + 1) * PAGE].copy_from_slice(&page(*kind, *seed));
            }
            let path = folder.path().join(format!("{number}.snap"));
            let header = store(&path, &memory, before.as_ref().map(|b| &*b.0), &options);
            if let Some((_, before)) = &before {
                // The layer has only changed pages.
                let pages = memory.chunks(PAGE).zip(before.chunks(PAGE));
                let changed = pages.filter(|(now, then)| now != then).count() as u64;
                prop_assert_eq!(header.pages() - header.parent_pages, changed);
            }
            let snapshot = Snapshot::open(&path).unwrap();
            prop_assert_eq!(snapshot.headers().len(), number + 1);
            prop_assert!(read_all(&snapshot) == memory);
            snapshot.verify(NonZeroUsize::MIN, &go_on).unwrap();

            // All pages together, and the pages that the index has as zeros.
            let loaded = std::sync::Mutex::new(vec![0; memory.len()]);
            let place = |offset: u64, bytes: &[u8]| {
                loaded.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
            };
            snapshot.load(NonZeroUsize::new(2).unwrap(), &place, &go_on).unwrap();
            prop_assert!(loaded.into_inner().unwrap() == memory);

            // Some pages: the others, here 7, are not touched, and zero pages are returned.
            let parts: Vec<_> = (0..PAGES).step_by(5).map(|at| at..(at + 2).min(PAGES)).collect();
            let offset = |page: usize| (page * PAGE) as u64;
            let offsets: Vec<_> = parts.iter().map(|p| offset(p.start)..offset(p.end)).collect();
            let loaded = std::sync::Mutex::new(vec![7; memory.len()]);
            let place = |offset: u64, bytes: &[u8]| {
                loaded.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
            };
            let zeros = snapshot.load_parts(&offsets, NonZeroUsize::new(2).unwrap(), &place).unwrap();
            let mut loaded = loaded.into_inner().unwrap();
            for zeros in zeros {
                let zeros = &mut loaded[zeros.start as usize..zeros.end as usize];
                prop_assert!(zeros.iter().all(|byte| *byte == 7));
                zeros.fill(0);
            }
            let mut expected = vec![7; memory.len()];
            for pages in parts {
                let bytes = pages.start * PAGE..pages.end * PAGE;
                expected[bytes.clone()].copy_from_slice(&memory[bytes]);
            }
            prop_assert!(loaded == expected);
            for at in (0..PAGES).step_by(37) {
                let page = PageIndex(at as u32);
                let zero = memory[at * PAGE..(at + 1) * PAGE].iter().all(|byte| *byte == 0);
                prop_assert_eq!(snapshot.entry(page).unwrap() == PageEntry::Zero, zero);
                if zero {
                    let run = snapshot.zero_run(page).unwrap();
                    let run = run.start as usize..run.end as usize;
                    prop_assert!(run.contains(&(at * PAGE)));
                    prop_assert!(memory[run].iter().all(|byte| *byte == 0));
                }
            }

            // Flattened: the chain's memory, written as one file.
            let flat = folder.path().join("flat.snap");
            let memory_of_chain = snapshot.memory();
            let data: Vec<_> = snapshot.populated().collect();
            let contents = Contents::new(snapshot.regions(), &memory_of_chain, &data);
            write_snapshot(&flat, contents, &options, &go_on).unwrap();
            let flat_snapshot = Snapshot::open(&flat).unwrap();
            prop_assert_eq!(flat_snapshot.headers().len(), 1);
            prop_assert!(read_all(&flat_snapshot) == memory);
            std::fs::remove_file(flat).unwrap();
            before = Some((path, memory.clone()));
        }
    }
}

/// A base and a layer on it.
fn pair() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (base, top) = (folder.path().join("base.snap"), folder.path().join("top.snap"));
    let mut memory = [page(1, 1), page(1, 2), page(0, 0)].concat();
    store(&base, &memory, None, &WriteOptions::default());
    memory[PAGE..2 * PAGE].copy_from_slice(&page(1, 9));
    store(&top, &memory, Some(&base), &WriteOptions::default());
    (folder, base, top)
}

fn chain_error(result: Result<Snapshot, ReadError>) -> ChainError {
    match result {
        Err(ReadError::Chain(error)) => error,
        other => panic!("expected a chain error, got {:?}", other.map(|_| "a snapshot")),
    }
}

#[test]
fn a_missing_parent_is_named_and_can_be_shown() {
    let (folder, base, top) = pair();
    let elsewhere = tempfile::tempdir().unwrap();
    let moved = elsewhere.path().join("other-name.snap");
    let id = Snapshot::open(&base).unwrap().header().id;
    std::fs::rename(&base, &moved).unwrap();
    match chain_error(Snapshot::open(&top)) {
        ChainError::NotFound { id: missing, looked_at, .. } => {
            assert_eq!(missing, id);
            assert_eq!(looked_at, [folder.path().join("base.snap")]);
        }
        other => panic!("{other}"),
    }
    let shown = Parents { files: vec![moved.clone()], ..Parents::default() };
    assert_eq!(Snapshot::open_with(&top, &shown).unwrap().headers().len(), 2);
    // In a folder, it is searched under the name in the layer.
    std::fs::rename(&moved, elsewhere.path().join("base.snap")).unwrap();
    let searched = Parents { folders: vec![elsewhere.path().to_owned()], ..Parents::default() };
    assert_eq!(Snapshot::open_with(&top, &searched).unwrap().headers().len(), 2);
}

#[test]
fn another_snapshot_in_the_parents_place_is_refused() {
    let (_folder, base, top) = pair();
    let memory = vec![3; 3 * PAGE];
    std::fs::remove_file(&base).unwrap();
    store(&base, &memory, None, &WriteOptions::default());
    match chain_error(Snapshot::open(&top)) {
        ChainError::Parent { path, source } => {
            assert_eq!(path, base);
            assert!(matches!(*source, ReadError::Chain(ChainError::WrongParent { .. })));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_parent_whose_header_has_changed_is_refused() {
    let (_folder, base, top) = pair();
    let mut bytes = std::fs::read(&base).unwrap();
    // Another time of creation, with a corrected checksum.
    bytes[144] ^= 1;
    let crc = crc32fast::hash(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&base, bytes).unwrap();
    let error = chain_error(Snapshot::open(&top));
    let ChainError::Parent { source, .. } = error else { panic!("{error}") };
    assert!(matches!(*source, ReadError::Chain(ChainError::ChangedParent { .. })));
}

#[test]
fn a_damaged_parent_is_named() {
    let (_folder, base, top) = pair();
    std::fs::write(&base, b"no snapshot at all").unwrap();
    let error = chain_error(Snapshot::open(&top));
    let ChainError::Parent { path, source } = error else { panic!("{error}") };
    assert_eq!(path, base);
    assert!(matches!(*source, ReadError::NotASnapshot { .. }));
}

/// An error names the damaged file, for a page and for the whole chain.
#[test]
fn damage_behind_the_header_of_a_parent_names_the_parent() {
    let (_folder, base, top) = pair();
    let whole = std::fs::read(&base).unwrap();
    let snapshot = Snapshot::open(&base).unwrap();
    let leaves = snapshot.sections().iter().find(|s| s.kind == SectionKind::INDEX_LEAVES).unwrap();
    for at in [PAGE + 100, leaves.offset as usize] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&base, bytes).unwrap();
        let snapshot = Snapshot::open(&top).unwrap();
        let id = snapshot.headers().nth(1).unwrap().id;
        snapshot.verify(NonZeroUsize::MIN, &go_on).unwrap();
        let mut buffer = ChunkBuffer::new();
        let read = snapshot.page(PageIndex(0), &mut buffer).map(drop);
        let loaded = snapshot.load(NonZeroUsize::MIN, &|_, _| {}, &go_on).map(drop);
        let verified = snapshot.verify_chain(NonZeroUsize::MIN, &go_on).map(drop);
        for result in [read, loaded, verified] {
            match result {
                Err(ReadError::InParent { layer: 1, id: of, path: Some(path), source }) => {
                    assert_eq!((of, &path), (id, &base));
                    assert!(matches!(*source, ReadError::Corrupt(_)), "{source}");
                }
                other => panic!("byte {at}: {other:?}"),
            }
        }
    }
}

#[test]
fn verifying_a_chain_checks_each_file_and_its_progress_ascends() {
    let (_folder, _, top) = pair();
    let snapshot = Snapshot::open(&top).unwrap();
    let total: u64 = snapshot.headers().map(|header| header.file_bytes).sum();
    let last = std::sync::Mutex::new(0);
    let progress = |progress: snapfmt::Progress| {
        let mut last = last.lock().unwrap();
        assert!(*last <= progress.done_bytes && progress.total_bytes == total);
        *last = progress.done_bytes;
        ControlFlow::Continue(())
    };
    let verified = snapshot.verify_chain(NonZeroUsize::MIN, &progress).unwrap();
    assert_eq!(verified.iter().map(|layer| layer.data_pages).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(*last.lock().unwrap(), total);
}

#[test]
fn a_snapshot_that_is_rewritten_and_cannot_be_read_is_a_typed_error() {
    let (folder, base, _) = pair();
    let mut bytes = std::fs::read(&base).unwrap();
    bytes[PAGE + 100] ^= 1;
    std::fs::write(&base, bytes).unwrap();
    let snapshot = Snapshot::open(&base).unwrap();
    let memory = snapshot.memory();
    let data = snapshot.populated().collect::<Vec<_>>();
    let contents = Contents::new(snapshot.regions(), &memory, &data);
    let out = folder.path().join("out.snap");
    let written = write_snapshot(&out, contents, &WriteOptions::default(), &go_on);
    assert!(
        matches!(written, Err(WriteError::Snapshot { source: ReadError::Corrupt(_), .. })),
        "{written:?}"
    );
}

#[test]
fn a_missing_file_is_named() {
    let error = Snapshot::open("/nonexistent/x.snap").map(drop).unwrap_err();
    assert_eq!(error.to_string(), "cannot open /nonexistent/x.snap");
}

#[test]
fn a_layer_that_is_its_own_parent_is_refused() {
    let (_folder, _, top) = pair();
    let mut bytes = std::fs::read(&top).unwrap();
    bytes.copy_within(40..56, 56);
    let crc = crc32fast::hash(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&top, bytes).unwrap();
    assert!(matches!(chain_error(Snapshot::open(&top)), ChainError::Loop { .. }));
}

#[test]
fn a_layer_alone_and_one_storage_too_many() {
    let (_folder, base, top) = pair();
    let bytes = |path| std::fs::read(path).unwrap();
    assert!(matches!(
        Snapshot::new(bytes(&top)),
        Err(ReadError::Chain(ChainError::ParentNeeded { .. }))
    ));
    assert!(Snapshot::chain([bytes(&top), bytes(&base)]).is_ok());
    assert!(matches!(
        Snapshot::chain([bytes(&base), bytes(&base)]),
        Err(ReadError::Chain(ChainError::WrongParent { .. }))
    ));
    assert!(matches!(Snapshot::chain(Vec::<Vec<u8>>::new()), Err(ReadError::NoLayer)));
}

#[test]
fn equal_pages_are_stored_once_and_in_the_same_way_by_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    // 3000 pages of 40 kinds, over several leaves.
    let memory: Vec<u8> = (0..3000).flat_map(|at| page(1, at * 7 % 40)).collect();
    let kinds = memory.chunks(PAGE).collect::<std::collections::BTreeSet<_>>().len() as u64;
    let mut files = Vec::new();
    for threads in 1..4 {
        let path = folder.path().join(format!("{threads}.snap"));
        let threads = NonZeroUsize::new(threads).unwrap();
        let options = WriteOptions::default().threads(threads);
        let header = store(&path, &memory, None, &options);
        assert_eq!((header.data_pages, header.stored_pages), (3000, kinds));
        let snapshot = Snapshot::open(&path).unwrap();
        assert!(read_all(&snapshot) == memory);
        snapshot.verify(threads, &go_on).unwrap();
        files.push(common::without_id(std::fs::read(path).unwrap()));
    }
    assert!(files.windows(2).all(|pair| pair[0] == pair[1]));
    let path = folder.path().join("all.snap");
    let options = WriteOptions::default().dedupe(false);
    assert_eq!(store(&path, &memory, None, &options).stored_pages, 3000);
}
