//! Loads ahead: has the kernel read pages before a reader touches them.
//!
//! It advises the kernel (`POSIX_FADV_WILLNEED`) on a file of the mount, which asks the threads that answer reads for the
//! pages and does not wait for them. `FUSE_NOTIFY_STORE` would take no request, but it waits for the lock of a page,
//! which a read that is not answered yet holds, and no signal ends that wait: after `kill -9` this process would stay,
//! its connection open, and every reader would wait with it.
//!
//! For the same reason no other system call of this thread may wait for an answer: [`Loader::prepare`] has the kernel
//! learn that neither opening nor closing a file is a request.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};

use crate::activity::{Activity, Position, Work};
use crate::tree::{MountedFile, ROOT, Tree};

/// How many pages are asked for together: 256 KiB. A reader waits for those that are asked for and not answered.
const STEP_PAGES: u64 = 64;
/// Pages that were not answered after this time are left to their reader: they may be damaged.
const PATIENCE: Duration = Duration::from_millis(100);

pub(crate) struct Loader {
    pub(crate) folder: PathBuf,
    /// The kernel reads at most this much for one advice.
    pub(crate) span_bytes: u64,
    pub(crate) tree: Arc<Tree>,
    pub(crate) activity: Arc<Activity>,
}

/// A file that is being loaded. While it is open the mount is busy.
type Open = Option<(u64, File)>;

impl Loader {
    /// Runs until [`Activity::end`].
    pub(crate) fn run(&self) {
        self.activity.loader_is_this_thread();
        let mut open = None;
        let mut after_done = None;
        loop {
            match self.activity.next(after_done.as_ref(), || open = None) {
                Work::End => return,
                Work::Range(Position { inode, bytes: range }) => {
                    let Some(file) = self.tree.file(inode) else { continue };
                    if let Some(missing) = file.loaded.missing(range.clone(), STEP_PAGES) {
                        self.load(&mut open, inode, file, missing.clone());
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
                        Some(next) => self.load(&mut open, read.inode, file, next),
                        None => after_done = Some(read),
                    }
                }
            }
        }
    }

    /// Opens and closes a file. The answers to both requests are that the kernel need not send them any more.
    pub(crate) fn prepare(&self) {
        if let Some((inode, _)) = self.tree.children(ROOT).find(|(_, node)| node.file.is_some()) {
            drop(File::open(self.folder.join(self.tree.path(inode))));
        }
    }

    /// Has the kernel read a range of at most [`STEP_PAGES`] whole pages, and waits for the answers.
    fn load(&self, open: &mut Open, inode: u64, file: &MountedFile, range: Range<u64>) {
        if open.as_ref().is_none_or(|(opened, _)| *opened != inode) {
            // Where it cannot be opened the mount has ended, or is hidden by another.
            let opened = File::open(self.folder.join(self.tree.path(inode)));
            *open = opened.ok().map(|opened| (inode, opened));
        }
        if let Some((_, opened)) = open {
            let until = Instant::now() + PATIENCE;
            let mut starts = range.clone().step_by(self.span_bytes as usize);
            let len = NonZeroU64::new(self.span_bytes);
            let asked = starts.all(|at| fadvise(&*opened, at, len, Advice::WillNeed).is_ok());
            let missing = || file.loaded.missing(range.clone(), 1).is_some();
            while asked && missing() && Instant::now() < until && !self.activity.has_ended() {
                self.activity.wait_for_answer(Duration::from_millis(1));
            }
        }
        // In any case, so that it is not tried again.
        file.loaded.insert(range);
    }
}
