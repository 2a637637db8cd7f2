//! How much of a file stays in the page cache after all of it was loaded, on the file system of temporary files.

use std::fs::File;
use std::io::Write;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::Path;

use snapfmt::{
    Codec, Contents, MemoryRegion, ReadAt, SectionKind, Snapshot, WriteOptions, write_snapshot,
};

const MEMORY_BYTES: u64 = 16 << 20;

fn go_on(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A file of 16 MiB.
fn store(path: &Path) {
    let memory: Vec<u8> = (0..MEMORY_BYTES).map(|at| (at >> 12) as u8 | 1).collect();
    let regions = [MemoryRegion { gpa: 0, len: MEMORY_BYTES, source_offset: 0 }];
    let data = [0..MEMORY_BYTES];
    let contents = Contents::new(&regions, &memory, &data);
    let options = WriteOptions::default().codec(Codec::Raw).dedupe(false);
    write_snapshot(path, contents, &options, &go_on).unwrap();
}

/// How many of 100 evenly spaced pages of chunks are cached; `None` if unknown. The question causes reads of the
/// others.
fn cached(path: &Path) -> Option<usize> {
    let file = File::open(path).unwrap();
    // Otherwise the pages around it would be read too.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    let step = MEMORY_BYTES / 101;
    let answers = (1..=100).map(|number| file.is_cached(4096 + number * step));
    Some(answers.collect::<Option<Vec<_>>>()?.into_iter().filter(|cached| *cached).count())
}

fn load(path: &Path) {
    let snapshot = Snapshot::open(path).unwrap();
    let loaded = snapshot.load(NonZeroUsize::new(2).unwrap(), &|_, _| {}, &go_on).unwrap();
    assert!(loaded.bytes_read >= MEMORY_BYTES);
    snapshot.release(&loaded);
}

/// Drops a file from the page cache. Returns whether that is possible here: not in tmpfs, which has no other copy.
fn drop_pages(path: &Path) -> bool {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    file.release(0..file.len_bytes().unwrap());
    // In the middle, where nothing was read for the answer.
    file.is_cached(MEMORY_BYTES / 2) == Some(false) && {
        file.release(0..file.len_bytes().unwrap());
        true
    }
}

#[test]
fn the_first_load_leaves_nothing_cached_and_the_second_one_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.snap");
    store(&path);
    if !drop_pages(&path) {
        let said = b"SKIPPED page_cache: temporary files cannot be dropped from the page cache\n";
        std::io::stderr().write_all(said).unwrap();
        return;
    }
    load(&path);
    let left = cached(&path).unwrap();
    assert!(left < 10, "{left} of 100 pages are left after the first loading");
    // `cached` has read the pages that it probed. Without the index, nothing would show that the file was read
    // recently.
    assert!(drop_chunks(&path));
    load(&path);
    let left = cached(&path).unwrap();
    assert!(left > 90, "{left} of 100 pages are left after the second loading");
    // A cached file stays cached, however often it is loaded.
    load(&path);
    assert!(cached(&path).unwrap() > 90);
}

/// Drops what the test itself has read into the page cache. Returns whether the index is still cached.
fn drop_chunks(path: &Path) -> bool {
    let snapshot = Snapshot::open(path).unwrap();
    let of_kind = |kind| *snapshot.sections().iter().find(|s| s.kind == kind).unwrap();
    let (chunks, leaves) = (of_kind(SectionKind::CHUNKS), of_kind(SectionKind::INDEX_LEAVES));
    snapshot.storage().release(chunks.offset..chunks.end());
    snapshot.storage().is_cached(leaves.offset) == Some(true)
}
