//! Reading all of a snapshot's memory, or parts of it, on all cores, as an eager restore and its resets do.

use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};

use crate::behind::Behind;
use crate::chunk::ChunkBuffer;
use crate::entry::{ChunkExtent, PageEntry, PageIndex};
use crate::error::{ChainError, ReadError};
use crate::layout::{LEAF_SPAN_BYTES, PAGE_BYTES};
use crate::ordered;
use crate::progress::{OnProgress, Progress};
use crate::read_at::ReadAt;
use crate::snapshot::Snapshot;

/// Called by [`Snapshot::load`] with a source offset and the bytes there: whole pages.
pub type OnPages<'a> = &'a (dyn Fn(u64, &[u8]) + Sync);

/// A page and its place in a chunk.
type Slot = (ChunkExtent, u16, PageIndex);

impl<R: ReadAt> Snapshot<R> {
    /// Reads every page that is not zero and passes it to `place`, from several threads, in no
    /// particular order; each page once. Pages that follow each other are passed together if the
    /// file stores them so. If no part of a large file was cached, its chunks are released meanwhile: see
    /// [`Snapshot::release`].
    ///
    /// # Errors
    /// [`ReadError`]; some pages may have been passed to `place` before.
    pub fn load(
        &self,
        threads: NonZeroUsize,
        place: OnPages<'_>,
        progress: OnProgress<'_>,
    ) -> Result<Loaded, ReadError> {
        let total_bytes = self.leaf_count() as u64 * LEAF_SPAN_BYTES;
        let (mut done_bytes, mut bytes_read) = (0, 0);
        let mut behind = Behind::new(&self.layers);
        let loaded = ordered::run(
            self.leaf_count(),
            threads,
            || Ok((ChunkBuffer::new(), Vec::new())),
            |(buffer, slots), leaf, of_leaf| self.load_leaf(leaf, buffer, slots, place, of_leaf),
            |of_leaf: &mut LoadedLeaf| {
                bytes_read += of_leaf.bytes;
                for (layer, offset) in &of_leaf.reached {
                    behind.reached(*layer, *offset);
                }
                done_bytes += LEAF_SPAN_BYTES;
                match progress(Progress { done_bytes, total_bytes }) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(ReadError::Cancelled),
                }
            },
        );
        loaded.map(|()| Loaded { bytes_read, unneeded: behind.finish() })
    }

    /// Reads the pages of some `parts` of memory, ranges of source offsets, and passes those that are not zero to `place`,
    /// as [`Snapshot::load`] does. A chunk that has several of the pages is read once. Returns the ranges of the pages that
    /// are zero, in the order of `parts`.
    ///
    /// # Errors
    /// [`ReadError`]; some pages may have been passed to `place` before.
    pub fn load_parts(
        &self,
        parts: &[Range<u64>],
        threads: NonZeroUsize,
        place: OnPages<'_>,
    ) -> Result<Vec<Range<u64>>, ReadError> {
        let (mut slots, mut zeros) = (Vec::new(), Vec::<Range<u64>>::new());
        for part in parts {
            for offset in (part.start..part.end).step_by(PAGE_BYTES) {
                let out_of_range = || ReadError::NoSuchPage {
                    page: offset / PAGE_BYTES as u64,
                    pages: self.header().pages(),
                };
                let page = PageIndex::containing(offset).ok_or_else(out_of_range)?;
                match self.entry(page)? {
                    PageEntry::Data { chunk, slot } => slots.push((chunk, slot, page)),
                    PageEntry::Zero => match zeros.last_mut() {
                        Some(last) if last.end == offset => last.end += PAGE_BYTES as u64,
                        _ => zeros.push(offset..offset + PAGE_BYTES as u64),
                    },
                    PageEntry::Parent => {
                        return Err(ChainError::ParentNeeded { id: self.header().id }.into());
                    }
                }
            }
        }
        slots.sort_unstable();
        let chunks: Vec<_> = slots.chunk_by(of_one_chunk).collect();
        ordered::run(
            chunks.len(),
            threads,
            || Ok(ChunkBuffer::new()),
            |buffer, chunk, _: &mut ()| self.load_of_chunk(chunks[chunk], buffer, place),
            |_| Ok(()),
        )?;
        Ok(zeros)
    }

    /// Releases what [`Snapshot::load`] has read into the page cache: the chunks of files of which nothing was cached
    /// before. Their index stays cached, so that all of a file that is loaded again soon stays cached.
    ///
    /// The loaded memory does not need this call, which may follow when the memory is already in use. It takes 30 us
    /// for each MiB.
    pub fn release(&self, loaded: &Loaded) {
        for number in &loaded.unneeded {
            if let Some(layer) = self.layers.get(usize::from(*number)) {
                layer.storage.release(layer.index.chunks());
            }
        }
    }

    /// Loads one leaf, each of its chunks once.
    fn load_leaf(
        &self,
        leaf: usize,
        buffer: &mut ChunkBuffer,
        slots: &mut Vec<Slot>,
        place: OnPages<'_>,
        loaded: &mut LoadedLeaf,
    ) -> Result<(), ReadError> {
        slots.clear();
        self.for_each_entry(leaf..leaf + 1, |page, entry| {
            if let PageEntry::Data { chunk, slot } = entry {
                slots.push((chunk, slot, page));
            }
            Ok(())
        })?;
        slots.sort_unstable();
        loaded.bytes = 0;
        loaded.reached.clear();
        for of_chunk in slots.chunk_by(of_one_chunk) {
            let extent = of_chunk[0].0;
            self.load_of_chunk(of_chunk, buffer, place)?;
            loaded.bytes += u64::from(extent.len_bytes());
            // By layer and offset: the last one counts.
            match loaded.reached.last_mut() {
                Some(reached) if reached.0 == extent.layer() => reached.1 = extent.end(),
                _ => loaded.reached.push((extent.layer(), extent.end())),
            }
        }
        Ok(())
    }

    /// Loads pages of one chunk, which are sorted.
    fn load_of_chunk(
        &self,
        of_chunk: &[Slot],
        buffer: &mut ChunkBuffer,
        place: OnPages<'_>,
    ) -> Result<(), ReadError> {
        let chunk = self.chunk(of_chunk[0].0, buffer)?;
        let layer = usize::from(chunk.extent().layer());
        let follows = |a: &Slot, b: &Slot| {
            // The last page of 16 TiB has no number after it.
            b.1 == a.1 + 1 && a.2.0.checked_add(1) == Some(b.2.0)
        };
        for run in of_chunk.chunk_by(follows) {
            let (_, slot, page) = run[0];
            let start = usize::from(slot) * PAGE_BYTES;
            let bytes = chunk.bytes().get(start..start + run.len() * PAGE_BYTES);
            place(page.source_offset(), bytes.ok_or_else(|| self.bad_slot(layer, page, slot))?);
        }
        Ok(())
    }
}

fn of_one_chunk(a: &Slot, b: &Slot) -> bool {
    a.0 == b.0
}

/// What [`Snapshot::load`] has read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Loaded {
    /// Bytes of chunks, of all layers.
    pub bytes_read: u64,
    /// Layers of which nothing was cached.
    unneeded: Vec<u16>,
}

/// What was read for one leaf.
#[derive(Default)]
struct LoadedLeaf {
    /// Of chunks.
    bytes: u64,
    /// The end of the last chunk in each layer.
    reached: Vec<(u16, u64)>,
}
