//! Verification: every byte of the file against its checksum, and the index against the chunks.

use std::num::NonZeroUsize;

use crate::chunk::ChunkBuffer;
use crate::entry::{ChunkExtent, PageEntry, PageIndex};
use crate::error::{Corruption, Part, Problem, ReadError};
use crate::layer::Layer;
use crate::layout::LEAF_PAGES;
use crate::page_table::PageTable;
use crate::progress::{OnProgress, Progress};
use crate::read_at::ReadAt;
use crate::section::SectionKind;
use crate::snapshot::Snapshot;
use crate::verify_bytes::{FileBytes, reporting};

/// What [`Snapshot::verify`] has checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Chunks, each decoded.
    pub chunks: u64,
    /// Pages stored in them.
    pub stored_pages: u64,
    /// Pages that the index finds in them.
    pub data_pages: u64,
}

impl<R: ReadAt> Snapshot<R> {
    /// [`Snapshot::verify`] of the file and of all its parents, in this order. Returns what was
    /// checked in each.
    ///
    /// # Errors
    /// The first [`ReadError`]; of a parent it is [`ReadError::InParent`].
    pub fn verify_chain(
        &self,
        threads: NonZeroUsize,
        progress: OnProgress<'_>,
    ) -> Result<Vec<Verified>, ReadError> {
        let total_bytes = self.layers.iter().map(|layer| layer.header.file_bytes).sum();
        let mut before = 0;
        let each = self.layers.iter().enumerate().map(|(number, layer)| {
            let verified = verify(layer, threads, &|Progress { done_bytes, .. }| {
                progress(Progress { done_bytes: before + done_bytes, total_bytes })
            });
            before += layer.header.file_bytes;
            verified.map_err(|error| layer.named(number, error))
        });
        each.collect()
    }

    /// Reads the whole file, but not its parents, and checks everything in it, so that a flip of any byte is detected:
    /// all checksums, padding, that each chunk decodes, that each slot belongs to the page that it was stored for, and
    /// that the counts in the header are right. Of a sealed file it also checks that all of it is authentic.
    ///
    /// # Errors
    /// The first [`ReadError`] in file order.
    pub fn verify(
        &self,
        threads: NonZeroUsize,
        progress: OnProgress<'_>,
    ) -> Result<Verified, ReadError> {
        let layer = &self.layers[0];
        verify(layer, threads, progress).map_err(|error| layer.named(0, error))
    }
}

fn verify<R: ReadAt>(
    layer: &Layer<R>,
    threads: NonZeroUsize,
    progress: OnProgress<'_>,
) -> Result<Verified, ReadError> {
    let header = &layer.header;
    let file_bytes = header.file_bytes;
    let report = reporting(file_bytes, progress);
    let verifier = Verifier { layer, table: PageTable::new(std::slice::from_ref(layer)) };
    let file = FileBytes { storage: &layer.storage, header, sections: &layer.sections };
    file.reserved()?;
    let chunks = file.chunk_list()?;
    let check = |extent, buffer: &mut ChunkBuffer| verifier.chunk(extent, buffer);
    let stored_pages = file.for_chunks(&chunks, threads, &report, &check)?;
    verifier.contents()?;
    file.sections(&report)?;
    let (data_pages, parent_pages) = verifier.index(&chunks)?;

    file.count("chunks", chunks.len() as u64, header.chunks)?;
    file.count("stored_pages", stored_pages, header.stored_pages)?;
    file.count("data_pages", data_pages, header.data_pages)?;
    file.count("parent_pages", parent_pages, header.parent_pages)?;
    // A file that was replaced meanwhile must not be reported as good.
    layer.unchanged()?;
    report(file_bytes)?;
    Ok(Verified { file_bytes, chunks: chunks.len() as u64, stored_pages, data_pages })
}

/// Verifies one file alone: its parents, if it has any, are verified separately.
struct Verifier<'a, R> {
    layer: &'a Layer<R>,
    table: PageTable,
}

impl<R: ReadAt> Verifier<'_, R> {
    /// Decodes a chunk and checks that the index refers each page that the chunk lists to that chunk and slot. Returns
    /// the number of slots.
    fn chunk(&self, extent: ChunkExtent, buffer: &mut ChunkBuffer) -> Result<u64, ReadError> {
        let stored = buffer.refill(extent.len_bytes() as usize);
        self.layer.read_chunks(&self.layer.storage, stored, extent.offset())?;
        self.layer.check_chunk(extent, buffer)?;
        let chunk = buffer.held(extent)?;
        for (slot, page) in (0..).zip(chunk.pages()) {
            let here = PageEntry::Data { chunk: extent, slot };
            if u64::from(page.0) >= self.layer.header.pages() || self.entry(*page)? != here {
                return Err(self.bad_slot(*page, slot).into());
            }
        }
        Ok(chunk.pages().len() as u64)
    }

    /// The content of the working set. Of a sealed file, also that the sections are authentic which opening does not
    /// read.
    fn contents(&self) -> Result<(), ReadError> {
        self.layer.working_set()?;
        if self.layer.seal.is_some() {
            self.layer.metadata()?;
            self.layer.parent_hint()?;
            let kind = SectionKind::STATE;
            for section in self.layer.sections.iter().filter(|section| section.kind == kind) {
                self.layer.state(section.tag)?;
            }
        }
        Ok(())
    }

    /// Checks that every entry refers to a slot of an existing chunk. Returns the number of data pages and
    /// of pages that are as in the parent.
    fn index(&self, chunks: &[(ChunkExtent, u16)]) -> Result<(u64, u64), ReadError> {
        let (mut data_pages, mut parent_pages) = (0, 0);
        let mut hint = 0;
        let leaves = self.table.leaf_numbers().len();
        let layers = std::slice::from_ref(self.layer);
        self.table.for_each_entry(layers, 0..leaves, &mut |page, entry| {
            let PageEntry::Data { chunk, slot } = entry else {
                parent_pages += 1;
                return Ok(());
            };
            data_pages += 1;
            // Neighbouring pages mostly are in the same chunk.
            if chunks.get(hint).is_none_or(|(extent, _)| *extent != chunk) {
                hint = chunks.partition_point(|(extent, _)| extent.offset() < chunk.offset());
            }
            match chunks.get(hint) {
                Some((extent, pages)) if *extent == chunk && slot < *pages => Ok(()),
                _ => Err(self.bad_slot(page, slot).into()),
            }
        })?;
        if self.layer.index.absent() == PageEntry::Parent {
            let pages = self.layer.header.pages();
            let in_leaf = |number: u32| {
                let first = u64::from(number) * LEAF_PAGES as u64;
                (pages - first).min(LEAF_PAGES as u64)
            };
            parent_pages += pages - self.table.leaf_numbers().map(in_leaf).sum::<u64>();
        }
        Ok((data_pages, parent_pages))
    }

    fn entry(&self, page: PageIndex) -> Result<PageEntry, ReadError> {
        self.table.entry(std::slice::from_ref(self.layer), page)
    }

    fn bad_slot(&self, page: PageIndex, slot: u16) -> Corruption {
        let part = Part::Section(SectionKind::INDEX_LEAVES);
        let offset = self.layer.index.entry_offset(page);
        Corruption::new(part, offset, Problem::Slot { page: page.0, slot })
    }
}
