//! Verification: every byte of the file against its checksum, and the index against the chunks.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use crate::chunk::{ChunkBuffer, ChunkHeader, corruption};
use crate::entry::{ChunkExtent, PageEntry, PageIndex};
use crate::error::{Corruption, Part, Problem, ReadError};
use crate::header::{self, Header};
use crate::layer::{self, Layer};
use crate::layout::{CHUNK_HEADER_BYTES, HEADER_BYTES, LEAF_PAGES};
use crate::ordered;
use crate::page_table::PageTable;
use crate::read_at::ReadAt;
use crate::section::{self, SectionKind};
use crate::snapshot::Snapshot;
use crate::writer::{OnProgress, Progress};

/// Chunks that one task reads: about a megabyte of file.
const CHUNKS_PER_TASK: usize = 64;

/// Called with the offset and the bytes of each block of a part of the file.
type OnBlock<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), ReadError>;

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
    /// that the counts in the header are right.
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
    let total_bytes = header.file_bytes;
    let report = |done_bytes| match progress(Progress { done_bytes, total_bytes }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(ReadError::Cancelled),
    };
    let verifier = Verifier { layer, table: PageTable::new(std::slice::from_ref(layer)) };
    verifier.reserved()?;
    let chunks = verifier.chunk_list()?;
    let stored_pages = verifier.chunks(&chunks, threads, &report)?;
    verifier.sections(&report)?;
    let (data_pages, parent_pages) = verifier.index(&chunks)?;

    let expect = |field, expected, found: u64| match expected == found {
        true => Ok(()),
        false => {
            let problem = Problem::Field { field, expected, found };
            Err(Corruption::new(Part::Header, 0, problem))
        }
    };
    expect("chunks", chunks.len() as u64, header.chunks)?;
    expect("stored_pages", stored_pages, header.stored_pages)?;
    expect("data_pages", data_pages, header.data_pages)?;
    expect("parent_pages", parent_pages, header.parent_pages)?;
    // A file that was replaced meanwhile must not be reported as good.
    layer.unchanged()?;
    report(total_bytes)?;
    Ok(Verified { file_bytes: total_bytes, chunks: chunks.len() as u64, stored_pages, data_pages })
}

/// Verifies one file alone: its parents, if it has any, are verified separately.
struct Verifier<'a, R> {
    layer: &'a Layer<R>,
    table: PageTable,
}

impl<R: ReadAt> Verifier<'_, R> {
    /// The header's unused bytes and the padding between sections are zero.
    fn reserved(&self) -> Result<(), ReadError> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_part(Part::Header, &mut bytes, 0)?;
        // Again, because the file may have changed since it was opened.
        Header::decode(&bytes, self.layer.header.file_bytes)?;
        if !header::reserved_is_zero(&bytes) {
            let problem = Problem::Field { field: "reserved", expected: 0, found: 1 };
            return Err(Corruption::new(Part::Header, 0, problem).into());
        }
        let mut free_from = HEADER_BYTES as u64;
        let starts = self.layer.sections.iter().map(|section| (section.offset, section.end()));
        for (start, end) in starts.chain([(self.layer.header.table_offset, 0)]) {
            self.scan(
                Part::Padding,
                free_from,
                start - free_from,
                &mut |offset, block| match block.iter().position(|byte| *byte != 0) {
                    None => Ok(()),
                    Some(at) => {
                        let found = u64::from(block[at]);
                        let problem = Problem::Field { field: "padding", expected: 0, found };
                        let place = offset + at as u64;
                        Err(Corruption::new(Part::Padding, place, problem).into())
                    }
                },
            )?;
            free_from = end;
        }
        Ok(())
    }

    /// Every chunk of the chunks section, which they fill without a gap.
    fn chunk_list(&self) -> Result<Vec<(ChunkExtent, u16)>, ReadError> {
        let table = self.layer.header.table_offset;
        let section = section::only(&self.layer.sections, SectionKind::CHUNKS, table)?;
        let part = Part::Section(SectionKind::CHUNKS);
        // Grows with the chunks that are found: neither the header's count nor the length of the section, which may be
        // a hole of terabytes, is trusted.
        let mut chunks = Vec::new();
        let mut offset = section.offset;
        while offset < section.end() {
            let room = section.end() - offset;
            let too_long = |len: u64| {
                let (field, max) = ("chunk length", room);
                corruption(offset, Problem::Range { field, min: 0, max, found: len })
            };
            if room < CHUNK_HEADER_BYTES as u64 {
                return Err(too_long(CHUNK_HEADER_BYTES as u64).into());
            }
            let place = offset..offset + CHUNK_HEADER_BYTES as u64;
            let header = layer::healed(&self.layer.storage, place, || {
                let mut bytes = [0; CHUNK_HEADER_BYTES];
                self.read_part(part, &mut bytes, offset)?;
                Ok(ChunkHeader::decode(&bytes, offset)?)
            })?;
            let (found, max) = (header.pages.into(), self.layer.header.chunk_pages.into());
            if found > max {
                let problem = Problem::Range { field: "chunk.pages", min: 1, max, found };
                return Err(corruption(offset, problem).into());
            }
            let extent = header.extent(offset);
            if u64::from(extent.len_bytes()) > room {
                return Err(too_long(extent.len_bytes().into()).into());
            }
            chunks.push((extent, header.pages));
            offset = extent.end();
        }
        Ok(chunks)
    }

    /// Decodes every chunk and checks that the index refers each page that a chunk lists to that
    /// chunk and slot. Returns the number of slots.
    fn chunks(
        &self,
        chunks: &[(ChunkExtent, u16)],
        threads: NonZeroUsize,
        report: &(dyn Fn(u64) -> Result<(), ReadError> + Sync),
    ) -> Result<u64, ReadError> {
        let mut stored_pages = 0;
        ordered::run(
            chunks.len().div_ceil(CHUNKS_PER_TASK),
            threads,
            || Ok(ChunkBuffer::new()),
            |buffer, task, result: &mut Option<Result<(u64, u64), ReadError>>| {
                let first = task * CHUNKS_PER_TASK;
                let batch = &chunks[first..(first + CHUNKS_PER_TASK).min(chunks.len())];
                // An error is passed to the sink, which gets the first one in file order.
                *result = Some(batch.iter().try_fold((0, 0), |(_, pages), (extent, _)| {
                    Ok((extent.end(), pages + self.chunk(*extent, buffer)?))
                }));
                Ok(())
            },
            |result| {
                let (end, pages) = result.take().unwrap_or(Ok((0, 0)))?;
                stored_pages += pages;
                report(end)
            },
        )?;
        Ok(stored_pages)
    }

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

    /// The checksum of every section that has one, known or not, and the content of the working set.
    fn sections(&self, report: &dyn Fn(u64) -> Result<(), ReadError>) -> Result<(), ReadError> {
        let sections = &self.layer.sections;
        self.layer.working_set()?;
        for section in sections.iter().filter(|section| section.has_crc()) {
            let part = Part::Section(section.kind);
            layer::healed(&self.layer.storage, section.offset..section.end(), || {
                let mut hasher = crc32fast::Hasher::new();
                self.scan(part, section.offset, section.len, &mut |offset, block| {
                    hasher.update(block);
                    report(offset)
                })?;
                let (expected, found) = (section.crc, hasher.finalize());
                let problem = Problem::Checksum { expected, found };
                match expected == found {
                    true => Ok(()),
                    false => Err(Corruption::new(part, section.offset, problem).into()),
                }
            })?;
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

    /// Reads a part of the file in blocks of bounded size.
    fn scan(&self, part: Part, offset: u64, len: u64, visit: OnBlock<'_>) -> Result<(), ReadError> {
        const BLOCK_BYTES: u64 = 1 << 20;
        let mut block = vec![0; len.min(BLOCK_BYTES) as usize];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let bytes = &mut block[..(end - at).min(BLOCK_BYTES) as usize];
            self.read_part(part, bytes, at)?;
            visit(at, bytes)?;
            at += bytes.len() as u64;
        }
        Ok(())
    }

    fn read_part(&self, part: Part, bytes: &mut [u8], offset: u64) -> Result<(), ReadError> {
        self.layer
            .storage
            .read_exact_at(bytes, offset)
            .map_err(|source| ReadError::io(part, offset, bytes.len() as u64, source))
    }
}
