//! The ends of an object in its name, so that the snapshot is opened with what the answer to the name contains.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use snapfmt::{ReadAt, SectionKind, Snapshot};

use crate::cache::{BLOCK_BYTES, Cache};
use crate::error::ObjectError;
use crate::fetch::{Identity, MOST_ETAG_BYTES, Source};
use crate::look::END_BYTES;
use crate::name::LayerName;
use crate::remote::RemoteObject;

/// What of the object follows the text of its name: bytes from its front, and then bytes up to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ends {
    /// The ETag that the object had when the name was written. The cache is found by it.
    etag: String,
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

    /// Stores them in the cache, where opening the object finds them. What the cache has stays.
    pub(crate) fn store(
        &self,
        bytes: &[u8],
        of: &LayerName,
        name: &Source,
        cache: &Arc<Cache>,
    ) -> Result<(), ObjectError> {
        let url = name.url.beside(&of.key())?;
        let (etag, len_bytes) = (self.etag.clone(), of.file_bytes);
        let known = cache.last_identity(&url).filter(|known| known.len_bytes == len_bytes);
        let identity = known.unwrap_or(Identity { etag, len_bytes, version: None });
        let source = Source { url, ..name.clone() };
        let object = RemoteObject::cached(source, identity, Arc::clone(cache))?;
        if !object.has_ends() {
            let (front, tail) = bytes.split_at(self.front_bytes as usize);
            object.fill(0, front);
            object.fill(len_bytes - self.tail_bytes, tail);
        }
        Ok(())
    }
}
