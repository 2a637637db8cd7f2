//! Where a target has its files: in memory, because it has new ones for each input.

use std::cell::OnceCell;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use snapvm::interchange::{Export, FileView, Import};
use snapvm::snapfmt::{ChunkBuffer, Codec, Existing, Progress, Snapshot, WriteOptions};

/// Longer files are not made: an input may claim any length.
pub(crate) const MOST_BYTES: u64 = 4 << 20;

/// A folder of this thread, which is removed when the thread ends.
pub(crate) fn path(name: &str) -> PathBuf {
    thread_local!(static FOLDER: OnceCell<tempfile::TempDir> = const { OnceCell::new() });
    FOLDER.with(|folder| {
        let in_memory = || tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        folder.get_or_init(|| in_memory().expect("a folder")).path().join(name)
    })
}

/// A new empty file.
pub(crate) fn empty(name: &str) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    options.open(path(name)).expect("it can be created")
}

/// Fills a file with pages that differ from each other, some of them zeros.
pub(crate) fn fill(file: &File, len_bytes: u64) {
    file.set_len(0).expect("it can be sized");
    for (number, at) in (0..len_bytes).step_by(4096).enumerate() {
        let page = [number as u8 % 7; 4096];
        let len = page.len().min((len_bytes - at) as usize);
        file.write_all_at(&page[..len], at).expect("it can be written");
    }
}

/// The snapshot that an import writes. All that it needs was checked before.
pub(crate) fn written(import: &Import) -> Snapshot {
    import
        .write(&path("out.snap"), &options(), &proceed)
        .expect("what was accepted can be written");
    Snapshot::open(path("out.snap")).expect("it opens")
}

/// What takes the least time: thousands of snapshots are written.
pub(crate) fn options() -> WriteOptions {
    let fast = WriteOptions::default().codec(Codec::Raw).threads(NonZeroUsize::MIN).dedupe(false);
    fast.existing(Existing::Replace)
}

pub(crate) fn proceed(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// All bytes of a file of an export.
pub(crate) fn content(export: &Export<'_>, snapshot: &Snapshot, name: &str) -> Vec<u8> {
    let views = export.views();
    let view: &FileView = views.iter().find(|view| view.name() == name).expect("it has the file");
    let mut bytes = vec![0xee; view.len_bytes() as usize];
    let read = view.read_at(snapshot, 0, &mut bytes, &mut ChunkBuffer::new());
    assert_eq!(read.expect("it is readable"), bytes.len());
    bytes
}
