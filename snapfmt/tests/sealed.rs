//! Sealed files: only the key opens them, and nothing in them can be changed without it.

use std::fs;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{
    Changes, ChunkBuffer, Codec, Contents, Existing, HotPages, KeyError, KeyProvider, MemoryRegion,
    Metadata, Outline, PageEntry, PageIndex, Parent, Parents, Phase, Problem, ReadError, ReadOrder,
    SecretKey, SectionKind, Snapshot, StateBlob, WorkingSet, WriteError, WriteOptions,
    copy_snapshot, write_layer, write_with_set,
};

const MARK: &[u8] = b"a secret of the guest that must not be in the file";
const PAGES: u32 = 1200;
const THREADS: NonZeroUsize = NonZeroUsize::MIN;

fn go(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn key(byte: u8) -> Arc<dyn KeyProvider> {
    Arc::new(SecretKey::new([byte; 32]))
}

/// Three leaves: pages that repeat, pages that compress, pages that do not, and zeros.
fn memory() -> Vec<u8> {
    let mut memory = vec![0; PAGES as usize * PAGE_BYTES];
    for (number, page) in memory.chunks_exact_mut(PAGE_BYTES).enumerate() {
        match number % 5 {
            0 => page[..MARK.len()].copy_from_slice(MARK),
            1 => page.fill(number as u8 | 1),
            2 => {
                let mut word = number as u64;
                for part in page.chunks_exact_mut(8) {
                    word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    part.copy_from_slice(&(word ^ word >> 32).to_le_bytes());
                }
            }
            _ => {}
        }
    }
    memory
}

fn states() -> Vec<StateBlob> {
    vec![
        StateBlob { tag: 1, version: 3, bytes: MARK.repeat(20) },
        StateBlob { tag: 2, version: 1, bytes: Vec::new() },
    ]
}

fn set() -> WorkingSet {
    let touched = [(PageIndex(7), Phase::FirstOutput), (PageIndex(600), Phase::Later)];
    WorkingSet::join([&touched[..]])
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, memory: &[u8], options: &WriteOptions) -> PathBuf {
        self.write_on(name, memory, None, options).unwrap()
    }

    fn write_on(
        &self,
        name: &str,
        memory: &[u8],
        parent: Option<&Parent<'_>>,
        options: &WriteOptions,
    ) -> Result<PathBuf, WriteError> {
        let path = self.at(name);
        let len = memory.len() as u64;
        let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
        let (memory, states, set) = (memory.to_vec(), states(), set());
        let data = [0..len];
        let metadata = Metadata::default().tool(String::from_utf8_lossy(MARK));
        let contents = Contents::new(&regions, &memory, &data).states(&states).metadata(metadata);
        let hot = HotPages::new(&set).front(Codec::Raw);
        write_with_set(&path, contents, parent, &hot, options, &go)?;
        Ok(path)
    }
}

fn sealed() -> WriteOptions {
    WriteOptions::default().seal(key(1)).codec(Codec::Lz4)
}

fn open(path: &Path, keys: Option<Arc<dyn KeyProvider>>) -> Result<Snapshot, ReadError> {
    let parents = Parents { keys, ..Parents::default() };
    Snapshot::open_with(path, &parents)
}

fn open_bytes(bytes: &[u8]) -> Result<Snapshot<&[u8]>, ReadError> {
    Snapshot::named_chain_with([(bytes, PathBuf::new())], Some(key(1)))
}

/// A folder with `a.snap`, sealed with the key 1.
fn written(options: &WriteOptions) -> (Files, Snapshot) {
    let files = Files::new();
    let path = files.write("a.snap", &memory(), options);
    let snapshot = open(&path, Some(key(1))).unwrap();
    (files, snapshot)
}

/// All that a snapshot holds.
#[derive(Debug, PartialEq)]
struct Everything {
    memory: Vec<u8>,
    states: Vec<StateBlob>,
    tool: String,
    set: Option<WorkingSet>,
}

fn everything<R: snapfmt::ReadAt>(snapshot: &Snapshot<R>) -> Result<Everything, ReadError> {
    let memory = Mutex::new(vec![0; snapshot.header().memory_bytes as usize]);
    let place = |offset: u64, bytes: &[u8]| {
        let start = offset as usize;
        memory.lock().unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
    };
    snapshot.load(THREADS, &place, &go)?;
    let states = [1, 2].into_iter().filter_map(|tag| snapshot.state(tag).transpose());
    Ok(Everything {
        memory: memory.into_inner().unwrap(),
        states: states.collect::<Result<_, _>>()?,
        tool: snapshot.metadata()?.tool,
        set: snapshot.working_set()?,
    })
}

fn expected() -> Everything {
    let tool = String::from_utf8_lossy(MARK).into_owned();
    Everything { memory: memory(), states: states(), tool, set: Some(set()) }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn what_is_sealed_is_read_with_the_key_and_is_not_in_the_file() {
    let files = Files::new();
    for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
        if codec == Codec::Zstd && !cfg!(feature = "zstd") {
            continue;
        }
        for chunk_pages in [1, 8, 512] {
            let options = sealed().codec(codec).chunk_pages(chunk_pages);
            let path = files.write("a.snap", &memory(), &options.existing(Existing::Replace));
            assert!(!contains(&fs::read(&path).unwrap(), &MARK[..16]));
            let snapshot = open(&path, Some(key(1))).unwrap();
            assert!(snapshot.header().is_sealed());
            assert_eq!(everything(&snapshot).unwrap(), expected());
            let verified = snapshot.verify(THREADS, &go).unwrap();
            let outline = Outline::open(snapfmt::open_file(&path).unwrap()).unwrap();
            let without_key = outline.verify(THREADS, &go).unwrap();
            assert_eq!(without_key.chunks, verified.chunks);
            assert_eq!(without_key.stored_pages, verified.stored_pages);
        }
    }
}

#[test]
fn the_same_key_is_needed() {
    let (files, _) = written(&sealed());
    let path = files.at("a.snap");
    assert!(matches!(open(&path, None), Err(ReadError::KeyNeeded)));
    let wrong = open(&path, Some(key(2)));
    assert!(matches!(wrong, Err(ReadError::Key(KeyError::Wrong))));
    let plain = files.write("plain.snap", &memory(), &WriteOptions::default());
    assert!(matches!(open(&plain, Some(key(1))), Err(ReadError::NotSealed)));
    assert_eq!(everything(&open(&plain, None).unwrap()).unwrap(), expected());
    let outline = Outline::open(snapfmt::open_file(&plain).unwrap()).unwrap();
    assert!(!outline.header().is_sealed() && outline.keys().is_none());
}

/// A chunk that was read ahead may be decoded twice.
#[test]
fn decoding_does_not_change_what_was_read() {
    let (_files, snapshot) = written(&sealed().codec(Codec::Raw));
    let mut chunks = Vec::new();
    snapshot
        .for_each_entry(0..1, |_, entry| {
            if let PageEntry::Data { chunk, .. } = entry {
                chunks.push(chunk);
            }
            Ok(())
        })
        .unwrap();
    chunks.sort_unstable();
    chunks.dedup();
    let mut buffer = ChunkBuffer::new();
    snapshot.fetch_chunk_ahead(chunks[0], u64::MAX, ReadOrder::Sequential, &mut buffer).unwrap();
    let mut first = Vec::new();
    for round in 0..2 {
        for (at, chunk) in chunks[..4].iter().enumerate() {
            assert_eq!(
                snapshot
                    .fetch_chunk_ahead(*chunk, u64::MAX, ReadOrder::Sequential, &mut buffer)
                    .unwrap(),
                0,
                "{round}"
            );
            let decoded = snapshot.decode_chunk(*chunk, &mut buffer).unwrap().bytes().to_vec();
            match round {
                0 => first.push(decoded),
                _ => assert_eq!(decoded, first[at]),
            }
        }
    }
}

#[test]
fn layers_are_sealed_as_their_parents_are() {
    let files = Files::new();
    let (base, plain) = (
        files.write("base.snap", &memory(), &sealed()),
        files.write("plain.snap", &memory(), &WriteOptions::default()),
    );
    let mut changed = memory();
    changed[3 * PAGE_BYTES..5 * PAGE_BYTES].fill(9);
    changed[0..PAGE_BYTES].fill(0);
    let base = open(&base, Some(key(1))).unwrap();
    let plain = open(&plain, None).unwrap();
    let (on_base, on_plain) = (Parent::new(&base, "base.snap"), Parent::new(&plain, "plain.snap"));
    let layer = files.write_on("layer.snap", &changed, Some(&on_base), &sealed()).unwrap();
    let opened = open(&layer, Some(key(1))).unwrap();
    assert_eq!(everything(&opened).unwrap(), Everything { memory: changed.clone(), ..expected() });
    assert_eq!(opened.verify_chain(THREADS, &go).unwrap().len(), 2);
    let hint = opened.parent_hint().unwrap().unwrap();
    let header = &fs::read(files.at("base.snap")).unwrap()[..4096];
    assert_eq!(hint.header_hash, Some(*blake3::hash(header).as_bytes()));
    for (parent, options, parent_is_sealed) in
        [(&on_base, WriteOptions::default(), true), (&on_plain, sealed(), false)]
    {
        let refused = files.write_on("none.snap", &changed, Some(parent), &options);
        let Err(WriteError::ParentSeal { parent_is_sealed: found }) = refused else { panic!() };
        assert_eq!(found, parent_is_sealed);
        assert!(!files.at("none.snap").exists());
    }
    // Sealed with another key: that of the chain opens one file only.
    let other =
        files.write_on("other.snap", &changed, Some(&on_base), &sealed().seal(key(2))).unwrap();
    let Err(ReadError::Chain(error)) = open(&other, Some(key(2))) else { panic!() };
    assert!(format!("{error:?}").contains("Wrong"), "{error:?}");
    let storage = snapfmt::Storage::from(fs::File::open(&layer).unwrap());
    assert!(matches!(Snapshot::parent_hint_of(storage, None), Err(ReadError::KeyNeeded)));
    let storage = snapfmt::Storage::from(fs::File::open(files.at("base.snap")).unwrap());
    assert_eq!(Snapshot::parent_hint_of(storage, None).unwrap(), None);
}

#[test]
fn a_copy_has_the_chunks_and_other_keys_for_all_else() {
    let (files, snapshot) = written(&sealed());
    let path = files.at("a.snap");
    let changes = Changes::new(WorkingSet::default(), Metadata::default().tool("copy"));
    let copy = files.at("copy.snap");
    copy_snapshot(&copy, &snapshot, &changes, &go).unwrap();
    let opened = open(&copy, Some(key(1))).unwrap();
    let expected =
        Everything { tool: "copy".into(), set: Some(WorkingSet::default()), ..expected() };
    assert_eq!(everything(&opened).unwrap(), expected);
    opened.verify(THREADS, &go).unwrap();
    // One nonce encrypts one text only: at the same offset, each block of the copy is another one.
    let [old, new] = [&path, &copy].map(|path| fs::read(path).unwrap());
    let mut compared = 0;
    for section in snapshot.sections() {
        let range = section.offset as usize..section.end() as usize;
        let blocks = old[range.clone()].chunks(16).zip(new[range.clone()].chunks(16));
        let same = blocks.clone().filter(|(old, new)| old == new && old.len() == 16).count();
        match section.kind {
            SectionKind::CHUNKS => assert_eq!(same, range.len() / 16),
            SectionKind::INDEX_LEAVES | SectionKind::INDEX_ROOT | SectionKind::MEMORY_MAP => {
                assert_eq!(same, 0, "{}", section.kind);
                compared += 1;
            }
            _ => {}
        }
    }
    assert_eq!(compared, 3);
    // A section of the copy does not fit the original, though the file key is the same.
    let of = |snapshot: &Snapshot, kind| {
        let mut found = snapshot.sections().iter().filter(move |section| section.kind == kind);
        found.next().map(|section| section.offset as usize..section.end() as usize).unwrap()
    };
    let kind = SectionKind::INDEX_LEAVES;
    assert_eq!(of(&snapshot, kind), of(&opened, kind));
    let mut mixed = old.clone();
    mixed[of(&snapshot, kind)].copy_from_slice(&new[of(&opened, kind)]);
    refused(&mut mixed, "leaves of the copy");
}

/// Two files of the same memory have nothing in common.
#[test]
fn each_written_file_has_its_own_keys() {
    let files = Files::new();
    let [one, two] = ["one.snap", "two.snap"].map(|name| {
        let path = files.write(name, &memory(), &sealed().dedupe(false));
        (open(&path, Some(key(1))).unwrap(), fs::read(path).unwrap())
    });
    assert_eq!(one.0.sections().len(), two.0.sections().len());
    // Without headers of chunks and page lists, which are not encrypted.
    let mut same = 0;
    for section in one.0.sections().iter().filter(|section| section.kind != SectionKind::CHUNKS) {
        let range = section.offset as usize..section.end() as usize;
        let blocks = one.1[range.clone()].chunks_exact(16).zip(two.1[range].chunks_exact(16));
        same += blocks.filter(|(one, two)| one == two).count();
    }
    assert_eq!(same, 0);
    let mut buffers = [ChunkBuffer::new(), ChunkBuffer::new()];
    let mut chunks = 0;
    one.0
        .for_each_entry(0..one.0.leaf_count(), |_, entry| {
            let PageEntry::Data { chunk, .. } = entry else { return Ok(()) };
            // It can be decoded where it belongs, and only there.
            one.0.chunk(chunk, &mut buffers[0])?;
            let range = chunk.offset() as usize..chunk.end() as usize;
            let mut mixed = two.1.clone();
            mixed[range.clone()].copy_from_slice(&one.1[range]);
            if chunks == 0 {
                fix_checksums(&mut mixed);
                let mixed = open_bytes(&mixed)?;
                let read = mixed.chunk(chunk, &mut buffers[1]).map(drop);
                assert!(is_not_authentic(&read.unwrap_err()));
            }
            chunks += 1;
            Ok(())
        })
        .unwrap();
    assert!(chunks > 100);
}

#[test]
fn parts_cannot_change_places() {
    let (files, snapshot) = written(&sealed().codec(Codec::Raw).dedupe(false));
    let bytes = fs::read(files.at("a.snap")).unwrap();
    let place = |page| match snapshot.entry(PageIndex(page)).unwrap() {
        PageEntry::Data { chunk, .. } => chunk.offset() as usize..chunk.end() as usize,
        other => panic!("{other:?}"),
    };
    let swap = |a: std::ops::Range<usize>, b: std::ops::Range<usize>| {
        assert!(a.len() == b.len() && a != b);
        let mut swapped = bytes.clone();
        swapped[a.clone()].copy_from_slice(&bytes[b.clone()]);
        swapped[b].copy_from_slice(&bytes[a]);
        swapped
    };
    // The header of each chunk has its offset. A forger corrects that.
    let mut moved = swap(place(100), place(200));
    for at in [place(100).start, place(200).start] {
        moved[at + 16..at + 24].copy_from_slice(&(at as u64).to_le_bytes());
    }
    refused(&mut moved, "two chunks with their offsets");
    let leaves = snapshot.sections().iter().find(|s| s.kind == SectionKind::INDEX_LEAVES).unwrap();
    let leaf = |number: usize| {
        let start = leaves.offset as usize + number * 4096;
        start..start + 4096
    };
    refused(&mut swap(leaf(0), leaf(1)), "two leaves");
    for len in [bytes.len() - 1, bytes.len() - 4096, 5000, 4096, 100, 0] {
        let cut = &bytes[..len];
        assert!(matches!(open_bytes(cut), Err(ReadError::WrongLength { .. })), "{len}");
    }
}

/// Reading it fails because it is not authentic, when all of its checksums are right.
fn refused(bytes: &mut [u8], what: &str) {
    fix_checksums(bytes);
    let read = open_bytes(bytes).and_then(|snapshot| everything(&snapshot));
    let error = read.expect_err(what);
    assert!(is_not_authentic(&error), "{what}: {error:?}");
    let verified = open_bytes(bytes).and_then(|snapshot| snapshot.verify(THREADS, &go));
    verified.expect_err(what);
}

fn is_not_authentic(error: &ReadError) -> bool {
    matches!(error, ReadError::Corrupt(corruption) if corruption.problem == Problem::NotAuthentic)
}

fn number(bytes: &[u8], at: usize, len: usize) -> usize {
    bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// Corrects all checksums that can be corrected without a key, as a forger would.
fn fix_checksums(file: &mut [u8]) {
    let table = number(file, 96, 8)..number(file, 96, 8) + number(file, 104, 4) * 40;
    if table.end > file.len() || table.start < 4096 {
        return;
    }
    for record in table.clone().step_by(40) {
        let (kind, start, len) =
            (number(file, record, 4), number(file, record + 16, 8), number(file, record + 24, 8));
        let Some(end) = start.checked_add(len).filter(|end| *end <= file.len()) else { continue };
        if kind == 1 {
            fix_chunks(file, start, end);
        } else {
            let crc = crc32fast::hash(&file[start..end]);
            file[record + 12..record + 16].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let crc = crc32fast::hash(&file[table]);
    file[108..112].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32fast::hash(&file[..4092]);
    file[4092..4096].copy_from_slice(&crc.to_le_bytes());
}

fn fix_chunks(file: &mut [u8], start: usize, end: usize) {
    let seed = crc32fast::hash(&file[152..168]);
    let mut at = start;
    while at + 32 <= end {
        let (pages, payload) = (number(file, at + 6, 2), number(file, at + 8, 4));
        let next = at + (32 + 4 * pages + payload + 16).next_multiple_of(64);
        if next > end {
            return;
        }
        let mut hasher = crc32fast::Hasher::new_with_initial(seed);
        hasher.update(&file[at + 32..next]);
        file[at + 12..at + 16].copy_from_slice(&hasher.finalize().to_le_bytes());
        let crc = crc32fast::hash(&file[at..at + 28]);
        file[at + 28..at + 32].copy_from_slice(&crc.to_le_bytes());
        at = next;
    }
}

/// Where the parts of a file are that a forger would change.
fn interesting(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let table = number(bytes, 96, 8)..bytes.len();
    let sections = table.clone().step_by(40).map(|record| {
        let start = number(bytes, record + 16, 8);
        start..start + number(bytes, record + 24, 8)
    });
    let mut places: Vec<_> = sections.collect();
    // The first chunks, whose headers and lists are not encrypted.
    let chunks = places[0].start;
    places.extend([0..256, 168..200, table, chunks..chunks + 64, chunks + 32..chunks + 600]);
    places
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A forger who corrects all checksums changes nothing that is used: each change is an error, or has no effect.
    #[test]
    fn no_change_of_any_byte_goes_unnoticed(
        place in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        flip in 1u8..,
        more in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
    ) {
        let original = template();
        let mut bytes = original.clone();
        let places: Vec<_> =
            interesting(&bytes).into_iter().filter(|place| !place.is_empty()).collect();
        let place = places[place.index(places.len())].clone();
        bytes[place.start + at.index(place.len())] ^= flip;
        for (at, value) in more {
            bytes[place.start + at.index(place.len())] = value;
        }
        fix_checksums(&mut bytes);
        let read = open_bytes(&bytes).and_then(|snapshot| everything(&snapshot));
        if let Ok(found) = read {
            prop_assert_eq!(found, expected());
            // Checksums only, or bytes that are not read: those do not verify.
            let verified = open_bytes(&bytes).and_then(|snapshot| snapshot.verify(THREADS, &go));
            prop_assert!(bytes == original || verified.is_err());
        }
    }
}

fn template() -> Vec<u8> {
    static TEMPLATE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    let make = || {
        let (files, _) = written(&sealed());
        fs::read(files.at("a.snap")).unwrap()
    };
    TEMPLATE.get_or_init(make).clone()
}

/// Damage is found without a key; forgery is not.
#[test]
fn checksums_cover_the_ciphertext() {
    let bytes = template();
    let verify = |bytes: &[u8]| Outline::open(bytes)?.verify(THREADS, &go);
    verify(&bytes).unwrap();
    for place in interesting(&bytes).into_iter().filter(|place| !place.is_empty()) {
        for at in [place.start, place.start + place.len() / 2, place.end - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            verify(&damaged).expect_err("it is damaged");
        }
    }
    let states = Outline::open(&bytes[..]).unwrap();
    let state = states.sections().iter().find(|s| s.kind == SectionKind::STATE).unwrap();
    let mut forged = bytes.clone();
    forged[state.offset as usize] ^= 1;
    fix_checksums(&mut forged);
    verify(&forged).unwrap();
    refused(&mut forged, "a state");
}

/// A reader that does not know the feature refuses the file.
#[test]
fn the_feature_bit_is_set() {
    assert_eq!(template()[16..24], [0b110, 0, 0, 0, 0, 0, 0, 0]);
    let error = ReadError::UnsupportedFeatures { unknown: 4 };
    assert!(error.to_string().contains("features 0x4"));
}

/// A provider that fails says why, and no file is written.
#[test]
fn a_file_is_not_written_without_its_key() {
    #[derive(Debug)]
    struct NoKeys;
    impl KeyProvider for NoKeys {
        fn unwrap_key(&self, _: &snapfmt::KeySlots) -> Result<SecretKey, KeyError> {
            Err(KeyError::Provider("the key server is away".into()))
        }
        fn wrap_key(
            &self,
            _: &SecretKey,
            _: uuid::Uuid,
        ) -> Result<Vec<snapfmt::KeySlot>, KeyError> {
            Err(KeyError::Provider("the key server is away".into()))
        }
    }
    let files = Files::new();
    let memory = memory();
    let keys: Arc<dyn KeyProvider> = Arc::new(NoKeys);
    let refused =
        files.write_on("a.snap", &memory, None, &WriteOptions::default().seal(Arc::clone(&keys)));
    assert!(matches!(refused, Err(WriteError::Key(KeyError::Provider(_)))));
    assert_eq!(fs::read_dir(files.0.path()).unwrap().count(), 0);
    let path = files.write("a.snap", &memory, &sealed());
    let error = open(&path, Some(keys)).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "the key server is away");
}

#[test]
fn write_layer_checks_the_seal_too() {
    let (files, base) = written(&sealed());
    let memory = memory();
    let contents = Contents::new(base.regions(), &memory, &[]);
    let parent = Parent::new(&base, "a.snap");
    let written = write_layer(files.at("l.snap"), contents, &parent, &WriteOptions::default(), &go);
    assert!(matches!(written, Err(WriteError::ParentSeal { parent_is_sealed: true })));
}
