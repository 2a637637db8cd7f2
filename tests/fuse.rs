//! A disk that does not answer: a file system of this test (FUSE) whose reads and writes never end.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tempfile::TempDir;

use crate::support::skip;

/// The existing file.
const FILE: &str = "guest.snap";
const ROOT_NODE: u64 = 1;
const FILE_NODE: u64 = 2;
const NEW_NODE: u64 = 3;
const FOLDER_NODE: u64 = 4;

/// A folder with one file, on a disk that can be made to hang. New files can be created, and never be written.
pub(crate) struct SlowDisk {
    folder: TempDir,
    disk: Arc<Disk>,
}

struct Disk {
    content: Vec<u8>,
    /// The number of bytes that are read before it hangs.
    readable: AtomicU64,
    /// Whether a folder `*.tmp` was made.
    has_folder: AtomicBool,
    /// Requests that are not answered.
    unanswered: AtomicU64,
}

impl SlowDisk {
    /// With `file` in it, as `guest.snap`. `None`, and a message, if this user cannot mount it.
    pub(crate) fn with(file: &Path, test: &str) -> Option<Self> {
        let content = std::fs::read(file).expect("it can be read");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let Ok(fuse) = OpenOptions::new().read(true).write(true).open("/dev/fuse") else {
            skip(test, "/dev/fuse cannot be opened");
            return None;
        };
        let mounted = Command::new("mount")
            .args(["-i", "-t", "fuse", "-o", "fd=0,rootmode=40000,user_id=0,group_id=0", "slow"])
            .arg(folder.path())
            .stdin(fuse.try_clone().expect("it can be duplicated"))
            .stderr(Stdio::null())
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            skip(test, "this user may not mount a file system");
            return None;
        }
        let disk = Disk {
            content,
            readable: AtomicU64::new(u64::MAX),
            has_folder: AtomicBool::new(false),
            unanswered: AtomicU64::new(0),
        };
        let disk = Arc::new(disk);
        let served = Arc::clone(&disk);
        std::thread::spawn(move || served.serve(fuse));
        Some(Self { folder, disk })
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.folder.path().join(FILE)
    }

    /// Whether a command's hidden folder exists.
    pub(crate) fn has_folder(&self) -> bool {
        self.disk.has_folder()
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// From now on nothing is read.
    pub(crate) fn hang(&self) {
        self.hang_after(0);
    }

    /// This many bytes are read, and then nothing.
    pub(crate) fn hang_after(&self, bytes: u64) {
        self.disk.readable.store(bytes, Ordering::SeqCst);
    }

    pub(crate) fn answer(&self) {
        self.hang_after(u64::MAX);
    }

    /// How many requests were left without an answer.
    pub(crate) fn unanswered(&self) -> u64 {
        self.disk.unanswered.load(Ordering::SeqCst)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.folder.path()).status();
    }
}

/// The answer: data, an error, or none.
enum Answer {
    Data(Vec<u8>),
    Error(i32),
    Never,
    /// Nothing is expected.
    None,
    /// This other request is answered: its process ends. The kernel waits for that.
    Interrupted(u64),
}

const ENOENT: i32 = 2;
const EINTR: i32 = 4;
const ENOSYS: i32 = 38;

impl Disk {
    /// Answers requests until the file system is unmounted. Their form: linux/fuse.h.
    fn serve(&self, mut fuse: File) {
        let mut bytes = vec![0; 2 << 20];
        while let Ok(len) = fuse.read(&mut bytes) {
            let (head, body) = bytes[..len].split_at(40);
            let (opcode, mut unique, node) = (u32_at(head, 4), u64_at(head, 8), u64_at(head, 16));
            let (error, data) = match self.answer(opcode, node, body) {
                Answer::Data(data) => (0, data),
                Answer::Error(error) => (error, Vec::new()),
                Answer::Never => {
                    self.unanswered.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
                Answer::None => continue,
                Answer::Interrupted(other) => {
                    unique = other;
                    (EINTR, Vec::new())
                }
            };
            let mut answer = ((16 + data.len()) as u32).to_le_bytes().to_vec();
            answer.extend((-error).to_le_bytes());
            answer.extend(unique.to_le_bytes());
            answer.extend(data);
            // The requesting process may have ended.
            let _ = fuse.write(&answer);
        }
    }

    fn answer(&self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        match opcode {
            // FORGET, BATCH_FORGET
            2 | 42 => Answer::None,
            // INTERRUPT
            36 => Answer::Interrupted(u64_at(body, 0)),
            // LOOKUP
            1 if body.strip_suffix(b"\0") == Some(FILE.as_bytes()) => {
                Answer::Data(self.entry(FILE_NODE))
            }
            1 if node == ROOT_NODE && body.ends_with(b".tmp\0") && self.has_folder() => {
                Answer::Data(self.entry(FOLDER_NODE))
            }
            1 => Answer::Error(ENOENT),
            // GETATTR, SETATTR
            3 | 4 => Answer::Data([&[0; 16][..], &self.attributes(node)].concat()),
            // INIT: the version, and no features.
            26 => {
                let words = [7, 31, 0, 0, 12 | 12 << 16, 1 << 20, 1];
                let mut data: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
                data.resize(64, 0);
                Answer::Data(data)
            }
            // OPEN, OPENDIR: FOPEN_DIRECT_IO, so that each read comes here.
            14 | 27 => Answer::Data(OPENED.to_vec()),
            // MKDIR
            9 => {
                self.has_folder.store(true, Ordering::SeqCst);
                Answer::Data(self.entry(FOLDER_NODE))
            }
            // RMDIR
            11 => {
                self.has_folder.store(false, Ordering::SeqCst);
                Answer::Data(Vec::new())
            }
            // CREATE
            35 => Answer::Data([&self.entry(NEW_NODE)[..], &OPENED].concat()),
            // READ
            15 => {
                let at = (u64_at(body, 8) as usize).min(self.content.len());
                let end = (at + u32_at(body, 16) as usize).min(self.content.len());
                let bytes = (end - at) as u64;
                let read = |readable| match readable {
                    0 | u64::MAX => None,
                    // The last one is answered.
                    readable => Some(readable.saturating_sub(bytes)),
                };
                let (set, got) = (Ordering::SeqCst, Ordering::SeqCst);
                if self.readable.fetch_update(set, got, read) == Err(0) {
                    return Answer::Never;
                }
                Answer::Data(self.content[at..end].to_vec())
            }
            // WRITE, FSYNC
            16 | 20 => Answer::Never,
            // RELEASE, FLUSH, RELEASEDIR, UNLINK; READDIR: an empty folder
            18 | 25 | 29 | 10 | 28 => Answer::Data(Vec::new()),
            _ => Answer::Error(ENOSYS),
        }
    }

    fn has_folder(&self) -> bool {
        self.has_folder.load(Ordering::SeqCst)
    }

    fn entry(&self, node: u64) -> Vec<u8> {
        let mut data = node.to_le_bytes().to_vec();
        // Valid for no time.
        data.resize(40, 0);
        data.extend(self.attributes(node));
        data
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let size = if node == FILE_NODE { self.content.len() as u64 } else { 0 };
        let folder = matches!(node, ROOT_NODE | FOLDER_NODE);
        let mode: u32 = if folder { 0o40_755 } else { 0o100_600 };
        let longs = [node, size, size.div_ceil(512), 0, 0, 0];
        let words = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
        let mut data: Vec<u8> = longs.into_iter().flat_map(u64::to_le_bytes).collect();
        data.extend(words.into_iter().flat_map(u32::to_le_bytes));
        data
    }
}

const OPENED: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
