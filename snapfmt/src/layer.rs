//! One file of a snapshot, opened and checked as far as opening does.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::chunk::ChunkBuffer;
use crate::entry::ChunkExtent;
use crate::error::{Corruption, Part, Problem, ReadError};
use crate::guard::Guard;
use crate::header::Header;
use crate::index::Index;
use crate::layout::{
    HEADER_BYTES, INCOMPAT_LAYERED, LEAF_SPAN_BYTES, MAX_METADATA_BYTES, MAX_PARENT_HINT_BYTES,
    MAX_STATE_BYTES, MAX_WORKING_SET_BYTES, REGION_RECORD_BYTES, ROOT_RECORD_BYTES,
    SECTION_RECORD_BYTES, max_regions,
};
use crate::memory_map::{self, MemoryRegion};
use crate::metadata::{self, Metadata};
use crate::parent::ParentHint;
use crate::read_at::ReadAt;
use crate::section::{self, Section, SectionKind};
use crate::snapshot::StateBlob;
use crate::working_set::WorkingSet;

/// One file of a chain.
pub(crate) struct Layer<R> {
    pub(crate) storage: R,
    /// A handle for reading chunks in order, from the first such read on.
    in_order: OnceLock<Option<Box<dyn ReadAt>>>,
    /// Where it is, if it was opened by path.
    pub(crate) path: Option<PathBuf>,
    pub(crate) header: Header,
    pub(crate) sections: Vec<Section>,
    pub(crate) index: Index,
    pub(crate) regions: Vec<MemoryRegion>,
    /// The start value of the checksums of its chunks.
    pub(crate) chunk_seed: u32,
    /// Detects changes, if the storage has a stamp.
    guard: Option<Guard>,
}

impl<R: ReadAt> Layer<R> {
    /// The storage, for reading chunks in order.
    pub(crate) fn in_order(&self) -> &dyn ReadAt {
        let again = self.in_order.get_or_init(|| self.storage.in_order());
        again.as_deref().unwrap_or(&self.storage)
    }

    /// Reads and checks header, section table, memory map and the root of the index.
    pub(crate) fn open(storage: R) -> Result<Self, ReadError> {
        let failed = |source| ReadError::io(Part::Header, 0, HEADER_BYTES as u64, source);
        let stamp = storage.stamp().map_err(failed)?;
        let file_bytes = match stamp {
            Some(stamp) => stamp.len_bytes,
            None => storage.len_bytes().map_err(failed)?,
        };
        let parts = Self::parts(&storage, file_bytes);
        let (header, sections, index, regions) = parts.map_err(|error| {
            match (stamp, storage.stamp()) {
                // It was written to at that moment.
                (Some(opened), Ok(Some(found))) if opened.before_a_write(&found) => {
                    ReadError::Changed { opened, found, source: Some(Box::new(error)) }
                }
                _ => error,
            }
        })?;
        Ok(Self {
            storage,
            in_order: OnceLock::new(),
            path: None,
            chunk_seed: header.chunk_seed(),
            guard: stamp.map(|opened| Guard::new(opened, &header)),
            header,
            sections,
            index,
            regions,
        })
    }

    fn parts(
        storage: &R,
        file_bytes: u64,
    ) -> Result<(Header, Vec<Section>, Index, Vec<MemoryRegion>), ReadError> {
        let header = read_header(storage, file_bytes)?;
        let table_bytes = header.table_records as usize * SECTION_RECORD_BYTES;
        let (part, offset) = (Part::SectionTable, header.table_offset);
        let table = read(storage, part, offset, table_bytes, header.table_crc)?;
        let sections = section::parse_table(&table, header.table_offset)?;

        let only = |kind| section::only(&sections, kind, header.table_offset);
        let map = only(SectionKind::MEMORY_MAP)?;
        let most = max_regions(header.memory_bytes) * REGION_RECORD_BYTES as u64;
        let map_bytes = read_section(storage, &map, REGION_RECORD_BYTES, most)?;
        let regions = memory_map::parse(&map_bytes, map.offset, header.memory_bytes)?;
        let root = only(SectionKind::INDEX_ROOT)?;
        let most = header.memory_bytes.div_ceil(LEAF_SPAN_BYTES) * ROOT_RECORD_BYTES as u64;
        let root_bytes = read_section(storage, &root, ROOT_RECORD_BYTES, most)?;
        let index = Index::parse(
            &root_bytes,
            &root,
            &only(SectionKind::INDEX_LEAVES)?,
            &only(SectionKind::CHUNKS)?,
            header.memory_bytes,
            header.incompat & INCOMPAT_LAYERED != 0,
        )?;
        Ok((header, sections, index, regions))
    }

    /// Reads bytes of chunks, from the storage itself or from [`Layer::in_order`]. The bytes belong to the file that
    /// was opened: the checksum of a chunk is valid for this snapshot only. If the checksums begin with no id, this
    /// checks whether the storage was written to: after the read, because an earlier check could miss a write.
    pub(crate) fn read_chunks(
        &self,
        from: &(impl ReadAt + ?Sized),
        bytes: &mut [u8],
        offset: u64,
    ) -> Result<(), ReadError> {
        let (part, len) = (Part::Section(SectionKind::CHUNKS), bytes.len() as u64);
        from.read_exact_at(bytes, offset)
            .map_err(|source| ReadError::io(part, offset, len, source))?;
        if self.header.chunks_id.is_none() {
            self.unchanged()?;
        }
        Ok(())
    }

    /// Checks and decodes the bytes that were read of a chunk. If they are damaged, and only a copy of other storage, they
    /// are read once more.
    pub(crate) fn check_chunk(
        &self,
        extent: ChunkExtent,
        buffer: &mut ChunkBuffer,
    ) -> Result<(), ReadError> {
        match buffer.decode(extent, self.chunk_seed) {
            Err(ReadError::Corrupt(_)) if self.storage.refetch(extent.offset()..extent.end()) => {
                let stored = buffer.refill(extent.len_bytes() as usize);
                self.read_chunks(&self.storage, stored, extent.offset())?;
                buffer.decode(extent, self.chunk_seed)
            }
            checked => checked,
        }
    }

    /// An error if the storage's stamp shows a write since it was opened.
    pub(crate) fn unchanged(&self) -> Result<(), ReadError> {
        self.guard.as_ref().map_or(Ok(()), |guard| guard.check(&self.storage))
    }

    /// The error for damage in a file: if the file was written to since it was opened, it is not damage but a change.
    fn explained(&self, error: ReadError) -> ReadError {
        if !matches!(error, ReadError::Corrupt(_) | ReadError::Io { .. }) {
            return error;
        }
        match self.unchanged() {
            Err(ReadError::Changed { opened, found, .. }) => {
                ReadError::Changed { opened, found, source: Some(Box::new(error)) }
            }
            _ => error,
        }
    }

    /// An error of this file, as an error of the parent that it is in a chain: `number` is its
    /// place there, 0 for the file that was opened.
    pub(crate) fn named(&self, number: usize, error: ReadError) -> ReadError {
        let error = self.explained(error);
        match error {
            ReadError::Cancelled | ReadError::InParent { .. } => error,
            _ if number == 0 => error,
            _ => ReadError::InParent {
                layer: number as u16,
                id: self.header.id,
                path: self.path.clone(),
                source: Box::new(error),
            },
        }
    }

    pub(crate) fn metadata(&self) -> Result<Metadata, ReadError> {
        let section =
            section::only(&self.sections, SectionKind::METADATA, self.header.table_offset)?;
        let bytes = read_section(&self.storage, &section, 1, MAX_METADATA_BYTES)?;
        Ok(metadata::parse(&bytes, section.offset)?)
    }

    pub(crate) fn state(&self, tag: u32) -> Result<Option<StateBlob>, ReadError> {
        let of_tag = |s: &&Section| s.kind == SectionKind::STATE && s.tag == tag;
        let Some(section) = self.sections.iter().find(of_tag) else { return Ok(None) };
        let bytes = read_section(&self.storage, section, 1, MAX_STATE_BYTES)?;
        Ok(Some(StateBlob { tag, version: section.version, bytes }))
    }

    pub(crate) fn working_set(&self) -> Result<Option<WorkingSet>, ReadError> {
        let of_kind = |section: &&Section| section.kind == SectionKind::WORKING_SET;
        if !self.sections.iter().any(|section| of_kind(&section)) {
            return Ok(None);
        }
        let section =
            section::only(&self.sections, SectionKind::WORKING_SET, self.header.table_offset)?;
        let bytes = read_section(&self.storage, &section, 1, MAX_WORKING_SET_BYTES)?;
        Ok(WorkingSet::parse(&bytes, section.offset, self.header.pages())?)
    }

    /// The file's information about its parent, if it is a layer.
    pub(crate) fn parent_hint(&self) -> Result<Option<ParentHint>, ReadError> {
        if self.header.incompat & INCOMPAT_LAYERED == 0 {
            return Ok(None);
        }
        let section =
            section::only(&self.sections, SectionKind::PARENT_HINT, self.header.table_offset)?;
        let bytes = read_section(&self.storage, &section, 1, MAX_PARENT_HINT_BYTES)?;
        Ok(Some(ParentHint::parse(&self.header, &bytes, section.offset)?))
    }
}

fn read_header(storage: &dyn ReadAt, file_bytes: u64) -> Result<Header, ReadError> {
    healed(storage, 0..HEADER_BYTES as u64, || header_once(storage, file_bytes))
}

fn header_once(storage: &dyn ReadAt, file_bytes: u64) -> Result<Header, ReadError> {
    let mut bytes = Box::new([0; HEADER_BYTES]);
    // If a file is too short for a header, check first whether it begins like a snapshot.
    let len = file_bytes.min(HEADER_BYTES as u64) as usize;
    storage
        .read_exact_at(&mut bytes[..len], 0)
        .map_err(|source| ReadError::io(Part::Header, 0, len as u64, source))?;
    if len < HEADER_BYTES && bytes.starts_with(&crate::layout::MAGIC) || len == 0 {
        return Err(ReadError::WrongLength { expected: HEADER_BYTES as u64, found: file_bytes });
    }
    Header::decode(&bytes, file_bytes)
}

/// Reads a section into memory after checking that its length is a multiple of `unit` and at
/// most `most`; then checks its checksum.
fn read_section(
    storage: &dyn ReadAt,
    section: &Section,
    unit: usize,
    most: u64,
) -> Result<Vec<u8>, ReadError> {
    let part = Part::Section(section.kind);
    let corrupt = |problem| Corruption::new(part, section.offset, problem);
    if section.len > most {
        let (field, found) = ("section.len", section.len);
        return Err(corrupt(Problem::Range { field, min: 0, max: most, found }).into());
    }
    let rest = section.len % unit as u64;
    if rest != 0 {
        let field = "section.len modulo record";
        return Err(corrupt(Problem::Field { field, expected: 0, found: rest }).into());
    }
    read(storage, part, section.offset, section.len as usize, section.crc)
}

/// Reads a part of the file and checks its checksum.
fn read(
    storage: &dyn ReadAt,
    part: Part,
    offset: u64,
    len: usize,
    crc: u32,
) -> Result<Vec<u8>, ReadError> {
    let mut bytes = vec![0; len];
    healed(storage, offset..offset + len as u64, || {
        storage
            .read_exact_at(&mut bytes, offset)
            .map_err(|source| ReadError::io(part, offset, len as u64, source))?;
        Ok(check_crc(part, offset, crc, &bytes)?)
    })?;
    Ok(bytes)
}

/// Reads and checks some bytes, and does so once more if they are damaged and were only a copy of other storage.
pub(crate) fn healed<T>(
    storage: &dyn ReadAt,
    bytes: Range<u64>,
    mut read: impl FnMut() -> Result<T, ReadError>,
) -> Result<T, ReadError> {
    match read() {
        Err(ReadError::Corrupt(_) | ReadError::NotASnapshot { .. })
            if storage.refetch(bytes.clone()) =>
        {
            read()
        }
        result => result,
    }
}

fn check_crc(part: Part, offset: u64, expected: u32, bytes: &[u8]) -> Result<(), Corruption> {
    let found = crc32fast::hash(bytes);
    if found == expected {
        return Ok(());
    }
    Err(Corruption::new(part, offset, Problem::Checksum { expected, found }))
}
