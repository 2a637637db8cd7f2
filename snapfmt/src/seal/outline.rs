//! What can be read of a file, sealed or not, without a key: its header and its section table, and whether its bytes have
//! their checksums.

use std::num::NonZeroUsize;

use super::file_seal::Seal;
use super::provider::KeyProvider;
use super::slots::KeySlots;
use crate::chunk::Binding;
use crate::error::{Corruption, Part, Problem, ReadError};
use crate::header::Header;
use crate::layer::{healed, read, read_section};
use crate::layout::{HEADER_BYTES, MAGIC, MAX_KEYS_BYTES, SECTION_RECORD_BYTES, TAG_BYTES};
use crate::progress::OnProgress;
use crate::read_at::ReadAt;
use crate::section::{self, Section, SectionKind};
use crate::verify_bytes::FileBytes;

/// Header and section table, checked.
pub(crate) struct Parts {
    pub(crate) header: Header,
    pub(crate) sections: Vec<Section>,
    header_bytes: Box<[u8; HEADER_BYTES]>,
    table: Vec<u8>,
}

impl Parts {
    pub(crate) fn read(storage: &dyn ReadAt, file_bytes: u64) -> Result<Self, ReadError> {
        let (header, header_bytes) =
            healed(storage, 0..HEADER_BYTES as u64, || read_header(storage, file_bytes))?;
        let table_bytes = header.table_records as usize * SECTION_RECORD_BYTES;
        let (part, offset) = (Part::SectionTable, header.table_offset);
        let table = read(storage, part, offset, table_bytes, header.table_crc)?;
        let sections = section::parse_table(&table, header.table_offset)?;
        Ok(Self { header, sections, header_bytes, table })
    }

    /// The keys of a sealed file, checked with the header, the table and KEYS; `None` if the file is not sealed and none
    /// are given.
    pub(crate) fn unlock(
        &self,
        storage: &dyn ReadAt,
        keys: Option<&dyn KeyProvider>,
    ) -> Result<Option<Seal>, ReadError> {
        let (slots, provider) = match (self.key_slots(storage)?, keys) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(ReadError::KeyNeeded),
            (None, Some(_)) => return Err(ReadError::NotSealed),
            (Some(slots), Some(provider)) => (slots, provider),
        };
        let seal = Seal::open(provider, slots, self.header.id)?;
        seal.check_header(&self.header_bytes, &self.table)
            .map_err(|problem| Corruption::new(Part::Header, 0, problem))?;
        Ok(Some(seal))
    }

    /// Whether this is the header of a sealed file that is a copy of another one: the same file key authenticates it.
    pub(crate) fn is_copy_of(
        &self,
        storage: &dyn ReadAt,
        original: &Seal,
    ) -> Result<bool, ReadError> {
        let Some(slots) = self.key_slots(storage)? else { return Ok(false) };
        let seal = original.of_other_copy(slots, self.header.id);
        let checked = seal.map(|seal| seal.check_header(&self.header_bytes, &self.table));
        Ok(matches!(checked, Some(Ok(()))))
    }

    /// The section KEYS of a sealed file. Other files have none.
    fn key_slots(&self, storage: &dyn ReadAt) -> Result<Option<KeySlots>, ReadError> {
        let (kind, table_offset) = (SectionKind::KEYS, self.header.table_offset);
        if !self.header.is_sealed() {
            let found = self.sections.iter().filter(|section| section.kind == kind).count();
            return match found {
                0 => Ok(None),
                _ => {
                    let problem = Problem::SectionCount { kind, found };
                    Err(Corruption::new(Part::SectionTable, table_offset, problem).into())
                }
            };
        }
        let section = section::only(&self.sections, kind, table_offset)?;
        let bytes = read_section(storage, None, &section, 1, MAX_KEYS_BYTES)?;
        Ok(Some(KeySlots::parse(&bytes, section.offset)?))
    }
}

fn read_header(
    storage: &dyn ReadAt,
    file_bytes: u64,
) -> Result<(Header, Box<[u8; HEADER_BYTES]>), ReadError> {
    let mut bytes = Box::new([0; HEADER_BYTES]);
    // If a file is too short for a header, check first whether it begins like a snapshot.
    let len = file_bytes.min(HEADER_BYTES as u64) as usize;
    storage
        .read_exact_at(&mut bytes[..len], 0)
        .map_err(|source| ReadError::io(Part::Header, 0, len as u64, source))?;
    if len < HEADER_BYTES && bytes.starts_with(&MAGIC) || len == 0 {
        return Err(ReadError::WrongLength { expected: HEADER_BYTES as u64, found: file_bytes });
    }
    Ok((Header::decode(&bytes, file_bytes)?, bytes))
}

/// A snapshot file as far as it can be read without a key. It is one file: parents are not opened.
pub struct Outline<R> {
    storage: R,
    parts: Parts,
    keys: Option<KeySlots>,
}

/// What [`Outline::verify`] has checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifiedOutline {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Chunks. Their checksums are right; whether they can be decoded is not known without a key.
    pub chunks: u64,
    /// Pages stored in them.
    pub stored_pages: u64,
}

impl<R: ReadAt> Outline<R> {
    /// Reads and checks the header and the section table of a file, and which keys open it.
    ///
    /// # Errors
    /// [`ReadError`] when the storage fails, the bytes are not a snapshot, or one of these parts is damaged.
    pub fn open(storage: R) -> Result<Self, ReadError> {
        let failed = |source| ReadError::io(Part::Header, 0, HEADER_BYTES as u64, source);
        let parts = Parts::read(&storage, storage.len_bytes().map_err(failed)?)?;
        let keys = parts.key_slots(&storage)?;
        Ok(Self { storage, parts, keys })
    }

    /// The file's header. Without a key it is not authenticated.
    pub fn header(&self) -> &Header {
        &self.parts.header
    }

    /// The file's sections, in the order in which they are in the file.
    pub fn sections(&self) -> &[Section] {
        &self.parts.sections
    }

    /// Which keys open the file, if it is sealed.
    pub fn keys(&self) -> Option<&KeySlots> {
        self.keys.as_ref()
    }

    /// Reads the whole file and checks everything that can be checked without a key: all checksums, which cover the
    /// ciphertext, padding, and the numbers of chunks and of stored pages. It detects accidents, not forgery.
    ///
    /// # Errors
    /// The first [`ReadError`] in file order.
    pub fn verify(
        &self,
        threads: NonZeroUsize,
        progress: OnProgress<'_>,
    ) -> Result<VerifiedOutline, ReadError> {
        let Parts { header, sections, .. } = &self.parts;
        let report = crate::verify_bytes::reporting(header.file_bytes, progress);
        let file = FileBytes { storage: &self.storage, header, sections };
        file.reserved()?;
        let chunks = file.chunk_list()?;
        let tag_bytes = if header.is_sealed() { TAG_BYTES } else { 0 };
        let binding = Binding { seed: header.chunk_seed(), tag_bytes, seal: None };
        let stored_pages = file.for_chunks(&chunks, threads, &report, &|extent, buffer| {
            let bytes = extent.offset()..extent.end();
            let checked = healed(&self.storage, bytes, || {
                let stored = buffer.refill(extent.len_bytes() as usize);
                file.read_part(Part::Section(SectionKind::CHUNKS), stored, extent.offset())?;
                buffer.check(extent, binding)
            })?;
            Ok(checked.pages.into())
        })?;
        file.sections(&report)?;
        file.count("chunks", chunks.len() as u64, header.chunks)?;
        file.count("stored_pages", stored_pages, header.stored_pages)?;
        report(header.file_bytes)?;
        let (file_bytes, chunks) = (header.file_bytes, chunks.len() as u64);
        Ok(VerifiedOutline { file_bytes, chunks, stored_pages })
    }
}
