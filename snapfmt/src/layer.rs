//! One file of a snapshot, opened and checked as far as opening does.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::chunk::{Binding, ChunkBuffer};
use crate::entry::ChunkExtent;
use crate::error::{Corruption, Part, Problem, ReadError};
use crate::guard::{Guard, Stamp};
use crate::header::Header;
use crate::index::Index;
use crate::layout::{
    HEADER_BYTES, INCOMPAT_LAYERED, LEAF_BYTES, LEAF_SPAN_BYTES, MAX_METADATA_BYTES,
    MAX_PARENT_HINT_BYTES, MAX_SEALED_PARENT_HINT_BYTES, MAX_STATE_BYTES, MAX_WORKING_SET_BYTES,
    REGION_RECORD_BYTES, TAG_BYTES, max_regions,
};
use crate::memory_map::{self, MemoryRegion};
use crate::metadata::{self, Metadata};
use crate::parent::ParentHint;
use crate::read_at::ReadAt;
use crate::seal::{KeyProvider, Parts, Seal};
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
    chunk_seed: u32,
    /// The keys of a sealed file.
    pub(crate) seal: Option<Seal>,
    /// Detects changes, if the storage has a stamp.
    guard: Option<Guard>,
}

impl<R: ReadAt> Layer<R> {
    /// The storage, for reading chunks in order.
    pub(crate) fn in_order(&self) -> &dyn ReadAt {
        let again = self.in_order.get_or_init(|| self.storage.in_order());
        again.as_deref().unwrap_or(&self.storage)
    }

    /// Reads and checks header, section table, memory map and the root of the index. With `keys` only sealed files are
    /// opened, without them only others.
    pub(crate) fn open(storage: R, keys: Option<&dyn KeyProvider>) -> Result<Self, ReadError> {
        let stamp = storage.stamp().map_err(of_header)?;
        let parts = Self::opened(&storage, stamp, |file_bytes| {
            let parts = Parts::read(&storage, file_bytes)?;
            let seal = parts.unlock(&storage, keys)?;
            let (index, regions) = index_and_regions(&storage, &parts, seal.as_ref())?;
            Ok((parts, seal, index, regions))
        });
        let (Parts { header, sections, .. }, seal, index, regions) = parts?;
        Ok(Self {
            storage,
            in_order: OnceLock::new(),
            path: None,
            chunk_seed: header.chunk_seed(),
            seal,
            guard: stamp.map(|opened| Guard::new(opened, &header)),
            header,
            sections,
            index,
            regions,
        })
    }

    /// The information about its parent in a file that is opened without its parents. If the file is not a layer, this
    /// needs no key.
    pub(crate) fn parent_hint_of(
        storage: R,
        keys: Option<&dyn KeyProvider>,
    ) -> Result<Option<ParentHint>, ReadError> {
        let stamp = storage.stamp().map_err(of_header)?;
        let parts = Self::opened(&storage, stamp, |len| Parts::read(&storage, len))?;
        match parts.header.incompat & INCOMPAT_LAYERED {
            0 => Ok(None),
            _ => Self::open(storage, keys)?.parent_hint(),
        }
    }

    /// Reads some parts of a file. `stamp` is from before. If the file was written to meanwhile, an error is
    /// [`ReadError::Changed`].
    fn opened<T>(
        storage: &R,
        stamp: Option<Stamp>,
        read: impl FnOnce(u64) -> Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        let file_bytes = match stamp {
            Some(stamp) => stamp.len_bytes,
            None => storage.len_bytes().map_err(of_header)?,
        };
        read(file_bytes).map_err(|error| match (stamp, storage.stamp()) {
            // It was written to at that moment.
            (Some(opened), Ok(Some(found))) if opened.before_a_write(&found) => {
                ReadError::Changed { opened, found, source: Some(Box::new(error)) }
            }
            _ => error,
        })
    }

    /// What binds the chunks to this file.
    pub(crate) fn binding(&self) -> Binding<'_> {
        Binding::new(self.chunk_seed, self.seal.as_ref())
    }

    /// A leaf of the index; `None` if it does not exist.
    pub(crate) fn leaf(&self, number: u32) -> Result<Option<Box<[u8; LEAF_BYTES]>>, ReadError> {
        self.index.leaf(&self.storage, self.seal.as_ref(), number)
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
        match buffer.decode(extent, self.binding()) {
            Err(ReadError::Corrupt(_)) if self.storage.refetch(extent.offset()..extent.end()) => {
                let stored = buffer.refill(extent.len_bytes() as usize);
                self.read_chunks(&self.storage, stored, extent.offset())?;
                buffer.decode(extent, self.binding())
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
        let bytes = self.section(&section, MAX_METADATA_BYTES)?;
        Ok(metadata::parse(&bytes, section.offset)?)
    }

    pub(crate) fn state(&self, tag: u32) -> Result<Option<StateBlob>, ReadError> {
        let of_tag = |s: &&Section| s.kind == SectionKind::STATE && s.tag == tag;
        let Some(section) = self.sections.iter().find(of_tag) else { return Ok(None) };
        let bytes = self.section(section, MAX_STATE_BYTES)?;
        Ok(Some(StateBlob { tag, version: section.version, bytes }))
    }

    pub(crate) fn working_set(&self) -> Result<Option<WorkingSet>, ReadError> {
        let of_kind = |section: &&Section| section.kind == SectionKind::WORKING_SET;
        if !self.sections.iter().any(|section| of_kind(&section)) {
            return Ok(None);
        }
        let section =
            section::only(&self.sections, SectionKind::WORKING_SET, self.header.table_offset)?;
        let bytes = self.section(&section, MAX_WORKING_SET_BYTES)?;
        Ok(WorkingSet::parse(&bytes, section.offset, self.header.pages())?)
    }

    /// The file's information about its parent, if it is a layer.
    pub(crate) fn parent_hint(&self) -> Result<Option<ParentHint>, ReadError> {
        if self.header.incompat & INCOMPAT_LAYERED == 0 {
            return Ok(None);
        }
        let section =
            section::only(&self.sections, SectionKind::PARENT_HINT, self.header.table_offset)?;
        let most = match self.seal {
            Some(_) => MAX_SEALED_PARENT_HINT_BYTES,
            None => MAX_PARENT_HINT_BYTES,
        };
        let bytes = self.section(&section, most)?;
        Ok(Some(ParentHint::parse(&self.header, &bytes, section.offset)?))
    }

    /// The content of a section of a known kind, of at most `most` bytes.
    pub(crate) fn section(&self, section: &Section, most: u64) -> Result<Vec<u8>, ReadError> {
        read_section(&self.storage, self.seal.as_ref(), section, 1, most)
    }
}

fn of_header(source: std::io::Error) -> ReadError {
    ReadError::io(Part::Header, 0, HEADER_BYTES as u64, source)
}

/// Reads the memory map and the root of the index.
fn index_and_regions(
    storage: &dyn ReadAt,
    parts: &Parts,
    seal: Option<&Seal>,
) -> Result<(Index, Vec<MemoryRegion>), ReadError> {
    let (header, sections) = (&parts.header, &parts.sections);
    let only = |kind| section::only(sections, kind, header.table_offset);
    let map = only(SectionKind::MEMORY_MAP)?;
    let most = max_regions(header.memory_bytes) * REGION_RECORD_BYTES as u64;
    let map_bytes = read_section(storage, seal, &map, REGION_RECORD_BYTES, most)?;
    let regions = memory_map::parse(&map_bytes, map.offset, header.memory_bytes)?;
    let root = only(SectionKind::INDEX_ROOT)?;
    let record_bytes = Index::record_bytes(header.is_sealed());
    let most = header.memory_bytes.div_ceil(LEAF_SPAN_BYTES) * record_bytes as u64;
    let root_bytes = read_section(storage, seal, &root, record_bytes, most)?;
    let (leaves, chunks) = (only(SectionKind::INDEX_LEAVES)?, only(SectionKind::CHUNKS)?);
    Ok((Index::parse(&root_bytes, &root, &leaves, &chunks, header)?, regions))
}

/// Reads a section into memory after checking that the length of its content is a multiple of `unit` and at most `most`;
/// then checks its checksum. With a seal, it decrypts the content.
pub(crate) fn read_section(
    storage: &dyn ReadAt,
    seal: Option<&Seal>,
    section: &Section,
    unit: usize,
    most: u64,
) -> Result<Vec<u8>, ReadError> {
    let part = Part::Section(section.kind);
    let corrupt = |problem| Corruption::new(part, section.offset, problem);
    let tag_bytes = if seal.is_some() { TAG_BYTES as u64 } else { 0 };
    let (min, max, found) = (tag_bytes, most + tag_bytes, section.len);
    if !(min..=max).contains(&found) {
        return Err(corrupt(Problem::Range { field: "section.len", min, max, found }).into());
    }
    let rest = (section.len - tag_bytes) % unit as u64;
    if rest != 0 {
        let field = "section.len modulo record";
        return Err(corrupt(Problem::Field { field, expected: 0, found: rest }).into());
    }
    let mut bytes = read(storage, part, section.offset, section.len as usize, section.crc)?;
    if let Some(seal) = seal {
        seal.open_section(section, &mut bytes).map_err(corrupt)?;
    }
    Ok(bytes)
}

/// Reads a part of the file and checks its checksum.
pub(crate) fn read(
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
