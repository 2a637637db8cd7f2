//! Reading all of a snapshot's memory at once, on all cores: what an eager restore does.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use crate::chunk::ChunkBuffer;
use crate::entry::{ChunkExtent, PageEntry, PageIndex};
use crate::error::ReadError;
use crate::layout::{LEAF_SPAN_BYTES, PAGE_BYTES};
use crate::ordered;
use crate::read_at::ReadAt;
use crate::snapshot::Snapshot;
use crate::writer::{OnProgress, Progress};

/// Called by [`Snapshot::load`] with a source offset and the bytes there: whole pages.
pub type OnPages<'a> = &'a (dyn Fn(u64, &[u8]) + Sync);

impl<R: ReadAt> Snapshot<R> {
    /// Reads every page that is not zero and hands it to `place`, from several threads, in no
    /// particular order; each page once. Pages that follow each other come together where the
    /// file holds them so. Gives the bytes of the chunks that were read, of all layers.
    ///
    /// # Errors
    /// [`ReadError`]; some pages were handed out by then.
    pub fn load(
        &self,
        threads: NonZeroUsize,
        place: OnPages<'_>,
        progress: OnProgress<'_>,
    ) -> Result<u64, ReadError> {
        let total_bytes = self.leaf_count() as u64 * LEAF_SPAN_BYTES;
        let (mut done_bytes, mut bytes_read) = (0, 0);
        ordered::run(
            self.leaf_count(),
            threads,
            || Ok((ChunkBuffer::new(), Vec::new())),
            |(buffer, slots), leaf, bytes_read| {
                *bytes_read = self.load_leaf(leaf, buffer, slots, place)?;
                Ok(())
            },
            |of_leaf: &mut u64| {
                bytes_read += *of_leaf;
                done_bytes += LEAF_SPAN_BYTES;
                match progress(Progress { done_bytes, total_bytes }) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(ReadError::Cancelled),
                }
            },
        )?;
        Ok(bytes_read)
    }

    /// Loads one leaf, each of its chunks once. Gives the bytes of those chunks.
    fn load_leaf(
        &self,
        leaf: usize,
        buffer: &mut ChunkBuffer,
        slots: &mut Vec<(ChunkExtent, u16, PageIndex)>,
        place: OnPages<'_>,
    ) -> Result<u64, ReadError> {
        slots.clear();
        self.for_each_entry(leaf..leaf + 1, |page, entry| {
            if let PageEntry::Data { chunk, slot } = entry {
                slots.push((chunk, slot, page));
            }
            Ok(())
        })?;
        slots.sort_unstable();
        let mut bytes_read = 0;
        for of_chunk in slots.chunk_by(|a, b| a.0 == b.0) {
            let chunk = self.chunk(of_chunk[0].0, buffer)?;
            bytes_read += u64::from(chunk.extent().len_bytes());
            let chunk_layer = usize::from(of_chunk[0].0.layer());
            let follows = |a: &(_, u16, PageIndex), b: &(_, u16, PageIndex)| {
                // The last page of 16 TiB has no number after it.
                b.1 == a.1 + 1 && a.2.0.checked_add(1) == Some(b.2.0)
            };
            for run in of_chunk.chunk_by(follows) {
                let (_, slot, page) = run[0];
                let start = usize::from(slot) * PAGE_BYTES;
                let bytes = chunk.bytes().get(start..start + run.len() * PAGE_BYTES);
                place(
                    page.source_offset(),
                    bytes.ok_or_else(|| self.bad_slot(chunk_layer, page, slot))?,
                );
            }
        }
        Ok(bytes_read)
    }
}
