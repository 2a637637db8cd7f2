//! A cache of decoded pages that other pages are equal to.
//!
//! Loading a chunk installs all its pages, so that the chunk is seldom needed again. An exception are pages elsewhere
//! that are equal to one of its pages, and therefore not stored themselves. Each of them would read and decode the
//! whole chunk again. So the shared page is kept after the first of them was loaded. The chunk is not kept, because the
//! others need nothing else from it.

use snapfmt::ChunkExtent;
use snapfmt::layout::CHUNK_ALIGN;

use crate::region::PAGE_BYTES;

/// 256 KiB for each reader. Each page has one possible place. The memory is allocated when the first page is kept.
const PLACES: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct SharedPages {
    kept: Vec<Option<(ChunkExtent, u16)>>,
    bytes: Vec<u8>,
}

impl SharedPages {
    /// The offset of the page in [`SharedPages::bytes`], if it is kept.
    pub(crate) fn find(&self, chunk: ChunkExtent, slot: u16) -> Option<usize> {
        let place = place(chunk, slot);
        let is_it = *self.kept.get(place)? == Some((chunk, slot));
        is_it.then_some(place * PAGE_BYTES)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Keeps a page. It replaces the page that has the same place.
    pub(crate) fn keep(&mut self, chunk: ChunkExtent, slot: u16, page: &[u8]) {
        if self.kept.is_empty() {
            self.kept.resize(PLACES, None);
            // The kernel provides this memory when it is written.
            self.bytes = vec![0; PLACES * PAGE_BYTES];
        }
        let place = place(chunk, slot);
        self.kept[place] = Some((chunk, slot));
        self.bytes[place * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(page);
    }
}

/// Chunks have various lengths, so that their offsets are distributed well enough.
fn place(chunk: ChunkExtent, slot: u16) -> usize {
    (chunk.offset() / CHUNK_ALIGN as u64 + u64::from(slot)) as usize % PLACES
}
