//! The ends of an object in its name, so that the snapshot is opened with what the answer to the name contains.

use serde::{Deserialize, Serialize};
use snapfmt::{ReadAt, SectionKind, Snapshot};

use crate::cache::BLOCK_BYTES;
use crate::fetch::MOST_ETAG_BYTES;

/// The bytes at each end of an object that the first answers contain. The front has the header and the chunks that
/// `snap optimize` puts there. The end has the index of up to 400 MiB of memory in use, and all that is read to open
/// it.
pub(crate) const END_BYTES: u64 = 1 << 20;
/// Blocks of which only a part comes are left out.
pub(crate) const SUFFIX_BYTES: u64 = END_BYTES + BLOCK_BYTES;

/// What of the object follows the text of its name: bytes from its front, and then bytes up to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ends {
    /// The ETag that the object had when the name was written. The cache is found by it.
    pub(crate) etag: String,
    front_bytes: u64,
    tail_bytes: u64,
}

impl Ends {
    /// The ends of a snapshot's top file that opening reads, in whole blocks of the cache: the header, and as much of what
    /// is behind the chunks as the first answers for an object contain.
    pub(crate) fn read(snapshot: &Snapshot, etag: String) -> std::io::Result<(Self, Vec<u8>)> {
        let len = snapshot.header().file_bytes;
        let chunks = snapshot.sections().iter().find(|one| one.kind == SectionKind::CHUNKS);
        let behind = chunks.map_or(0, |chunks| chunks.end()).max(len.saturating_sub(END_BYTES));
        let tail = behind.min(len) / BLOCK_BYTES * BLOCK_BYTES..len;
        let front = 0..BLOCK_BYTES.min(tail.start);
        let mut bytes = vec![0; (front.end + tail.end - tail.start) as usize];
        let (front_bytes, tail_bytes) = bytes.split_at_mut(front.end as usize);
        snapshot.storage().read_exact_at(front_bytes, front.start)?;
        snapshot.storage().read_exact_at(tail_bytes, tail.start)?;
        let ends = Self { etag, front_bytes: front.end, tail_bytes: tail.end - tail.start };
        Ok((ends, bytes))
    }

    /// Checks that these are the ends of an object of this length, and that `bytes` has them.
    pub(crate) fn check(&self, file_bytes: u64, bytes: &[u8]) -> Result<(), String> {
        let total = self.front_bytes.checked_add(self.tail_bytes);
        if total != Some(bytes.len() as u64) || total > Some(file_bytes) {
            return Err(format!("{} bytes after the text are not the ends it names", bytes.len()));
        }
        match !self.etag.is_empty() && self.etag.len() <= MOST_ETAG_BYTES {
            true => Ok(()),
            false => Err(format!("an ETag of {} bytes", self.etag.len())),
        }
    }

    /// Where they are in an object of this length, and their bytes.
    pub(crate) fn parts<'a>(&self, file_bytes: u64, bytes: &'a [u8]) -> [(u64, &'a [u8]); 2] {
        let (front, tail) = bytes.split_at(self.front_bytes as usize);
        [(0, front), (file_bytes - self.tail_bytes, tail)]
    }
}
