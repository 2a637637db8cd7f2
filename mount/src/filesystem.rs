//! Answers the requests of the kernel.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyLseek, ReplyOpen,
    Request,
};
use rustix::process::{getegid, geteuid};
use snapvm::snapfmt::layout::PAGE_BYTES;
use snapvm::snapfmt::{ChunkBuffer, Snapshot};
use snapvm::with_causes;

use crate::activity::{Activity, Position};
use crate::error::{MountEvent, ReadFailure};
use crate::tree::{MountedFile, Tree};

/// The kernel need not ask again: nothing changes.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// The longest read.
const MAX_READ_BYTES: u32 = 1 << 20;
/// Read-ahead requests that may wait for an answer, for all readers together.
const MAX_BACKGROUND: u16 = 64;
/// VM_READAHEAD_PAGES in linux/mm.h.
const KERNEL_READ_AHEAD_BYTES: u32 = 128 << 10;
/// After this many different failures, the first may be reported again.
const REPORTED: usize = 1000;
/// `whence` of lseek(2).
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

pub(crate) type OnEvent = Box<dyn Fn(MountEvent<'_>) + Send + Sync>;

pub(crate) struct SnapshotFiles {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) tree: Arc<Tree>,
    pub(crate) activity: Arc<Activity>,
    /// Source offsets of guest memory that are loaded when a file with memory is read first.
    pub(crate) prefetch: Vec<Range<u64>>,
    /// Whether other users may read.
    pub(crate) allow_other: bool,
    pub(crate) mounted_at: SystemTime,
    pub(crate) on_event: Arc<OnEvent>,
    pub(crate) idle: Mutex<Vec<Buffers>>,
    /// The failures that were reported.
    pub(crate) failed: Mutex<HashSet<String>>,
}

/// What a thread reads into.
#[derive(Default)]
pub(crate) struct Buffers {
    bytes: Vec<u8>,
    chunk: ChunkBuffer,
}

/// What the kernel reads around a page that is touched: as much as is decoded together, and no more than the kernel
/// allows by default.
pub(crate) fn read_ahead_bytes(snapshot: &Snapshot) -> u32 {
    (snapshot.header().chunk_pages * PAGE_BYTES as u32).min(KERNEL_READ_AHEAD_BYTES)
}

impl SnapshotFiles {
    fn attributes(&self, inode: u64) -> Option<FileAttr> {
        let node = self.tree.node(inode)?;
        let view = node.file.as_ref().map(|file| &file.view);
        let data_bytes: u64 =
            view.map_or(0, |view| view.data().iter().map(|range| range.end - range.start).sum());
        let (kind, owner) = match view {
            Some(_) => (FileType::RegularFile, 0o400),
            None => (FileType::Directory, 0o500),
        };
        let others = if self.allow_other { owner >> 3 | owner >> 6 } else { 0 };
        Some(FileAttr {
            ino: INodeNo(inode),
            size: view.map_or(0, |view| view.len_bytes()),
            blocks: data_bytes.div_ceil(512),
            atime: self.mounted_at,
            mtime: self.mounted_at,
            ctime: self.mounted_at,
            crtime: self.mounted_at,
            kind,
            perm: owner | others,
            nlink: 1,
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            rdev: 0,
            blksize: PAGE_BYTES as u32,
            flags: 0,
        })
    }

    /// Reports a failed read. A damaged chunk is read in several ways, and reported once.
    fn report(&self, failure: &ReadFailure) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.len() >= REPORTED {
            failed.clear();
        }
        if failed.insert(with_causes(&failure.error)) {
            drop(failed);
            (self.on_event)(MountEvent::Failed(failure));
        }
    }

    fn with_buffers(&self, work: impl FnOnce(&mut Buffers)) {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffers = idle().pop().unwrap_or_default();
        work(&mut buffers);
        idle().push(buffers);
    }

    /// Answers a read as a whole or with EIO. After a short answer the kernel would take the file for shorter.
    fn answer(&self, inode: u64, file: &MountedFile, bytes: Range<u64>, reply: ReplyData) {
        self.with_buffers(|buffers| {
            let len_bytes = bytes.end - bytes.start;
            buffers.bytes.resize(len_bytes as usize, 0);
            let (out, chunk) = (&mut buffers.bytes, &mut buffers.chunk);
            match file.view.read_at(&self.snapshot, bytes.start, out, chunk) {
                Ok(_) => {
                    // Before the answer: then the loader does not load it, too.
                    file.loaded.insert(bytes);
                    reply.data(out);
                }
                Err(error) => {
                    reply.error(Errno::EIO);
                    let (file, offset) = (self.tree.path(inode), bytes.start);
                    self.report(&ReadFailure { file, offset, len_bytes, error });
                }
            }
        });
    }
}

impl Filesystem for SnapshotFiles {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // If it is more than the kernel allows, the error is what it allows.
        if let Err(most) = config.set_max_readahead(read_ahead_bytes(&self.snapshot)) {
            let _ = config.set_max_readahead(most);
        }
        // It bounds reads, too.
        let _ = config.set_max_write(MAX_READ_BYTES);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.tree.children(parent.0).find(|(_, node)| OsStr::new(node.name) == name);
        match found.and_then(|(inode, _)| self.attributes(inode)) {
            Some(attributes) => reply.entry(&FOREVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// The kernel has dropped the pages of the file with the inode.
    fn forget(&self, _: &Request, inode: INodeNo, _: u64) {
        if let Some(file) = self.tree.file(inode.0) {
            file.loaded.clear();
            file.was_read.store(false, Ordering::Relaxed);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode.0) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.tree.file(inode.0).is_none() {
            return reply.error(Errno::EISDIR);
        }
        // From then on the kernel opens files itself, and keeps their pages, as with FOPEN_KEEP_CACHE.
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        request: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(file) = self.tree.file(inode.0) else { return reply.error(Errno::EISDIR) };
        let began = Instant::now();
        let end = offset.saturating_add(size.into()).min(file.view.len_bytes());
        let bytes = offset.min(end)..end;
        if self.activity.is_loader(request.pid()) {
            self.answer(inode.0, file, bytes, reply);
            return self.activity.loaded();
        }
        if !file.was_read.swap(true, Ordering::Relaxed) {
            let places = self.prefetch.iter().flat_map(|range| file.view.places(range.clone()));
            let position = |bytes| Position { inode: inode.0, bytes };
            self.activity.enqueue(places.map(position));
        }
        self.answer(inode.0, file, bytes.clone(), reply);
        let position = Position { inode: inode.0, bytes };
        self.activity.read(position, began, Instant::now());
    }

    fn readdir(
        &self,
        _: &Request,
        folder: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(node) = self.tree.node(folder.0) else { return reply.error(Errno::ENOENT) };
        let kind = |file: bool| if file { FileType::RegularFile } else { FileType::Directory };
        let own = [(folder.0, ".", false), (node.parent, "..", false)];
        let children = self.tree.children(folder.0);
        let children = children.map(|(inode, node)| (inode, node.name, node.file.is_some()));
        let entries = (1..).zip(own.into_iter().chain(children)).skip(offset as usize);
        for (next, (inode, name, is_file)) in entries {
            if reply.add(INodeNo(inode), next, kind(is_file), name) {
                break;
            }
        }
        reply.ok();
    }

    fn lseek(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let Some(file) = self.tree.file(inode.0) else { return reply.error(Errno::EISDIR) };
        let found = match (u64::try_from(offset), whence) {
            (Ok(offset), SEEK_DATA) => file.view.next_data(offset),
            (Ok(offset), SEEK_HOLE) => file.view.next_hole(offset),
            (Err(_), SEEK_DATA | SEEK_HOLE) => None,
            // The kernel does the others itself.
            _ => return reply.error(Errno::EINVAL),
        };
        match found.and_then(|offset| i64::try_from(offset).ok()) {
            Some(offset) => reply.offset(offset),
            None => reply.error(Errno::ENXIO),
        }
    }
}
