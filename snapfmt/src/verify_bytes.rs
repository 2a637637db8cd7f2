//! The bytes of one file against their checksums, without decoding them: what verification does with a key and without.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use crate::chunk::{ChunkBuffer, ChunkHeader, corruption};
use crate::entry::ChunkExtent;
use crate::error::{Corruption, Part, Problem, ReadError};
use crate::header::{self, Header};
use crate::layer;
use crate::layout::{CHUNK_HEADER_BYTES, HEADER_BYTES, TAG_BYTES};
use crate::ordered;
use crate::progress::{OnProgress, Progress};
use crate::read_at::ReadAt;
use crate::section::{self, Section, SectionKind};

/// Chunks that one task reads: about a megabyte of file.
const CHUNKS_PER_TASK: usize = 64;

/// Called with the offset and the bytes of each block of a part of the file.
type OnBlock<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), ReadError>;

/// Called with the number of bytes done.
pub(crate) type Report<'a> = &'a (dyn Fn(u64) -> Result<(), ReadError> + Sync);

/// Checks one chunk with a thread's buffer. Returns the number of its slots.
pub(crate) type CheckChunk<'a> =
    &'a (dyn Fn(ChunkExtent, &mut ChunkBuffer) -> Result<u64, ReadError> + Sync);

/// Reports progress of all bytes of a file.
pub(crate) fn reporting(
    total_bytes: u64,
    progress: OnProgress<'_>,
) -> impl Fn(u64) -> Result<(), ReadError> + Sync {
    move |done_bytes| match progress(Progress { done_bytes, total_bytes }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(ReadError::Cancelled),
    }
}

/// One file with its header and its sections.
pub(crate) struct FileBytes<'a> {
    pub(crate) storage: &'a dyn ReadAt,
    pub(crate) header: &'a Header,
    pub(crate) sections: &'a [Section],
}

impl FileBytes<'_> {
    /// The header's unused bytes and the padding between sections are zero.
    pub(crate) fn reserved(&self) -> Result<(), ReadError> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_part(Part::Header, &mut bytes, 0)?;
        // Again, because the file may have changed since it was opened.
        let found = Header::decode(&bytes, self.header.file_bytes)?;
        if found.is_sealed() && found != *self.header {
            // The header that was opened is authentic.
            return Err(Corruption::new(Part::Header, 0, Problem::NotAuthentic).into());
        }
        if !header::reserved_is_zero(&bytes) {
            let problem = Problem::Field { field: "reserved", expected: 0, found: 1 };
            return Err(Corruption::new(Part::Header, 0, problem).into());
        }
        let mut free_from = HEADER_BYTES as u64;
        let starts = self.sections.iter().map(|section| (section.offset, section.end()));
        for (start, end) in starts.chain([(self.header.table_offset, 0)]) {
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
    pub(crate) fn chunk_list(&self) -> Result<Vec<(ChunkExtent, u16)>, ReadError> {
        let section = section::only(self.sections, SectionKind::CHUNKS, self.header.table_offset)?;
        let part = Part::Section(SectionKind::CHUNKS);
        let tag_bytes = if self.header.is_sealed() { TAG_BYTES } else { 0 };
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
            let header = layer::healed(self.storage, place, || {
                let mut bytes = [0; CHUNK_HEADER_BYTES];
                self.read_part(part, &mut bytes, offset)?;
                Ok(ChunkHeader::decode(&bytes, offset)?)
            })?;
            let (found, max) = (header.pages.into(), self.header.chunk_pages.into());
            if found > max {
                let problem = Problem::Range { field: "chunk.pages", min: 1, max, found };
                return Err(corruption(offset, problem).into());
            }
            let extent = header.extent(offset, tag_bytes);
            if u64::from(extent.len_bytes()) > room {
                return Err(too_long(extent.len_bytes().into()).into());
            }
            chunks.push((extent, header.pages));
            offset = extent.end();
        }
        Ok(chunks)
    }

    /// Checks every chunk, on several threads. Returns the number of slots.
    pub(crate) fn for_chunks(
        &self,
        chunks: &[(ChunkExtent, u16)],
        threads: NonZeroUsize,
        report: Report<'_>,
        check: CheckChunk<'_>,
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
                    Ok((extent.end(), pages + check(*extent, buffer)?))
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

    /// The checksum of every section that has one, known or not.
    pub(crate) fn sections(&self, report: Report<'_>) -> Result<(), ReadError> {
        for section in self.sections.iter().filter(|section| section.has_crc()) {
            let part = Part::Section(section.kind);
            layer::healed(self.storage, section.offset..section.end(), || {
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

    /// An error if a number in the header is not what was counted.
    pub(crate) fn count(
        &self,
        field: &'static str,
        expected: u64,
        found: u64,
    ) -> Result<(), Corruption> {
        match expected == found {
            true => Ok(()),
            false => {
                let problem = Problem::Field { field, expected, found };
                Err(Corruption::new(Part::Header, 0, problem))
            }
        }
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

    pub(crate) fn read_part(
        &self,
        part: Part,
        bytes: &mut [u8],
        offset: u64,
    ) -> Result<(), ReadError> {
        self.storage
            .read_exact_at(bytes, offset)
            .map_err(|source| ReadError::io(part, offset, bytes.len() as u64, source))
    }
}
