//! Pages of the snapshot, kept in memory for the next reset of an eagerly restored guest.
//!
//! To read and decode a page again takes much longer than to copy it, and a guest that is reset again and again mostly
//! writes to the same pages. So the content of pages that were put back is kept.

use std::collections::BTreeMap;

use snapfmt::layout::PAGE_BYTES;

/// Most memory for kept pages. Pages beyond it are read from the snapshot each time.
const MAX_BYTES: usize = 64 << 20;

/// Pages of the snapshot that the guest had written to before earlier resets, by source offset.
#[derive(Debug, Default)]
pub(crate) struct KeptPages(BTreeMap<u64, Box<[u8]>>);

impl KeptPages {
    pub(crate) fn get(&self, source_offset: u64) -> Option<&[u8]> {
        self.0.get(&source_offset).map(|page| &page[..])
    }

    /// How many more bytes may be kept.
    pub(crate) fn room_bytes(&self) -> usize {
        MAX_BYTES.saturating_sub(self.0.len() * PAGE_BYTES)
    }

    /// Keeps pages that follow each other, from `source_offset` on, as long as there is room.
    pub(crate) fn keep(&mut self, source_offset: u64, bytes: &[u8]) {
        let pages = (source_offset..).step_by(PAGE_BYTES).zip(bytes.chunks(PAGE_BYTES));
        for (offset, page) in pages.take(self.room_bytes() / PAGE_BYTES) {
            self.0.insert(offset, page.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_pages_are_bounded() {
        let mut kept = KeptPages::default();
        kept.keep(1 << 40, &[[1; PAGE_BYTES], [2; PAGE_BYTES]].concat());
        assert_eq!(kept.get((1 << 40) + PAGE_BYTES as u64), Some(&[2; PAGE_BYTES][..]));
        let many = vec![3; MAX_BYTES];
        kept.keep(0, &many);
        kept.keep(1 << 41, &many);
        assert_eq!((kept.0.len() * PAGE_BYTES, kept.room_bytes()), (MAX_BYTES, 0));
        assert!(kept.get(1 << 40).is_some() && kept.get(1 << 41).is_none());
    }
}
