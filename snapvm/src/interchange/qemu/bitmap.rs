//! Which pages QEMU has written to the file.

use std::io;
use std::ops::Range;

use snapfmt::ReadAt;
use snapfmt::layout::PAGE_BYTES;

use super::stream::MappedRam;

/// The bitmaps of all RAM blocks. The page of a clear bit is zero, whatever the file has in its place: QEMU leaves there
/// what a page was before it became zero.
#[derive(Debug)]
pub(in super::super) struct WrittenPages {
    /// Sorted by their place in the file.
    blocks: Vec<BlockBitmap>,
}

#[derive(Debug)]
struct BlockBitmap {
    /// The place of its pages in the file.
    pages: Range<u64>,
    page_bytes: u64,
    bits: Vec<u8>,
}

impl WrittenPages {
    /// Reads the bitmaps.
    pub(in super::super) fn read(file: &dyn ReadAt, mapped: &MappedRam) -> io::Result<Self> {
        let mut blocks = Vec::with_capacity(mapped.blocks.len());
        for block in &mapped.blocks {
            let bitmap = block.bitmap();
            // All together have at most 64 MiB: see `MappedRam::parse`.
            let mut bits = vec![0; (bitmap.end - bitmap.start) as usize];
            file.read_exact_at(&mut bits, bitmap.start)?;
            blocks.push(BlockBitmap { pages: block.pages(), page_bytes: block.page_bytes, bits });
        }
        Ok(Self { blocks })
    }

    /// Zeroes, in bytes read from `offset` of the file on, the pages that are not written. Returns whether there was
    /// anything else than zeros. Offset and length are whole pages of 4096 bytes.
    pub(in super::super) fn clear_others(&self, bytes: &mut [u8], offset: u64) -> bool {
        let mut cleared = false;
        for (page, at) in bytes.chunks_mut(PAGE_BYTES).zip((offset..).step_by(PAGE_BYTES)) {
            if !self.is_written(at) && page.iter().any(|byte| *byte != 0) {
                page.fill(0);
                cleared = true;
            }
        }
        cleared
    }

    fn is_written(&self, at: u64) -> bool {
        let next = self.blocks.partition_point(|block| block.pages.end <= at);
        self.blocks.get(next).filter(|block| block.pages.start <= at).is_some_and(|block| {
            let page = (at - block.pages.start) / block.page_bytes;
            block.bits.get((page / 8) as usize).is_some_and(|byte| byte >> (page % 8) & 1 == 1)
        })
    }
}
