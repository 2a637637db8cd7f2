//! Copies of sealed files that other keys open: the chunks are the same, and the former keys do not open the copy.

use std::fs;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{
    ChunkBuffer, Codec, Contents, HotPages, KeyError, KeyProvider, MemoryRegion, Metadata, Outline,
    PageIndex, Parent, Parents, Phase, ReadAt, ReadError, Rekey, SecretKey, SectionKind, Snapshot,
    StateBlob, Storage, WorkingSet, WriteError, WriteOptions, rekey_snapshot, write_layer,
    write_with_set,
};

const PAGES: usize = 1200;

fn go(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn key(byte: u8) -> Arc<dyn KeyProvider> {
    Arc::new(SecretKey::new([byte; 32]))
}

fn memory(seed: u8) -> Vec<u8> {
    let mut memory = vec![0; PAGES * PAGE_BYTES];
    for (number, page) in memory.chunks_exact_mut(PAGE_BYTES).enumerate().step_by(3) {
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (at / 7 + number) as u8 ^ seed;
        }
    }
    memory
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Sealed with the key 1, with a state and a working set.
    fn write(&self, name: &str) -> PathBuf {
        let (memory, path) = (memory(0), self.at(name));
        let states = [StateBlob { tag: 1, version: 3, bytes: vec![5; 100] }];
        let touched = [(PageIndex(3), Phase::FirstOutput)];
        let set = WorkingSet::join([&touched[..]]);
        let hot = HotPages::new(&set).front(Codec::Raw);
        let (regions, data) = (regions(), [0..memory.len() as u64]);
        let contents = Contents::new(&regions, &memory, &data).states(&states);
        write_with_set(&path, contents, None, &hot, &sealed(), &go).unwrap();
        path
    }

    fn write_layer(&self, name: &str, parent: &Path) -> PathBuf {
        let (memory, path) = (memory(9), self.at(name));
        let base = open(parent, 1).unwrap();
        let parent = Parent::new(&base, parent.file_name().unwrap());
        let (regions, data) = (regions(), [0..memory.len() as u64]);
        let contents = Contents::new(&regions, &memory, &data);
        write_layer(&path, contents, &parent, &sealed(), &go).unwrap();
        path
    }
}

/// A folder with `old.snap`, sealed with the key 1.
fn original() -> (Files, Snapshot) {
    let files = Files::new();
    let snapshot = open(&files.write("old.snap"), 1).unwrap();
    (files, snapshot)
}

fn regions() -> [MemoryRegion; 1] {
    [MemoryRegion { gpa: 0, len: (PAGES * PAGE_BYTES) as u64, source_offset: 0 }]
}

fn sealed() -> WriteOptions {
    WriteOptions::default().seal(key(1)).codec(Codec::Lz4)
}

fn open(path: &Path, byte: u8) -> Result<Snapshot, ReadError> {
    Snapshot::open_with(path, &Parents { keys: Some(key(byte)), ..Parents::default() })
}

fn new_keys(bytes: &[u8]) -> Rekey<'static> {
    Rekey::new(bytes.iter().copied().map(key).collect(), Metadata::default().tool("rekey"))
}

/// All pages, the state and the working set.
fn everything(snapshot: &Snapshot) -> (Vec<u8>, Option<StateBlob>, Option<WorkingSet>) {
    snapshot.verify_chain(NonZeroUsize::MIN, &go).unwrap();
    let (mut memory, mut buffer) = (vec![0; PAGES * PAGE_BYTES], ChunkBuffer::new());
    for (number, page) in memory.chunks_exact_mut(PAGE_BYTES).enumerate() {
        snapshot.read_page(PageIndex(number as u32), &mut buffer, page).unwrap();
    }
    (memory, snapshot.state(1).unwrap(), snapshot.working_set().unwrap())
}

fn slots(path: &Path) -> usize {
    let outline = Outline::open(fs::File::open(path).unwrap()).unwrap();
    outline.keys().unwrap().slots.len()
}

fn is_wrong_key(opened: Result<Snapshot, ReadError>) -> bool {
    matches!(opened.map(drop), Err(ReadError::Key(KeyError::Wrong)))
}

#[test]
fn only_the_new_key_opens_the_copy() {
    let (files, snapshot) = original();
    let (old, new) = (files.at("old.snap"), files.at("new.snap"));
    let before = fs::read(&old).unwrap();
    let header = rekey_snapshot(&new, &snapshot, &new_keys(&[2]), &go).unwrap();
    assert_ne!(header.id, snapshot.header().id);
    assert!(is_wrong_key(open(&new, 1)));
    let copy = open(&new, 2).unwrap();
    assert_eq!(everything(&copy), everything(&snapshot));
    assert_eq!(copy.metadata().unwrap().tool, "rekey");
    // The original is as it was, and its key opens it.
    assert!(fs::read(&old).unwrap() == before);
    assert!(is_wrong_key(open(&old, 2)));
    // Chunks are the same bytes; no block of another part that is encrypted is.
    let after = fs::read(&new).unwrap();
    let mut compared = 0;
    for section in snapshot.sections() {
        let range = section.offset as usize..(section.end() as usize).min(after.len());
        let blocks = before[range.clone()].chunks_exact(16).zip(after[range].chunks_exact(16));
        let same = blocks.clone().filter(|(before, after)| before == after).count();
        match section.kind {
            SectionKind::CHUNKS => assert_eq!(same, blocks.len()),
            SectionKind::INDEX_LEAVES | SectionKind::INDEX_ROOT | SectionKind::MEMORY_MAP => {
                assert_eq!(same, 0, "{}", section.kind);
                compared += 1;
            }
            _ => {}
        }
    }
    assert_eq!(compared, 3);
}

/// The slots of the copy are authenticated: one cannot be added to it, or taken from another copy.
#[test]
fn the_list_of_keys_cannot_be_changed() {
    let (files, snapshot) = original();
    let (two, one) = (files.at("two.snap"), files.at("one.snap"));
    rekey_snapshot(&two, &snapshot, &new_keys(&[3, 2]), &go).unwrap();
    rekey_snapshot(&one, &snapshot, &new_keys(&[2]), &go).unwrap();
    let keys_of = |path: &Path| {
        let outline = Outline::open(fs::File::open(path).unwrap()).unwrap();
        let kind = SectionKind::KEYS;
        let section = *outline.sections().iter().find(|section| section.kind == kind).unwrap();
        (section.offset as usize, section.len as usize)
    };
    let other = files.at("other.snap");
    rekey_snapshot(&other, &snapshot, &new_keys(&[1]), &go).unwrap();
    let (from, other_len) = keys_of(&other);
    let (to, len) = keys_of(&one);
    assert_eq!(other_len, len);
    let mut forged = fs::read(&one).unwrap();
    let table = u64::from_le_bytes(forged[96..104].try_into().unwrap()) as usize;
    let other_bytes = fs::read(&other).unwrap();
    forged[to..to + len].copy_from_slice(&other_bytes[from..from + len]);
    // With right checksums: of the section, of the table, of the header.
    let crc = crc32fast::hash(&forged[to..to + len]);
    let records = (forged.len() - table) / 40;
    let record = (0..records).map(|at| table + 40 * at).find(|&at| forged[at] == 9).unwrap();
    forged[record + 12..record + 16].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32fast::hash(&forged[table..]);
    forged[108..112].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32fast::hash(&forged[..4092]);
    forged[4092..4096].copy_from_slice(&crc.to_le_bytes());
    fs::write(files.at("forged.snap"), forged).unwrap();
    let error = open(&files.at("forged.snap"), 1).map(drop).unwrap_err();
    assert!(format!("{error:?}").contains("NotAuthentic"), "{error:?}");
    for byte in [2, 3] {
        open(&two, byte).unwrap();
    }
}

#[test]
fn keys_are_added_kept_and_removed() {
    let (files, snapshot) = original();
    let [old, three, one] = ["old.snap", "three.snap", "one.snap"].map(|name| files.at(name));
    rekey_snapshot(&three, &snapshot, &new_keys(&[2, 3]).keep(vec![1]), &go).unwrap();
    assert_eq!((slots(&old), slots(&three)), (1, 3));
    for byte in 1..=3 {
        assert_eq!(everything(&open(&three, byte).unwrap()), everything(&snapshot));
    }
    let snapshot = open(&three, 3).unwrap();
    rekey_snapshot(&one, &snapshot, &new_keys(&[]).keep(vec![2]), &go).unwrap();
    open(&one, 2).unwrap();
    assert!(is_wrong_key(open(&one, 1)) && is_wrong_key(open(&one, 3)));
}

#[test]
fn lists_of_keys_that_no_file_has_are_refused() {
    let (files, snapshot) = original();
    let new = files.at("new.snap");
    let refused = |rekey: Rekey<'_>| {
        let error = rekey_snapshot(&new, &snapshot, &rekey, &go).map(drop).unwrap_err();
        assert!(!new.exists());
        error
    };
    for number in [0, 2, usize::MAX] {
        let error = refused(new_keys(&[2]).keep(vec![number]));
        assert!(
            matches!(error, WriteError::Key(KeyError::NoSuchSlot { number: found, slots: 1 }) if found == number)
        );
    }
    let error = refused(new_keys(&[]));
    assert!(matches!(error, WriteError::Key(KeyError::Slots { found: 0, .. })));
    let error = refused(new_keys(&[2; 16]).keep(vec![1]));
    assert!(matches!(error, WriteError::Key(KeyError::Slots { found: 17, .. })));
    rekey_snapshot(&new, &snapshot, &new_keys(&[2; 15]).keep(vec![1]), &go).unwrap();
    assert_eq!(slots(&new), 16);
}

#[test]
fn a_layer_gets_a_copy_of_its_parent() {
    let files = Files::new();
    let (base, other) = (files.write("base.snap"), files.write("other.snap"));
    let layer = files.write_layer("layer.snap", &base);
    let snapshot = open(&layer, 1).unwrap();
    let new_base = files.at("new-base.snap");
    rekey_snapshot(&new_base, &open(&base, 1).unwrap(), &new_keys(&[2]), &go).unwrap();
    let storage = |path: &Path| Storage::from(fs::File::open(path).unwrap());

    // Without it, the parent is the one of the original, which the new key does not open.
    let alone = files.at("alone.snap");
    rekey_snapshot(&alone, &snapshot, &new_keys(&[2]), &go).unwrap();
    let error = open(&alone, 2).map(drop).unwrap_err();
    assert!(format!("{error:?}").contains("Wrong"), "{error:?}");

    let (to, parent) = (files.at("new.snap"), storage(&new_base));
    let rekey = new_keys(&[2]).parent(Some((&parent, "new-base.snap".into())));
    rekey_snapshot(&to, &snapshot, &rekey, &go).unwrap();
    let copy = open(&to, 2).unwrap();
    assert_eq!(everything(&copy), everything(&snapshot));
    assert!(is_wrong_key(open(&to, 1)));
    let id = open(&new_base, 2).unwrap().header().id;
    assert_eq!(copy.parent_hint().unwrap().unwrap().id, id);

    // Another file with the same memory and the same key is no copy; neither is one that is not sealed.
    let plain = files.at("plain.snap");
    let (memory, regions) = (memory(0), regions());
    let data = [0..memory.len() as u64];
    let contents = Contents::new(&regions, &memory, &data);
    snapfmt::write_snapshot(&plain, contents, &WriteOptions::default(), &go).unwrap();
    for wrong in [&other, &plain, &layer] {
        let parent = storage(wrong);
        let rekey = new_keys(&[2]).parent(Some((&parent, "x".into())));
        let refused = rekey_snapshot(files.at("none.snap"), &snapshot, &rekey, &go);
        assert!(matches!(refused, Err(WriteError::OtherParent { .. })), "{wrong:?}");
        assert!(!files.at("none.snap").exists());
    }
}

/// What its storage has to check is not copied by the kernel.
#[test]
fn storage_without_a_file_to_copy_is_read() {
    struct Read(Vec<u8>);
    impl ReadAt for Read {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            self.0.read_exact_at(buf, offset)
        }
        fn len_bytes(&self) -> std::io::Result<u64> {
            self.0.len_bytes()
        }
    }
    let (files, original) = original();
    let bytes = fs::read(files.at("old.snap")).unwrap();
    let named = [(Read(bytes), PathBuf::new())];
    let snapshot = Snapshot::named_chain_with(named, Some(key(1))).unwrap();
    assert!(snapshot.storage().file_to_copy().is_none());
    rekey_snapshot(files.at("new.snap"), &snapshot, &new_keys(&[2]), &go).unwrap();
    assert_eq!(everything(&open(&files.at("new.snap"), 2).unwrap()), everything(&original));
}

#[test]
fn it_is_whole_or_not_there() {
    let (files, snapshot) = original();
    let (old, new) = (files.at("old.snap"), files.at("new.snap"));
    let stop = |_| ControlFlow::Break(());
    let stopped = rekey_snapshot(&new, &snapshot, &new_keys(&[2]), &stop);
    assert!(matches!(stopped, Err(WriteError::Cancelled)));
    let kept = rekey_snapshot(&old, &snapshot, &new_keys(&[2]), &go);
    assert!(matches!(kept, Err(WriteError::Exists { .. })));
    assert_eq!(fs::read_dir(files.0.path()).unwrap().count(), 1);
    let plain = files.at("plain.snap");
    let (memory, regions) = (memory(0), regions());
    let contents = Contents::new(&regions, &memory, &[]);
    snapfmt::write_snapshot(&plain, contents, &WriteOptions::default(), &go).unwrap();
    let refused =
        rekey_snapshot(&new, &Snapshot::open(&plain).unwrap(), &new_keys(&[2]), &go).map(drop);
    assert!(matches!(refused, Err(WriteError::Original(ReadError::NotSealed))));
    assert!(!new.exists());
}
