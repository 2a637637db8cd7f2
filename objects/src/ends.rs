//! The ends of an object in its name, so that the snapshot is opened with what the answer to the name contains.

use serde::{Deserialize, Serialize};
use snapfmt::layout::HEADER_BYTES;
use snapfmt::{ReadAt, SectionKind, Snapshot};

use crate::cache::BLOCK_BYTES;
use crate::fetch::MOST_ETAG_BYTES;

/// The first bytes of an object that the first answers contain: the header, and some of the chunks that `snap optimize` puts
/// behind it. More would delay what is read to open it, which takes the same link.
pub(crate) const FRONT_BYTES: u64 = 256 << 10;
/// The last bytes of an object that the first answers contain: the index of up to 400 MiB of memory in use, and all that is
/// read to open it.
pub(crate) const END_BYTES: u64 = 1 << 20;
/// Blocks of which only a part comes are left out.
pub(crate) const SUFFIX_BYTES: u64 = END_BYTES + BLOCK_BYTES;

/// What of the object follows the text of its name: its header, and then bytes up to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ends {
    /// The ETag that the object had when the name was written. The cache is found by it.
    pub(crate) etag: String,
    tail_bytes: u64,
}

impl Ends {
    /// The ends of a snapshot's top file that opening reads: the header, and as much of what is behind the chunks as the
    /// first answers for an object contain. The pages of a guest are never in a name.
    pub(crate) fn read(snapshot: &Snapshot, etag: String) -> std::io::Result<(Self, Vec<u8>)> {
        let len = snapshot.header().file_bytes;
        let start = end_of_chunks(snapshot).max(len.saturating_sub(END_BYTES)).min(len);
        let mut bytes = vec![0; HEADER_BYTES + (len - start) as usize];
        let (header, tail) = bytes.split_at_mut(HEADER_BYTES);
        snapshot.storage().read_exact_at(header, 0)?;
        snapshot.storage().read_exact_at(tail, start)?;
        Ok((Self { etag, tail_bytes: len - start }, bytes))
    }

    /// Checks that these are the ends of an object of this length, and that `bytes` has them.
    pub(crate) fn check(&self, file_bytes: u64, bytes: &[u8]) -> Result<(), String> {
        let total = self.tail_bytes.checked_add(HEADER_BYTES as u64);
        if total != Some(bytes.len() as u64) || total > Some(file_bytes) {
            return Err(format!("{} bytes after the text are not the ends it names", bytes.len()));
        }
        match !self.etag.is_empty() && self.etag.len() <= MOST_ETAG_BYTES {
            true => Ok(()),
            false => Err(format!("an ETag of {} bytes", self.etag.len())),
        }
    }
}

/// Where the guest's pages end in a snapshot's top file.
pub(crate) fn end_of_chunks(snapshot: &Snapshot) -> u64 {
    let chunks = snapshot.sections().iter().find(|one| one.kind == SectionKind::CHUNKS);
    chunks.map_or(0, |chunks| chunks.end()).max(HEADER_BYTES as u64)
}
