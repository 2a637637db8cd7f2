//! How much of its file an eager restore leaves in the page cache.

use std::fs::File;
use std::path::Path;

use snapfmt::{ReadAt, SectionKind, Snapshot};

use crate::support::{Sample, needs_vm, skip, snap};

/// Drops a file's chunks from the page cache; with `all`, its index too.
fn drop_pages(path: &Path, all: bool) {
    let snapshot = Snapshot::open(path).expect("it opens");
    let chunks = snapshot.sections().iter().find(|s| s.kind == SectionKind::CHUNKS);
    let chunks = *chunks.expect("every file has them");
    let file = snapshot.storage().file().expect("a file");
    file.sync_all().expect("it can be synced");
    let end = if all { file.len_bytes().expect("a file") } else { chunks.end() };
    file.release(0..end);
}

/// Whether the middle of the file is cached, if that is known. A page that is not is read for the answer, and may be there
/// before the answer is given; the next page is not.
fn is_cached(path: &Path) -> Option<bool> {
    let file = File::open(path).expect("it opens");
    // Without read-ahead, which could still be running when the file is dropped from the cache.
    file.expect_random();
    let middle = file.len_bytes().expect("a file") / 2;
    Some(file.is_cached(middle)? && file.is_cached(middle + 4096)?)
}

#[test]
fn a_file_that_was_not_cached_is_released_after_one_restore() {
    needs_vm!();
    let options = ["--memory", "64M", "--work", "32M", "--codec", "raw"];
    let sample = Sample::create(&options);
    let (file, raw) = (&sample.file, sample.folder.path().join("memory.raw"));
    drop_pages(file, true);
    if is_cached(file) != Some(false) {
        return skip("page_cache", "temporary files cannot be dropped from the page cache");
    }
    let restore = || _ = sample.restore(&["--beats", "1"]).ok();
    drop_pages(file, true);
    restore();
    assert_eq!(is_cached(file), Some(false), "after the first restore");
    // The question has read a page. After dropping it, the second restore finds only the index of the first.
    drop_pages(file, false);
    restore();
    assert_eq!(is_cached(file), Some(true), "after the second restore");
    restore();
    assert_eq!(is_cached(file), Some(true), "after the third restore");
    // An export also reads all of it once.
    drop_pages(file, true);
    let args = ["export".as_ref(), file.as_os_str(), "--format".as_ref(), "raw".as_ref()];
    snap(args.into_iter().chain(["-o".as_ref(), raw.as_os_str()])).ok();
    assert_eq!(is_cached(file), Some(false), "after an export");
}
