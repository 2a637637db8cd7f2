//! Another snapshot of the same guest overwrites an open file: later reads are errors, and never return a page of the
//! other one. This is tested with BOUND, and without it, where only the file's times show the change.

#[path = "../fuzz/harness/seal.rs"]
#[allow(dead_code, reason = "shared with the fuzz targets")]
mod seal;

use std::fs::{File, FileTimes, OpenOptions};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use snapfmt::layout::{INCOMPAT_BOUND, INCOMPAT_LAYERED, PAGE_BYTES as PAGE};
use snapfmt::{
    Changes, ChunkBuffer, Codec, Contents, MemoryRegion, Metadata, PageEntry, PageIndex, Parent,
    ReadAt, ReadError, ReadOrder, Snapshot, Stamp, StateBlob, WorkingSet, WriteError, WriteOptions,
    copy_snapshot, write_layer, write_snapshot,
};

const PAGES: usize = 600;

fn go_on(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Memory of the same guest at two times: the same pages are in use, with other bytes. It is equally compressible, so
/// that chunks of any codec may have the same lengths and places.
fn memory(time: u8) -> Vec<u8> {
    let mut memory = vec![0; PAGES * PAGE];
    for (number, page) in memory.chunks_mut(PAGE).enumerate().filter(|(number, _)| number % 3 > 0) {
        page[8..16].copy_from_slice(&(number as u64).to_le_bytes());
        page[16] = 0x80 | time;
    }
    memory
}

fn contents<'a>(memory: &'a dyn ReadAt, states: &'a [StateBlob]) -> Contents<'a> {
    const LEN: u64 = (PAGES * PAGE) as u64;
    let metadata = Metadata::default().tool("test");
    Contents::new(&[MemoryRegion { gpa: 0, len: LEN, source_offset: 0 }], memory, &[0..LEN])
        .states(states)
        .metadata(metadata)
}

fn store(path: &Path, time: u8, codec: Codec, parent: Option<&Path>) {
    let options = WriteOptions::default().codec(codec).chunk_pages(4);
    let states = [StateBlob { tag: 1, version: 1, bytes: vec![time; 40] }];
    let memory = memory(time);
    match parent {
        None => write_snapshot(path, contents(&memory, &states), &options, &go_on).unwrap(),
        Some(file) => {
            let snapshot = Snapshot::open(file).unwrap();
            let parent = Parent::new(&snapshot, file);
            write_layer(path, contents(&memory, &states), &parent, &options, &go_on).unwrap()
        }
    };
}

/// Makes a file without BOUND, as older versions wrote it.
fn unbind(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[16] &= !(INCOMPAT_BOUND as u8);
    bytes[152..168].fill(0);
    seal::seal(&mut bytes, seal::CHUNKS | seal::HEADER);
    std::fs::write(path, bytes).unwrap();
}

/// Writes the bytes of one file over another, as `cp` does, but never shorter meanwhile.
fn write_over(path: &Path, other: &Path) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let bytes = std::fs::read(other).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

struct Pair {
    _folder: tempfile::TempDir,
    path: PathBuf,
    other: PathBuf,
}

/// Two snapshots of one guest, whose chunks are at the same places.
fn pair(codec: Codec, bound: bool) -> Pair {
    let folder = tempfile::tempdir().unwrap();
    let [path, other] = ["a.snap", "b.snap"].map(|name| folder.path().join(name));
    store(&path, 1, codec, None);
    store(&other, 2, codec, None);
    if !bound {
        unbind(&path);
        unbind(&other);
    }
    wait_for_a_later_time(folder.path(), &path);
    let snapshots = [&path, &other].map(|path| Snapshot::open(path).unwrap());
    assert_eq!(snapshots[0].header().chunks_id.is_some(), bound);
    for page in (0..PAGES as u32).map(PageIndex) {
        // This makes it dangerous: the index of one points to good chunks of the other.
        assert_eq!(snapshots[0].entry(page).unwrap(), snapshots[1].entry(page).unwrap());
    }
    Pair { _folder: folder, path, other }
}

/// Waits until a write gets a later time than the file has: before Linux 6.13, times advance in ticks.
fn wait_for_a_later_time(folder: &Path, path: &Path) {
    let changed = |path: &Path| File::open(path).unwrap().stamp().unwrap().unwrap().changed_ns;
    let (probe, then) = (folder.join("probe"), changed(path));
    loop {
        std::fs::write(&probe, b"now").unwrap();
        if changed(&probe) > then {
            return;
        }
        std::thread::yield_now();
    }
}

fn codecs() -> impl Iterator<Item = Codec> {
    Codec::ALL.into_iter().filter(|codec| cfg!(feature = "zstd") || *codec != Codec::Zstd)
}

/// All ways to read pages, each with an error now. Bytes that were returned before it belong to the opened snapshot.
#[track_caller]
fn refused(snapshot: &Snapshot, memory: &[u8]) -> ReadError {
    let mut buffer = ChunkBuffer::new();
    for page in (0..PAGES as u32).map(PageIndex) {
        let PageEntry::Data { chunk, .. } = snapshot.entry(page).unwrap() else { continue };
        assert!(is_changed(&snapshot.page(page, &mut buffer).map(drop)), "{page:?}");
        let ahead = snapshot
            .fetch_chunk_ahead(chunk, u64::MAX, ReadOrder::Sequential, &mut buffer)
            .and_then(|_| snapshot.decode_chunk(chunk, &mut buffer).map(drop));
        assert!(is_changed(&ahead), "{page:?}");
    }
    let place = |offset: u64, bytes: &[u8]| {
        assert!(memory[offset as usize..][..bytes.len()] == *bytes, "of the other one");
    };
    let loaded = snapshot.load(NonZeroUsize::new(2).unwrap(), &place, &go_on).map(drop);
    assert!(is_changed(&loaded), "{loaded:?}");
    let verified = snapshot.verify(NonZeroUsize::MIN, &go_on).map(drop);
    assert!(is_changed(&verified), "{verified:?}");
    loaded.unwrap_err()
}

fn is_changed<T>(result: &Result<T, ReadError>) -> bool {
    result.as_ref().is_err_and(|error| matches!(error.root(), ReadError::Changed { .. }))
}

#[test]
fn pages_of_an_overwriting_snapshot_are_not_returned() {
    for (codec, bound) in codecs().flat_map(|codec| [(codec, true), (codec, false)]) {
        let Pair { path, other, .. } = &pair(codec, bound);
        let snapshot = Snapshot::open(path).unwrap();
        for page in (0..PAGES as u32).map(PageIndex) {
            // The index is in memory: only chunks are read after this.
            snapshot.entry(page).unwrap();
        }
        write_over(path, other);
        let error = refused(&snapshot, &memory(1));
        let text = error.to_string();
        assert!(text.contains("was written to after it was opened"), "{codec}: {text}");
        assert!(text.contains("renaming a new file over it"), "{codec}: {text}");
        let ReadError::Changed { source, .. } = error else { unreachable!() };
        // With BOUND the checksums show it, without it only the times do.
        assert_eq!(source.is_some(), bound, "{codec}: {source:?}");
        // Other parts were overwritten too, and their new content does not match what was opened.
        assert!(is_changed(&snapshot.state(1)), "{codec}");
        Snapshot::open(path).unwrap().verify(NonZeroUsize::MIN, &go_on).unwrap();
    }
}

/// `cp -p`, `rsync -t` and `tar` set the time of modification: here to the very same.
#[test]
fn a_time_that_was_set_back_hides_no_write() {
    for bound in [true, false] {
        let Pair { path, other, .. } = &pair(Codec::Raw, bound);
        let snapshot = Snapshot::open(path).unwrap();
        let modified = path.metadata().unwrap().modified().unwrap();
        write_over(path, other);
        let file = File::options().write(true).open(path).unwrap();
        file.set_times(FileTimes::new().set_modified(modified)).unwrap();
        let Stamp { len_bytes, modified_ns, .. } = file.stamp().unwrap().unwrap();
        let mut buffer = ChunkBuffer::new();
        let error = snapshot.page(PageIndex(1), &mut buffer).map(drop).unwrap_err();
        match (bound, error) {
            (false, ReadError::Changed { opened, found, source: None }) => {
                assert_eq!((opened.len_bytes, opened.modified_ns), (len_bytes, modified_ns));
                assert_ne!(opened.changed_ns, found.changed_ns);
            }
            (true, ReadError::Changed { source: Some(_), .. }) => {}
            (_, error) => panic!("{error:?}"),
        }
    }
}

/// Names, modes and owners are not the content: a guest that runs from the file is left alone.
#[test]
fn a_file_that_is_renamed_linked_or_unlinked_is_the_same() {
    for bound in [true, false] {
        let Pair { path, other, _folder: folder } = &pair(Codec::Lz4, bound);
        let (snapshot, memory) = (Snapshot::open(path).unwrap(), memory(1));
        let read_all = |what: &str| {
            let (mut buffer, mut bytes) = (ChunkBuffer::new(), [0; PAGE]);
            for page in (0..PAGES as u32).map(PageIndex) {
                snapshot.read_page(page, &mut buffer, &mut bytes).expect(what);
                assert!(memory[page.source_offset() as usize..][..PAGE] == bytes, "{what}");
            }
            snapshot.verify(NonZeroUsize::MIN, &go_on).expect(what);
        };
        read_all("unchanged");
        let stamp = || snapshot.storage().stamp().unwrap().unwrap();
        let opened = stamp();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o400)).unwrap();
        assert_ne!(opened, stamp(), "the change time shows the mode");
        read_all("with another mode");
        let link = folder.path().join("link");
        std::fs::hard_link(path, &link).unwrap();
        read_all("linked");
        // The way to replace a snapshot.
        std::fs::rename(other, path).unwrap();
        read_all("replaced by renaming");
        std::fs::remove_file(&link).unwrap();
        read_all("without a name");
    }
}

/// An error in a parent names the parent; the layer above it has not changed.
#[test]
fn an_overwritten_parent_is_named() {
    for bound in [true, false] {
        let Pair { path, other, _folder: folder } = &pair(Codec::Raw, bound);
        let layer = folder.path().join("layer.snap");
        store(&layer, 1, Codec::Raw, Some(path));
        let snapshot = Snapshot::open(&layer).unwrap();
        assert_eq!(snapshot.header().incompat, INCOMPAT_BOUND | INCOMPAT_LAYERED);
        assert_eq!(snapshot.header().data_pages, 0);
        write_over(path, other);
        let error = snapshot.page(PageIndex(1), &mut ChunkBuffer::new()).map(drop).unwrap_err();
        let ReadError::InParent { path: Some(named), layer: 1, source, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(named, path);
        assert!(matches!(**source, ReadError::Changed { .. }));
        // A layer of the old snapshot does not accept the new one as its parent either.
        assert!(Snapshot::open(&layer).is_err());
    }
}

/// A file with the chunks of another one when it is opened: it does not change afterwards, so only BOUND detects this.
#[test]
fn a_file_that_was_mixed_before_it_was_opened_is_refused() {
    for codec in codecs() {
        let Pair { path, other, .. } = &pair(codec, true);
        let chunks = {
            let snapshot = Snapshot::open(path).unwrap();
            *snapshot.sections().iter().find(|s| s.kind == snapfmt::SectionKind::CHUNKS).unwrap()
        };
        let chunks = chunks.offset as usize..chunks.end() as usize;
        let mut mixed = std::fs::read(path).unwrap();
        mixed[chunks.clone()].copy_from_slice(&std::fs::read(other).unwrap()[chunks]);
        std::fs::write(path, mixed).unwrap();
        let snapshot = Snapshot::open(path).unwrap();
        let verified = snapshot.verify(NonZeroUsize::MIN, &go_on).unwrap_err();
        assert!(matches!(verified, ReadError::Corrupt(_)), "{codec}: {verified:?}");
        assert!(snapshot.page(PageIndex(1), &mut ChunkBuffer::new()).is_err(), "{codec}");
    }
}

/// The copy would be damaged without a later error, because its chunks are not checked.
#[test]
fn a_snapshot_that_is_overwritten_while_it_is_copied_has_no_copy() {
    for bound in [true, false] {
        let Pair { path, other, _folder: folder } = &pair(Codec::Raw, bound);
        let snapshot = Snapshot::open(path).unwrap();
        let changes = Changes::new(WorkingSet::join([&[][..]]), snapshot.metadata().unwrap());
        let written = AtomicBool::new(false);
        let copy = folder.path().join("copy.snap");
        let at_once = |_| {
            if !written.swap(true, Ordering::SeqCst) {
                write_over(path, other);
            }
            ControlFlow::Continue(())
        };
        let copied = copy_snapshot(&copy, &snapshot, &changes, &at_once);
        let error = copied.map(drop).unwrap_err();
        assert!(matches!(error, WriteError::Original(ReadError::Changed { .. })), "{error:?}");
        assert!(!copy.exists());
    }
}

/// A copy has the chunks of its original, at the same places, with the same chunks_id. So one may replace the other.
#[test]
fn a_copy_that_replaces_its_original_has_the_same_pages() {
    for bound in [true, false] {
        let Pair { path, _folder: folder, .. } = &pair(Codec::Lz4, bound);
        let snapshot = Snapshot::open(path).unwrap();
        let changes = Changes::new(WorkingSet::join([&[][..]]), snapshot.metadata().unwrap());
        let copies = ["first", "second"].map(|name| folder.path().join(name));
        copy_snapshot(&copies[0], &snapshot, &changes, &go_on).unwrap();
        let first = Snapshot::open(&copies[0]).unwrap();
        copy_snapshot(&copies[1], &first, &changes, &go_on).unwrap();
        for copy in &copies {
            let copy = Snapshot::open(copy).unwrap();
            copy.verify(NonZeroUsize::MIN, &go_on).unwrap();
            assert_ne!(copy.header().id, snapshot.header().id);
            assert_eq!(copy.header().chunks_id, snapshot.header().chunks_id);
            assert_eq!(copy.header().chunks_id, bound.then_some(snapshot.header().id));
        }
        write_over(path, &copies[1]);
        let mut buffer = ChunkBuffer::new();
        let read = snapshot.page(PageIndex(1), &mut buffer);
        match bound {
            true => assert!(read.unwrap() == Some(&memory(1)[PAGE..2 * PAGE])),
            // The error reports only that it was written to.
            false => assert!(is_changed(&read)),
        }
    }
}

/// Storage that is overwritten at a read.
struct WrittenAt<'a> {
    file: File,
    reads: AtomicUsize,
    other: &'a Path,
    path: &'a Path,
}

impl ReadAt for WrittenAt<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        if self.reads.fetch_sub(1, Ordering::SeqCst) == 0 {
            write_over(self.path, self.other);
        }
        ReadAt::read_exact_at(&self.file, buf, offset)
    }

    fn len_bytes(&self) -> std::io::Result<u64> {
        self.file.len_bytes()
    }

    fn stamp(&self) -> std::io::Result<Option<Stamp>> {
        self.file.stamp()
    }
}

/// The file changes at any read, during or after the opening: either everything that was read is from one file, or an
/// error reports the change.
#[test]
fn an_overwritten_file_is_distinguished_from_a_damaged_one() {
    for bound in [true, false] {
        for reads in 0.. {
            let Pair { path, other, .. } = &pair(Codec::Raw, bound);
            let id = Snapshot::open(path).unwrap().header().id;
            let file = File::open(path).unwrap();
            let storage = WrittenAt { file, reads: AtomicUsize::new(reads), other, path };
            let (mut buffer, mut bytes) = (ChunkBuffer::new(), [0; PAGE]);
            let read = Snapshot::new(&storage).and_then(|snapshot| {
                for page in [1, 2, 4].map(PageIndex) {
                    snapshot.read_page(page, &mut buffer, &mut bytes)?;
                    // Overwritten before the first read, it is the other one.
                    let of = if snapshot.header().id == id { 1 } else { 2 };
                    assert!(memory(of)[page.source_offset() as usize..][..PAGE] == bytes);
                }
                Ok(())
            });
            assert!(read.is_ok() || is_changed(&read), "read {reads}: {read:?}");
            if (storage.reads.load(Ordering::SeqCst) as isize) >= 0 {
                assert!(reads > 5 && read.is_ok(), "{reads}");
                break;
            }
        }
    }
}
