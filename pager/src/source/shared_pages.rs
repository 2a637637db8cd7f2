//! Pages that other pages are equal to, as they were decoded.
//!
//! A chunk that is loaded brings all its pages at once, so it is hardly wanted again: but for pages that are stored nowhere
//! else because they are equal to one of its own. Each of these would have the whole chunk read and decoded anew. So the page
//! that they share is kept when the first of them has asked for it, and not the chunk, of which they want nothing else.

use snapfmt::ChunkExtent;
use snapfmt::layout::{CHUNK_ALIGN, PAGE_BYTES};

/// 256 KiB a reader, in which each page has one place; allocated when the first is kept.
const PLACES: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct SharedPages {
    kept: Vec<Option<(ChunkExtent, u16)>>,
    bytes: Vec<u8>,
}

impl SharedPages {
    /// Where in [`SharedPages::bytes`] the page is, if it was kept.
    pub(crate) fn find(&self, chunk: ChunkExtent, slot: u16) -> Option<usize> {
        let place = place(chunk, slot);
        let is_it = *self.kept.get(place)? == Some((chunk, slot));
        is_it.then_some(place * PAGE_BYTES)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Keeps it, in the place of another one.
    pub(crate) fn keep(&mut self, chunk: ChunkExtent, slot: u16, page: &[u8]) {
        if self.kept.is_empty() {
            self.kept.resize(PLACES, None);
            // Memory that is used as it is filled.
            self.bytes = vec![0; PLACES * PAGE_BYTES];
        }
        let place = place(chunk, slot);
        self.kept[place] = Some((chunk, slot));
        self.bytes[place * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(page);
    }
}

/// Chunks are of any length, so their offsets are spread well enough.
fn place(chunk: ChunkExtent, slot: u16) -> usize {
    (chunk.offset() / CHUNK_ALIGN as u64 + u64::from(slot)) as usize % PLACES
}
