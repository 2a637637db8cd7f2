//! Uses a file in every possible way and compares the results.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use snapfmt::{
    ChunkBuffer, KeyProvider, Outline, PageEntry, PageIndex, ReadAt, ReadError, SecretKey,
    SectionKind, Snapshot, VerifiedOutline,
};

/// Reading pages one by one decodes a chunk for each: a bound, so that one input takes little time.
const SINGLE_PAGES: usize = 12;

/// Opens a file that needs no parent and reads all of it.
pub(crate) fn read_file(storage: impl ReadAt) -> Result<(), ReadError> {
    let outline = Outline::open(&storage)
        .and_then(|outline| outline.verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(())));
    read_opened(Snapshot::new(&storage)?, outline)
}

/// As [`read_file`], of a file that is sealed with this key.
pub(crate) fn read_sealed(file: &[u8], key: [u8; 32]) -> Result<(), ReadError> {
    let outline = Outline::open(file)
        .and_then(|outline| outline.verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(())));
    let keys: Arc<dyn KeyProvider> = Arc::new(SecretKey::new(key));
    let named = [(file, PathBuf::new())];
    read_opened(Snapshot::named_chain_with(named, Some(keys))?, outline)
}

fn read_opened<R: ReadAt>(
    opened: Snapshot<R>,
    outline: Result<VerifiedOutline, ReadError>,
) -> Result<(), ReadError> {
    if opened.verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(())).is_ok() {
        outline.expect("what verifies has right checksums");
    }
    read_everything(&opened)
}

/// Reads all of a snapshot: metadata, states, index, pages one by one and all together; verifies it.
///
/// # Panics
/// When two ways of reading contradict each other, or a file that was verified cannot be read.
pub(crate) fn read_everything<R: ReadAt>(snapshot: &Snapshot<R>) -> Result<(), ReadError> {
    let memory_bytes = snapshot.header().memory_bytes;
    let go_on = |_| ControlFlow::Continue(());
    let verified = snapshot.verify(NonZeroUsize::MIN, &go_on);
    let chain = snapshot.verify_chain(NonZeroUsize::MIN, &go_on);
    match &chain {
        Ok(layers) => assert!(verified.is_ok() && layers.len() == snapshot.headers().len()),
        Err(_) => assert!(verified.is_err() || snapshot.headers().len() > 1),
    }
    let metadata = snapshot.metadata().map(drop);
    let set = snapshot.working_set();
    if let Ok(Some(set)) = &set {
        assert!(set.len() <= memory_bytes / 4096);
        assert!(set.pages().all(|(page, _)| u64::from(page.0) < memory_bytes / 4096));
        assert!(set.pages().is_sorted_by_key(|(_, phase)| phase));
    }
    let states = read_states(snapshot);

    let loaded = Mutex::new(BTreeMap::new());
    let place = |offset: u64, bytes: &[u8]| {
        assert!(offset.is_multiple_of(4096) && bytes.len().is_multiple_of(4096));
        assert!(offset + bytes.len() as u64 <= memory_bytes);
        let mut loaded = loaded.lock().expect("no other thread");
        for (page, bytes) in (offset / 4096..).zip(bytes.chunks(4096)) {
            let before = loaded.insert(page, crc32fast::hash(bytes));
            assert_eq!(before, None, "page {page} was loaded twice");
        }
    };
    let load = snapshot.load(NonZeroUsize::MIN, &place, &go_on);
    let loaded = loaded.into_inner().expect("no other thread");

    let mut entries = Vec::new();
    let index = snapshot.for_each_entry(0..snapshot.leaf_count(), |page, entry| {
        assert_ne!(entry, PageEntry::Zero);
        entries.push((page, entry));
        Ok(())
    });
    let data = |(_, entry): &&(_, PageEntry)| matches!(entry, PageEntry::Data { .. });
    if load.is_ok() {
        assert_eq!(loaded.len(), entries.iter().filter(data).count());
    }
    let (mut buffer, mut bytes, mut single) = (ChunkBuffer::new(), vec![0; 4096], Ok(()));
    let step = entries.len().div_ceil(SINGLE_PAGES).max(1);
    for (page, entry) in entries.iter().step_by(step) {
        assert_eq!(snapshot.entry(*page).ok(), Some(*entry));
        let read = snapshot.read_page(*page, &mut buffer, &mut bytes);
        if let (Ok(()), Some(crc)) = (&read, loaded.get(&page.0.into())) {
            assert_eq!(crc32fast::hash(&bytes), *crc, "{page:?}");
        }
        single = single.and(read);
    }
    let last = PageIndex((memory_bytes / 4096 - 1) as u32);
    for page in [PageIndex(0), last] {
        if matches!(snapshot.entry(page), Ok(PageEntry::Zero)) {
            snapshot.read_page(page, &mut buffer, &mut bytes)?;
            assert!(bytes.iter().all(|byte| *byte == 0));
            let run = snapshot.zero_run(page)?;
            assert!(run.contains(&page.source_offset()) && run.end <= memory_bytes);
        }
    }
    if let Some(after) = last.0.checked_add(1) {
        assert!(matches!(snapshot.entry(PageIndex(after)), Err(ReadError::NoSuchPage { .. })));
    }

    let read = load.and(index).and(single);
    if let (Ok(verified), Ok(_)) = (&verified, &chain) {
        check_state_tags(snapshot);
        if snapshot.headers().len() == 1 {
            assert_eq!(verified.data_pages, loaded.len() as u64);
        }
        read.as_ref().expect("a file that was verified can be read");
        let set = set.as_ref().expect("a file that was verified has a good set, or none");
        let mut pages: Vec<_> =
            set.iter().flat_map(|set| set.pages()).map(|(page, _)| page).collect();
        pages.sort_unstable();
        assert!(pages.windows(2).all(|pair| pair[0] != pair[1]), "a page is twice in the set");
    }
    verified.map(drop).and(read).and(metadata).and(states).and(set.map(drop))
}

/// Reads every state; each is found by its tag.
fn read_states<R: ReadAt>(snapshot: &Snapshot<R>) -> Result<(), ReadError> {
    let mut states = Ok(());
    for section in snapshot.sections().iter().filter(|s| s.kind == SectionKind::STATE) {
        states = states.and(snapshot.state(section.tag).map(|state| {
            assert_eq!(state.map(|state| state.tag), Some(section.tag));
        }));
    }
    states
}

fn check_state_tags<R: ReadAt>(snapshot: &Snapshot<R>) {
    let tags = snapshot.sections().iter().filter(|s| s.kind == SectionKind::STATE);
    let mut tags: Vec<_> = tags.map(|section| section.tag).collect();
    tags.sort_unstable();
    assert!(tags.windows(2).all(|pair| pair[0] != pair[1]), "a state that cannot be found");
}
