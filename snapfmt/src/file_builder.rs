//! The parts of a file, written one behind the other: chunks, index, sections, and the header last.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::chunk::{self, Binding};
use crate::codec::Codec;
use crate::contents::WriteOptions;
use crate::entry::{ChunkExtent, PageEntry, PageIndex};
use crate::error::WriteError;
use crate::header::Header;
use crate::index::IndexBuilder;
use crate::layout::{
    CHUNK_ALIGN, H_CRC, HEADER_BYTES, INCOMPAT_BOUND, INCOMPAT_LAYERED, INCOMPAT_SEALED,
    LEAF_PAGES, MAX_CHUNK_OFFSET, MAX_METADATA_BYTES, MAX_METADATA_VALUES, PAGE_BYTES,
    SECTION_RECORD_BYTES, VERSION, u32_at,
};
use crate::memory_map::{self, MemoryRegion};
use crate::metadata::{self, CodecUse, Metadata, StorageUse};
use crate::output::Output;
use crate::pack::PackedLeaf;
use crate::parent::Parent;
use crate::seal::Seal;
use crate::section::{Section, SectionKind};
use crate::snapshot::StateBlob;

/// Appends to the output and records sections, index and counts.
pub(crate) struct FileBuilder<'a> {
    output: &'a mut Output,
    /// The id that the file gets.
    id: Uuid,
    /// The keys of the file, if it is sealed. They are of this file only: see the module `seal`.
    seal: Option<&'a Seal>,
    parent: Option<&'a Parent<'a>>,
    pub(crate) offset: u64,
    pub(crate) sections: Vec<Section>,
    index: IndexBuilder,
    storage: StorageUse,
    data_pages: u64,
    cleared_pages: u64,
    /// Entries of the pages at the front, until their leaves are written.
    hot: BTreeMap<PageIndex, PageEntry>,
    pub(crate) working_set: Option<Vec<u8>>,
}

impl<'a> FileBuilder<'a> {
    pub(crate) fn new(
        output: &'a mut Output,
        id: Uuid,
        seal: Option<&'a Seal>,
        parent: Option<&'a Parent<'a>>,
    ) -> Self {
        let absent = if parent.is_some() { PageEntry::Parent } else { PageEntry::Zero };
        Self {
            output,
            id,
            seal,
            parent,
            // The header is written last: until then the file does not open.
            offset: HEADER_BYTES as u64,
            sections: Vec::new(),
            index: IndexBuilder::new(absent),
            storage: StorageUse::default(),
            data_pages: 0,
            cleared_pages: 0,
            hot: BTreeMap::new(),
            working_set: None,
        }
    }

    /// What binds the file's chunks to it.
    pub(crate) fn binding(&self) -> Binding<'a> {
        Binding::new(chunk::seed(self.id), self.seal)
    }

    /// Places chunks of pages from anywhere at the end of the file and keeps their entries for their leaves.
    pub(crate) fn append_hot(&mut self, packed: &mut PackedLeaf) -> Result<(), WriteError> {
        let stored = self.place(packed)?;
        self.hot.extend(packed.pages.iter().copied().zip(stored));
        for (page, equal) in &packed.duplicates {
            // It was stored before, here or in an earlier task.
            let entry = self.hot.get(equal).copied().unwrap_or(PageEntry::Zero);
            self.hot.insert(*page, entry);
        }
        self.hot.extend(packed.cleared.iter().map(|page| (*page, PageEntry::Zero)));
        self.data_pages += (packed.pages.len() + packed.duplicates.len()) as u64;
        self.cleared_pages += packed.cleared.len() as u64;
        self.append(&packed.bytes)
    }

    /// Puts encoded chunks at the end of the file, and sets the entries of their slots.
    fn place(&mut self, packed: &mut PackedLeaf) -> Result<Vec<PageEntry>, WriteError> {
        let binding = self.binding();
        let mut rest = &mut packed.bytes[..];
        let mut offset = self.offset;
        let mut stored = Vec::with_capacity(packed.pages.len());
        for packed in &packed.chunks {
            let (chunk, after) = rest.split_at_mut(packed.len as usize);
            rest = after;
            chunk::set_place(chunk, self.place_at(offset)?, binding)?;
            let extent = ChunkExtent::new(offset, packed.len);
            stored.extend((0..packed.pages).map(|slot| PageEntry::Data { chunk: extent, slot }));
            self.storage.add(packed.codec, packed.pages.into(), packed.len);
            offset = extent.end();
        }
        Ok(stored)
    }

    /// Places the chunks of one leaf at the end of the file and adds the leaf to the index.
    pub(crate) fn append_leaf(&mut self, packed: &mut PackedLeaf) -> Result<(), WriteError> {
        let stored = self.place(packed)?;
        // A page comes after the one that it is equal to: that one is in this leaf or in the index.
        let duplicates = packed.duplicates.iter().map(|(page, equal)| {
            let entry = match packed.pages.binary_search(equal) {
                Ok(at) => stored[at],
                Err(_) => match self.hot.get(equal) {
                    Some(entry) => *entry,
                    None => self.index.entry(*equal),
                },
            };
            (*page, entry)
        });
        let mut entries: Vec<_> = duplicates.collect();
        entries.extend(packed.cleared.iter().map(|page| (*page, PageEntry::Zero)));
        entries.extend(packed.pages.iter().copied().zip(stored));
        let first = PageIndex(packed.number * LEAF_PAGES as u32);
        let last = PageIndex(first.0 + (LEAF_PAGES as u32 - 1));
        entries.extend(self.hot.range(first..=last).map(|(page, entry)| (*page, *entry)));
        self.data_pages += (packed.pages.len() + packed.duplicates.len()) as u64;
        self.cleared_pages += packed.cleared.len() as u64;
        self.index.push_leaf(packed.number, entries);
        self.append(&packed.bytes)
    }

    /// Gives places to raw chunks of consecutive pages, each with its first page and their number, and adds their leaf
    /// to the index. Nothing is written to these places.
    pub(crate) fn reserve_leaf(
        &mut self,
        number: u32,
        chunks: impl Iterator<Item = (u32, u16)>,
    ) -> Result<Vec<(u32, u16, ChunkExtent)>, WriteError> {
        let (mut reserved, binding) = (Vec::new(), self.binding());
        for (first_page, pages) in chunks {
            let len_bytes = chunk::raw_bytes(pages, binding);
            let extent = ChunkExtent::new(self.place_at(self.offset)?, len_bytes);
            self.offset = extent.end();
            self.storage.add(Codec::Raw, pages.into(), extent.len_bytes());
            self.data_pages += u64::from(pages);
            reserved.push((first_page, pages, extent));
        }
        let entries = reserved.iter().flat_map(|&(first_page, pages, chunk)| {
            (0..pages).map(move |slot| {
                let page = PageIndex(first_page + u32::from(slot));
                (page, PageEntry::Data { chunk, slot })
            })
        });
        self.index.push_leaf(number, entries);
        Ok(reserved)
    }

    /// The offset, if a chunk can be there.
    fn place_at(&self, offset: u64) -> Result<u64, WriteError> {
        match offset < MAX_CHUNK_OFFSET {
            true => Ok(offset),
            false => {
                let (what, max) = ("the offset of a chunk", MAX_CHUNK_OFFSET - 1);
                Err(WriteError::Limit { what, min: 0, max, found: offset })
            }
        }
    }

    /// How its chunks are stored, for the metadata.
    pub(crate) fn storage(&self) -> BTreeMap<String, CodecUse> {
        self.storage.by_name()
    }

    /// Writes everything after the chunks, and the header last.
    pub(crate) fn finish(
        mut self,
        regions: &[MemoryRegion],
        memory_bytes: u64,
        states: &[StateBlob],
        metadata: &Metadata,
        options: &WriteOptions,
    ) -> Result<Header, WriteError> {
        let json = encoded(metadata)?;
        let absent = IndexBuilder::new(PageEntry::Zero);
        let index = std::mem::replace(&mut self.index, absent);
        self.index(index)?;
        self.section(SectionKind::MEMORY_MAP, 0, 0, memory_map::encode(regions))?;
        for state in states {
            self.section(SectionKind::STATE, state.tag, state.version, &state.bytes[..])?;
        }
        self.section(SectionKind::METADATA, 0, 0, json)?;
        if let Some(set) = self.working_set.take() {
            self.section(SectionKind::WORKING_SET, 0, 0, set)?;
        }
        if let Some(parent) = self.parent {
            self.section(SectionKind::PARENT_HINT, 0, 0, parent.hint.encode())?;
        }

        let stored = self.storage.total();
        let header = Header {
            version: VERSION,
            incompat: INCOMPAT_BOUND
                | if self.parent.is_some() { INCOMPAT_LAYERED } else { 0 }
                | if self.seal.is_some() { INCOMPAT_SEALED } else { 0 },
            ro_compat: 0,
            compat: 0,
            id: Uuid::nil(),
            parent_id: self.parent.map(|parent| parent.hint.id),
            chunk_pages: options.chunk_pages as u32,
            memory_bytes,
            file_bytes: 0,
            data_pages: self.data_pages,
            stored_pages: stored.pages,
            parent_pages: match self.parent {
                Some(_) => memory_bytes / PAGE_BYTES as u64 - self.data_pages - self.cleared_pages,
                None => 0,
            },
            chunks: stored.chunks,
            created_unix_ms: 0,
            chunks_id: Some(self.id),
            table_offset: 0,
            table_records: 0,
            table_crc: 0,
            crc: 0,
            hash: None,
        };
        self.close(header)
    }

    /// Writes the leaves and the root of the index.
    pub(crate) fn index(&mut self, mut index: IndexBuilder) -> Result<(), WriteError> {
        self.align(PAGE_BYTES)?;
        self.begin(SectionKind::INDEX_LEAVES);
        let tags = self.seal.map(|seal| index.seal(seal, self.offset)).transpose()?;
        self.append(index.leaves())?;
        self.end(tags.as_ref().map_or(0, |_| crc32fast::hash(index.leaves())));
        self.section(SectionKind::INDEX_ROOT, 0, 0, index.root(&tags.unwrap_or_default()))
    }

    /// Writes the keys of a sealed file, the section table, and the header with the file's own id.
    pub(crate) fn close(mut self, header: Header) -> Result<Header, WriteError> {
        if let Some(seal) = self.seal {
            self.plain_section(SectionKind::KEYS, 0, 0, &seal.keys())?;
        }
        self.align(CHUNK_ALIGN)?;
        let mut table = vec![0; self.sections.len() * SECTION_RECORD_BYTES];
        for (record, section) in table.chunks_exact_mut(SECTION_RECORD_BYTES).zip(&self.sections) {
            section.encode(record);
        }
        let table_offset = self.offset;
        self.append(&table)?;
        let mut header = Header {
            id: self.id,
            created_unix_ms: unix_ms(),
            file_bytes: self.offset,
            table_offset,
            table_records: self.sections.len() as u32,
            table_crc: crc32fast::hash(&table),
            ..header
        };
        let mut bytes = header.encode();
        if let Some(seal) = self.seal {
            seal.sign(&mut bytes, &table);
            header.hash = Some(*blake3::hash(&bytes[..]).as_bytes());
        }
        header.crc = u32_at(&bytes[..], H_CRC);
        self.output.write_at(&bytes[..], 0)?;
        Ok(header)
    }

    pub(crate) fn begin(&mut self, kind: SectionKind) {
        let offset = self.offset;
        self.sections.push(Section { kind, tag: 0, version: 0, crc: 0, offset, len: 0 });
    }

    pub(crate) fn end(&mut self, crc: u32) {
        if let Some(section) = self.sections.last_mut() {
            section.len = self.offset - section.offset;
            section.crc = crc;
        }
    }

    /// Writes a section that a sealed file has encrypted.
    pub(crate) fn section<'b>(
        &mut self,
        kind: SectionKind,
        tag: u32,
        version: u32,
        content: impl Into<Cow<'b, [u8]>>,
    ) -> Result<(), WriteError> {
        let content = content.into();
        let Some(seal) = self.seal else { return self.plain_section(kind, tag, version, &content) };
        self.align(CHUNK_ALIGN)?;
        let mut bytes = content.into_owned();
        let section = Section { kind, tag, version, crc: 0, offset: self.offset, len: 0 };
        seal.seal_section(&section, &mut bytes)?;
        self.plain_section(kind, tag, version, &bytes)
    }

    fn plain_section(
        &mut self,
        kind: SectionKind,
        tag: u32,
        version: u32,
        bytes: &[u8],
    ) -> Result<(), WriteError> {
        self.align(CHUNK_ALIGN)?;
        let (offset, len) = (self.offset, bytes.len() as u64);
        let crc = crc32fast::hash(bytes);
        self.sections.push(Section { kind, tag, version, crc, offset, len });
        self.append(bytes)
    }

    pub(crate) fn align(&mut self, unit: usize) -> Result<(), WriteError> {
        let padding = self.offset.next_multiple_of(unit as u64) - self.offset;
        self.append(&[0; PAGE_BYTES][..padding as usize])
    }

    /// Lets the kernel append bytes of another file: see [`Output::copy_from`].
    pub(crate) fn copy_from(&mut self, from: &File, bytes: Range<u64>) -> u64 {
        let copied = self.output.copy_from(from, bytes, self.offset);
        self.offset += copied;
        copied
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.output.write_at(bytes, self.offset)?;
        self.offset += bytes.len() as u64;
        Ok(())
    }
}

/// The metadata as JSON, if it is within the format's limits.
pub(crate) fn encoded(metadata: &Metadata) -> Result<Vec<u8>, WriteError> {
    let json = serde_json::to_vec(metadata).map_err(WriteError::Metadata)?;
    for (what, max, found) in [
        ("the length of the metadata", MAX_METADATA_BYTES, json.len() as u64),
        ("the number of values in the metadata", MAX_METADATA_VALUES, metadata::values(&json)),
    ] {
        if found > max {
            return Err(WriteError::Limit { what, min: 0, max, found });
        }
    }
    Ok(json)
}

fn unix_ms() -> u64 {
    // A clock before 1970 is no error here.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
