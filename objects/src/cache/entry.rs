//! The cached blocks of one object: a sparse file.
//!
//! | offset | |
//! |---|---|
//! | 0 | header, 4096 bytes: which object this is, and the id of its version if that is known |
//! | 4096 | one byte for each block: 0, or any other value if the block is there |
//! | a multiple of 4096 after that | the blocks, each at its place |
//!
//! A block is written first, then its byte. It is a byte and not a bit, so that two processes never write the same
//! byte. Its value is random: if a reader finds the same value before and after it reads a block, the block was there
//! during the read, although others may punch it out.

use std::collections::hash_map::RandomState;
use std::fs::{self, File, OpenOptions};
use std::hash::BuildHasher;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FallocateFlags, fallocate};

use super::lock::{self, Kind};
use crate::fetch::{Identity, MOST_ETAG_BYTES, MOST_OBJECT_BYTES};
use crate::version::Version;

/// Bytes of a block. The last block of an object may be shorter. With 256 KiB, 16 threads that wait for random pages would
/// fill a link of 1 Gbit/s; smaller blocks need more requests.
pub(crate) const BLOCK_BYTES: u64 = 128 << 10;

const MAGIC: [u8; 8] = *b"SNAPBLK2";
const HEADER_BYTES: usize = 4096;
const STATES_OFFSET: u64 = HEADER_BYTES as u64;
/// The longest address that the header has room for.
const MOST_URL_BYTES: usize = 3072;
/// A longer id of a version is left out.
const MOST_VERSION_BYTES: usize = 512;

/// These bytes are only locked: a user of the file has a shared lock on the first, its creator has a lock on the
/// second.
const USE: Range<u64> = 0..1;
const MAKE: Range<u64> = 1..2;

/// Blocks whose states are read together while blocks to drop are searched: an object may have many more blocks than are
/// cached.
const SCAN_BLOCKS: u64 = 64 << 10;

/// Another process writes a header in less time.
const MAKING: Duration = Duration::from_secs(5);

/// The file of one object.
#[derive(Debug)]
pub(crate) struct Entry {
    file: File,
    len_bytes: u64,
    /// Where the search for the next block to drop begins.
    hand: AtomicU64,
}

impl Entry {
    pub(crate) fn open(path: &Path, url: &str, identity: &Identity) -> io::Result<Self> {
        let (header, same_bytes) = encode(url, identity)?;
        let started = Instant::now();
        while started.elapsed() < MAKING {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?;
            // Other processes remove files that are not in use.
            if !lock::try_lock(&file, USE, Kind::Shared)? || file.metadata()?.nlink() == 0 {
                continue;
            }
            if !lock::try_lock(&file, MAKE, Kind::Exclusive)? {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            let mut found = [0; HEADER_BYTES];
            let len_bytes = identity.len_bytes;
            let entry = Self { file, len_bytes, hand: AtomicU64::new(0) };
            if entry.file.metadata()?.len() == 0 {
                entry.file.set_len(entry.data_offset() + len_bytes)?;
                entry.file.write_all_at(&header[..], 0)?;
            } else if entry.file.read_exact_at(&mut found, 0).is_err()
                || found[..same_bytes] != header[..same_bytes]
            {
                // It has another version, or is damaged. Processes that have it open keep it.
                fs::remove_file(path)?;
                continue;
            } else if identity.version.is_some() && found != *header {
                // A copy of the object has the same ETag and another version.
                entry.file.write_all_at(&header[..], 0)?;
            }
            lock::unlock(&entry.file, MAKE);
            // If that fails, the file is only removed earlier.
            let _ = entry.file.set_modified(SystemTime::now());
            return Ok(entry);
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "another process is making it"))
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.len_bytes.div_ceil(BLOCK_BYTES)
    }

    /// The bytes of the object that are in a block.
    pub(crate) fn bytes_of(&self, blocks: Range<u64>) -> Range<u64> {
        let end = (blocks.end * BLOCK_BYTES).min(self.len_bytes);
        blocks.start * BLOCK_BYTES..end
    }

    /// Fills `buf` with the bytes of the object at `offset`, which are inside of it. Returns `false` if some are not
    /// cached.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if buf.is_empty() {
            return Ok(true);
        }
        let blocks = offset / BLOCK_BYTES..(offset + buf.len() as u64).div_ceil(BLOCK_BYTES);
        let read = self.read_whole(blocks.clone(), offset, buf);
        match read {
            // The file was truncated. The next stored block extends it again.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.drop_blocks(blocks)?;
                Ok(false)
            }
            read => read,
        }
    }

    fn read_whole(&self, blocks: Range<u64>, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let before = self.states(blocks.clone())?;
        if before.contains(&0) {
            return Ok(false);
        }
        self.file.read_exact_at(buf, self.data_offset() + offset)?;
        Ok(self.states(blocks)? == before)
    }

    /// Whether a block is there.
    pub(crate) fn has(&self, block: u64) -> bool {
        self.states(block..block + 1).is_ok_and(|states| !states.contains(&0))
    }

    /// Stores a whole block.
    pub(crate) fn store(&self, block: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.data_offset() + block * BLOCK_BYTES)?;
        let state = (RandomState::new().hash_one(block) % 255) as u8 + 1;
        self.file.write_all_at(&[state], STATES_OFFSET + block)
    }

    /// Drops blocks, so that they are fetched again.
    pub(crate) fn drop_blocks(&self, blocks: Range<u64>) -> io::Result<()> {
        let zeros = vec![0; (blocks.end - blocks.start) as usize];
        self.file.write_all_at(&zeros, STATES_OFFSET + blocks.start)
    }

    /// Keeps other processes from fetching these blocks. `None`: another process fetches one of them.
    pub(crate) fn claim(&self, blocks: Range<u64>) -> io::Result<Option<Claim<'_>>> {
        let bytes = STATES_OFFSET + blocks.start..STATES_OFFSET + blocks.end;
        let locked = lock::try_lock(&self.file, bytes.clone(), Kind::Exclusive)?;
        Ok(locked.then_some(Claim { entry: self, bytes }))
    }

    /// Drops blocks with this many bytes, or all. If blocks are stored in order, the oldest are dropped first.
    pub(crate) fn punch(&self, bytes: u64) {
        let mut left = bytes;
        let hand = self.hand.load(Ordering::Relaxed);
        let mut states = vec![0; SCAN_BLOCKS as usize];
        for part in [hand..self.blocks(), 0..hand] {
            for first in part.clone().step_by(SCAN_BLOCKS as usize) {
                let states = &mut states[..SCAN_BLOCKS.min(part.end - first) as usize];
                if self.file.read_exact_at(states, STATES_OFFSET + first).is_err() {
                    return;
                }
                for (block, _) in (first..).zip(&*states).filter(|(_, state)| **state != 0) {
                    if left == 0 {
                        self.hand.store(block, Ordering::Relaxed);
                        return;
                    }
                    left = left.saturating_sub(self.punch_block(block));
                }
            }
        }
    }

    /// Drops a block, unless another process stores it. Returns the number of dropped bytes.
    fn punch_block(&self, block: u64) -> u64 {
        let Ok(Some(_claim)) = self.claim(block..block + 1) else { return 0 };
        if !self.has(block) || self.drop_blocks(block..block + 1).is_err() {
            return 0;
        }
        let place = self.data_offset() + block * BLOCK_BYTES;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A file system without holes keeps the space.
        let _ = fallocate(&self.file, flags, place, BLOCK_BYTES);
        BLOCK_BYTES
    }

    fn states(&self, blocks: Range<u64>) -> io::Result<States> {
        let len = (blocks.end - blocks.start) as usize;
        let mut states = States::default();
        match len <= states.few.len() {
            true => {
                self.file.read_exact_at(&mut states.few[..len], STATES_OFFSET + blocks.start)?;
                states.len = len;
            }
            false => {
                states.many = vec![0; len];
                self.file.read_exact_at(&mut states.many, STATES_OFFSET + blocks.start)?;
            }
        }
        Ok(states)
    }

    fn data_offset(&self) -> u64 {
        (STATES_OFFSET + self.blocks()).next_multiple_of(HEADER_BYTES as u64)
    }
}

/// The state bytes of some blocks. A usual read needs no allocation for them.
#[derive(Default, PartialEq, Eq)]
struct States {
    few: [u8; 16],
    len: usize,
    many: Vec<u8>,
}

impl States {
    fn contains(&self, state: &u8) -> bool {
        self.few[..self.len].contains(state) || self.many.contains(state)
    }
}

/// Blocks that this process fetches.
pub(crate) struct Claim<'a> {
    entry: &'a Entry,
    bytes: Range<u64>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock::unlock(&self.entry.file, self.bytes.clone());
    }
}

/// Removes a file, unless a process uses it. Returns whether it was removed.
pub(crate) fn remove_unused(path: &Path) -> io::Result<bool> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if !lock::try_lock(&file, USE, Kind::Exclusive)? {
        return Ok(false);
    }
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a process uses a file.
pub(crate) fn is_in_use(path: &Path) -> bool {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.and_then(|file| lock::try_lock(&file, USE, Kind::Exclusive)).is_ok_and(|free| !free)
}

/// The object that a file caches.
pub(crate) fn describe(path: &Path) -> Option<(String, Identity)> {
    let mut header = [0; HEADER_BYTES];
    File::open(path).ok()?.read_exact_at(&mut header, 0).ok()?;
    let rest = header.strip_prefix(&MAGIC)?;
    let (len_bytes, rest) = rest.split_first_chunk::<8>()?;
    let (url, rest) = text(rest)?;
    let (etag, rest) = text(rest)?;
    let version = Version::new(text(rest).map(|(id, _)| id));
    let len_bytes = u64::from_le_bytes(*len_bytes);
    // The file may be damaged.
    let is_length = (1..=MOST_OBJECT_BYTES).contains(&len_bytes);
    is_length.then_some((url, Identity { etag, len_bytes, version }))
}

/// The header, and the length of what is the same for all users of the object: all but the id of its version.
fn encode(url: &str, identity: &Identity) -> io::Result<(Box<[u8; HEADER_BYTES]>, usize)> {
    if url.len() > MOST_URL_BYTES || identity.etag.len() > MOST_ETAG_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the address is too long"));
    }
    let mut parts = MAGIC.to_vec();
    parts.extend(identity.len_bytes.to_le_bytes());
    let version = identity.version.as_ref().map_or("", Version::id);
    let version = if version.len() <= MOST_VERSION_BYTES { version } else { "" };
    for text in [url, &identity.etag, version] {
        parts.extend((text.len() as u16).to_le_bytes());
        parts.extend(text.as_bytes());
    }
    let mut header = Box::new([0; HEADER_BYTES]);
    header[..parts.len()].copy_from_slice(&parts);
    Ok((header, parts.len() - 2 - version.len()))
}

fn text(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<2>()?;
    let (text, rest) = rest.split_at_checked(u16::from_le_bytes(*len).into())?;
    Some((String::from_utf8(text.to_vec()).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { etag: "\"abc\"".into(), len_bytes: 2 * BLOCK_BYTES + 5, version: None }
    }

    #[test]
    fn all_open_files_share_the_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.blocks");
        let open = || Entry::open(&path, "s3://a/b", &identity()).unwrap();
        let (one, other) = (open(), open());
        assert_eq!(describe(&path), Some(("s3://a/b".into(), identity())));
        assert_eq!((one.blocks(), one.bytes_of(2..3)), (3, 2 * BLOCK_BYTES..2 * BLOCK_BYTES + 5));
        let mut bytes = [0; 8];
        assert!(!other.read(2 * BLOCK_BYTES - 4, &mut bytes).unwrap());
        one.store(1, &vec![1; BLOCK_BYTES as usize]).unwrap();
        assert!(!other.read(2 * BLOCK_BYTES - 4, &mut bytes).unwrap());
        one.store(2, &[2; 5]).unwrap();
        assert!(other.read(2 * BLOCK_BYTES - 4, &mut bytes).unwrap());
        assert_eq!(bytes, [1, 1, 1, 1, 2, 2, 2, 2]);
        other.drop_blocks(2..3).unwrap();
        assert!(!one.has(2) && one.has(1));
    }

    #[test]
    fn the_last_version_is_kept_and_another_one_with_the_same_etag_has_the_same_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.blocks");
        let open = |version: &str| {
            let version = Version::new(Some(version.into()));
            Entry::open(&path, "s3://a/b", &Identity { version, ..identity() }).unwrap()
        };
        let version = || describe(&path).unwrap().1.version;
        open("").store(2, &[2; 5]).unwrap();
        assert_eq!(version(), None);
        let long = "v".repeat(MOST_VERSION_BYTES + 1);
        for (found, expected) in [("v1", "v1"), ("", "v1"), ("v22", "v22"), ("v3", "v3")] {
            assert!(open(found).has(2));
            assert_eq!(version(), Version::new(Some(expected.into())));
        }
        assert!(open(&long).has(2));
        assert_eq!(version(), None);
    }

    #[test]
    fn one_process_fetches_a_block() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.blocks");
        let open = || Entry::open(&path, "s3://a/b", &identity()).unwrap();
        let (one, other) = (open(), open());
        let claim = one.claim(0..2).unwrap().unwrap();
        assert!(other.claim(1..3).unwrap().is_none());
        assert!(other.claim(2..3).unwrap().is_some());
        drop(claim);
        assert!(other.claim(1..3).unwrap().is_some());
    }

    #[test]
    fn a_file_that_is_no_entry_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.blocks");
        fs::write(&path, [9; 10_000]).unwrap();
        assert_eq!(describe(&path), None);
        for len_bytes in [0, u64::MAX] {
            let (header, _) = encode("s3://a/b", &Identity { len_bytes, ..identity() }).unwrap();
            fs::write(&path, *header).unwrap();
            assert_eq!(describe(&path), None);
        }
        let entry = Entry::open(&path, "s3://a/b", &identity()).unwrap();
        assert!(!entry.has(0));
        assert!(!remove_unused(&path).unwrap() && is_in_use(&path));
        drop(entry);
        assert!(!is_in_use(&path) && remove_unused(&path).unwrap());
    }
}
