//! Loads ahead: stores pages into the kernel's page cache before they are read.
//!
//! This is a thread of its own, because `FUSE_NOTIFY_STORE` waits for the lock of a page, which a read that is being
//! answered holds: a thread that answers reads would wait for itself.

use std::ops::Range;
use std::sync::Arc;

use fuser::{INodeNo, Notifier};
use snapvm::snapfmt::layout::PAGE_BYTES;
use snapvm::snapfmt::{ChunkBuffer, Snapshot};

use crate::activity::{Activity, Position, Work};
use crate::tree::{MountedFile, Tree};

/// How many pages are stored with one call: 256 KiB. A reader of one of them waits for the copy.
const STEP_PAGES: u64 = 64;

pub(crate) struct Loader {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) tree: Arc<Tree>,
    pub(crate) activity: Arc<Activity>,
    pub(crate) notifier: Notifier,
}

impl Loader {
    /// Runs until [`Activity::end`].
    pub(crate) fn run(&self) {
        let mut buffer = ChunkBuffer::new();
        let mut bytes = vec![0; STEP_PAGES as usize * PAGE_BYTES];
        let mut after_done = None;
        loop {
            match self.activity.next(after_done.as_ref()) {
                Work::End => return,
                Work::Range(Position { inode, bytes: range }) => {
                    let Some(file) = self.tree.file(inode) else { continue };
                    if let Some(missing) = file.loaded.missing(range.clone(), STEP_PAGES) {
                        self.load(inode, file, missing.clone(), &mut bytes, &mut buffer);
                        let rest = Position { inode, bytes: missing.end.min(range.end)..range.end };
                        self.activity.requeue(rest);
                    }
                }
                Work::After(read) => {
                    let Some(file) = self.tree.file(read.inode) else { continue };
                    // From the read to the end of the file, then from its start.
                    let missing = |range| file.loaded.missing(range, STEP_PAGES);
                    let next = missing(read.bytes.end..file.view.len_bytes());
                    match next.or_else(|| missing(0..read.bytes.end)) {
                        Some(next) => self.load(read.inode, file, next, &mut bytes, &mut buffer),
                        None => after_done = Some(read),
                    }
                }
            }
        }
    }

    /// Gives the kernel a range of at most [`STEP_PAGES`] whole pages. A page that cannot be read is left to its reader,
    /// which gets the error.
    fn load(
        &self,
        inode: u64,
        file: &MountedFile,
        range: Range<u64>,
        bytes: &mut [u8],
        buffer: &mut ChunkBuffer,
    ) {
        let out = &mut bytes[..(range.end - range.start) as usize];
        // Noted in any case, so that it is not tried again.
        file.loaded.insert(range.clone());
        if let Ok(len) = file.view.read_at(&self.snapshot, range.start, out, buffer) {
            // It fails if the kernel has no memory, or the mount has ended. A reader asks for the page then.
            let _ = self.notifier.store(INodeNo(inode), range.start, &out[..len]);
        }
    }
}
