//! Writing a guest's memory and state to one file. The file appears complete or not at all.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::chunk::{self, Binding};
use crate::codec::{Codec, Compressor};
use crate::dedupe::Dedupe;
use crate::entry::{ChunkExtent, PageEntry, PageIndex};
use crate::error::{ChainError, WriteError};
use crate::header::Header;
use crate::hot::{self, HotPages};
use crate::index::IndexBuilder;
use crate::layout::{
    CHUNK_ALIGN, H_CRC, HEADER_BYTES, INCOMPAT_BOUND, INCOMPAT_LAYERED, INCOMPAT_SEALED,
    LEAF_PAGES, MAX_CHUNK_OFFSET, MAX_CHUNK_PAGES, MAX_METADATA_BYTES, MAX_METADATA_VALUES,
    MAX_PARENT_HINT_BYTES, MAX_SEALED_PARENT_HINT_BYTES, MAX_SECTIONS, MAX_STATE_BYTES, PAGE_BYTES,
    SECTION_RECORD_BYTES, VERSION, u32_at,
};
use crate::memory_map::{self, MemoryRegion};
use crate::metadata::{self, CodecUse, Metadata, StorageUse};
use crate::ordered;
use crate::output::{Existing, Output};
use crate::pack::{LeafTasks, PackedLeaf, Packer};
use crate::parent::Parent;
use crate::read_at::ReadAt;
use crate::seal::{KeyProvider, Seal};
use crate::section::{Section, SectionKind};
use crate::snapshot::StateBlob;

/// The content of a snapshot.
#[non_exhaustive]
pub struct Contents<'a> {
    /// The guest's memory regions, in source order.
    pub regions: &'a [MemoryRegion],
    /// The guest's memory, read by source offset. It must not change while it is written, unless it is `read_once`.
    pub memory: &'a dyn ReadAt,
    /// The parts of memory that may not be zero, as source offsets in bytes, in any order; no other memory is read. For
    /// a memfd: the ranges that SEEK_DATA finds.
    pub data: &'a [Range<u64>],
    /// States of the virtual machine, opaque. Each has another tag.
    pub states: &'a [StateBlob],
    /// The metadata of the file. The writer fills in `storage`.
    pub metadata: Metadata,
    /// See [`Contents::read_once`].
    pub read_once: Option<CheckRead<'a>>,
}

/// Called when all memory was read, before the file appears: whether the bytes that were read are those to store.
pub type CheckRead<'a> = &'a (dyn Fn() -> io::Result<()> + Sync);

impl<'a> Contents<'a> {
    /// Memory, without states and metadata.
    #[must_use]
    pub fn new(
        regions: &'a [MemoryRegion],
        memory: &'a dyn ReadAt,
        data: &'a [Range<u64>],
    ) -> Self {
        let metadata = Metadata::default();
        Self { regions, memory, data, states: &[], metadata, read_once: None }
    }

    /// Sets [`Contents::states`].
    #[must_use]
    pub fn states(mut self, states: &'a [StateBlob]) -> Self {
        self.states = states;
        self
    }

    /// Sets [`Contents::metadata`].
    #[must_use]
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = metadata;
        self
    }

    /// The memory may change after it was read, as that of a guest that runs. Then each byte of it is read at most
    /// once, except those of [`HotPages`], and `check` is called after the last read. Its error leaves no file.
    #[must_use]
    pub fn read_once(mut self, check: CheckRead<'a>) -> Self {
        self.read_once = Some(check);
        self
    }
}

/// How a snapshot is written.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WriteOptions {
    /// Codec for chunks. A chunk that the codec would hardly shrink is stored raw.
    pub codec: Codec,
    /// Level of zstd, from -7 (fast) to 22 (small).
    pub level: i32,
    /// Most pages in a chunk, 1 to 512: small chunks are read fast, large chunks compress better.
    pub chunk_pages: usize,
    /// Threads that compress; at most four for each CPU are used. The bytes of the file do not depend on this number,
    /// except its id and the checksums that begin with it.
    pub threads: NonZeroUsize,
    /// Whether pages with equal bytes are stored once.
    pub dedupe: bool,
    /// What to do with a file that is already there.
    pub existing: Existing,
    /// Who wraps the file's key: then the file is sealed, that is encrypted and authenticated. A layer must be sealed
    /// exactly if its parent is.
    pub seal: Option<Arc<dyn KeyProvider>>,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            codec: if cfg!(feature = "zstd") { Codec::Zstd } else { Codec::Lz4 },
            level: 1,
            chunk_pages: 8,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            dedupe: true,
            existing: Existing::Keep,
            seal: None,
        }
    }
}

impl WriteOptions {
    /// Sets [`WriteOptions::seal`].
    #[must_use]
    pub fn seal(mut self, seal: impl Into<Option<Arc<dyn KeyProvider>>>) -> Self {
        self.seal = seal.into();
        self
    }

    /// Sets [`WriteOptions::codec`].
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// Sets [`WriteOptions::level`].
    #[must_use]
    pub fn level(mut self, level: i32) -> Self {
        self.level = level;
        self
    }

    /// Sets [`WriteOptions::chunk_pages`].
    #[must_use]
    pub fn chunk_pages(mut self, chunk_pages: usize) -> Self {
        self.chunk_pages = chunk_pages;
        self
    }

    /// Sets [`WriteOptions::threads`].
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = threads;
        self
    }

    /// Sets [`WriteOptions::dedupe`].
    #[must_use]
    pub fn dedupe(mut self, dedupe: bool) -> Self {
        self.dedupe = dedupe;
        self
    }

    /// Sets [`WriteOptions::existing`].
    #[must_use]
    pub fn existing(mut self, existing: Existing) -> Self {
        self.existing = existing;
        self
    }
}

/// The progress of a long operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes done.
    pub done_bytes: u64,
    /// All bytes.
    pub total_bytes: u64,
}

impl Progress {
    /// Bytes done, of all bytes.
    #[must_use]
    pub fn new(done_bytes: u64, total_bytes: u64) -> Self {
        Self { done_bytes, total_bytes }
    }
}

/// Called repeatedly during a long operation, from any of its threads. `Break` cancels the operation.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) -> ControlFlow<()> + Sync);

/// Writes a snapshot to `path`. Returns its header and its metadata as written.
///
/// Memory in use: about 3 x 4 MiB a thread, and 4 KiB for every 2 MiB of memory that is not all
/// zero. To find equal pages: 20 MiB at most, or 60 MiB of memory that is read once.
///
/// # Errors
/// [`WriteError`]; then `path` is unchanged.
pub fn write_snapshot(
    path: impl AsRef<Path>,
    contents: Contents<'_>,
    options: &WriteOptions,
    progress: OnProgress<'_>,
) -> Result<(Header, Metadata), WriteError> {
    write(path.as_ref(), contents, None, None, options, progress)
}

/// Writes a layer to `path`: only the pages that differ from `parent`. Returns its header and
/// its metadata as written. Only the ranges of `contents.data` are read and compared; all other
/// pages are as in the parent.
///
/// # Errors
/// As [`write_snapshot`]; also when the parent cannot be read or has other memory regions.
pub fn write_layer(
    path: impl AsRef<Path>,
    contents: Contents<'_>,
    parent: &Parent<'_>,
    options: &WriteOptions,
    progress: OnProgress<'_>,
) -> Result<(Header, Metadata), WriteError> {
    check_regions(&contents, Some(parent))?;
    write(path.as_ref(), contents, Some(parent), None, options, progress)
}

/// Writes a snapshot, or with a parent a layer, with a working set. It may put the pages of the set at the front: see
/// [`HotPages`].
///
/// # Errors
/// As [`write_snapshot`] and [`write_layer`]; also when the set has pages beyond memory.
pub fn write_with_set(
    path: impl AsRef<Path>,
    contents: Contents<'_>,
    parent: Option<&Parent<'_>>,
    hot: &HotPages<'_>,
    options: &WriteOptions,
    progress: OnProgress<'_>,
) -> Result<(Header, Metadata), WriteError> {
    check_regions(&contents, parent)?;
    write(path.as_ref(), contents, parent, Some(hot), options, progress)
}

fn write(
    path: &Path,
    contents: Contents<'_>,
    parent: Option<&Parent<'_>>,
    hot: Option<&HotPages<'_>>,
    options: &WriteOptions,
    progress: OnProgress<'_>,
) -> Result<(Header, Metadata), WriteError> {
    let memory_bytes = memory_map::validate(contents.regions)?;
    check_limits(&contents, parent, options)?;
    let id = Uuid::new_v4();
    let seal = options.seal.as_deref().map(|keys| Seal::create(keys, id)).transpose()?;
    let mut output = Output::create(path, options.existing)?;
    let mut file = FileBuilder::new(&mut output, id, seal.as_ref(), parent);
    let binding = file.binding();

    let tasks = LeafTasks::new(contents.data, memory_bytes);
    let dedupe = options.dedupe.then(|| match contents.read_once {
        None => Dedupe::comparing(),
        Some(_) => Dedupe::read_once(),
    });
    let packer = |codec| {
        let compressor = Compressor::new(codec, options.level)?;
        let (dedupe, parent) = (dedupe.as_ref(), parent.map(|parent| parent.pages));
        let chunk_pages = options.chunk_pages;
        Ok(Packer::new(contents.memory, compressor, chunk_pages, binding, dedupe, parent))
    };
    let front = hot::front(hot, &tasks, memory_bytes)?;
    let hot_bytes = front.pages.len() as u64 * PAGE_BYTES as u64;
    let total_bytes = tasks.total_bytes() + hot_bytes;
    let mut done_bytes = 0;
    let mut report = |bytes| {
        done_bytes += bytes;
        match progress(Progress { done_bytes, total_bytes }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(WriteError::Cancelled),
        }
    };
    file.begin(SectionKind::CHUNKS);
    let hot_tasks = front.tasks(options.chunk_pages);
    ordered::run(
        hot_tasks.len(),
        options.threads,
        || packer(front.codec),
        |packer, task, packed: &mut PackedLeaf| packer.pack_pages(task, &hot_tasks[task], packed),
        |packed| {
            file.append_hot(packed)?;
            report((packed.pages.len() * PAGE_BYTES) as u64)
        },
    )?;
    let skip: HashSet<_> = front.pages.iter().copied().collect();
    ordered::run(
        tasks.len(),
        options.threads,
        || packer(options.codec).map(|packer| packer.skipping(&skip)),
        |packer, task, (packed, read_bytes): &mut (PackedLeaf, u64)| {
            *read_bytes = packer.pack(hot_tasks.len() + task, &tasks, task, packed)?;
            Ok(())
        },
        |(packed, read_bytes)| {
            file.append_leaf(packed)?;
            report(*read_bytes)
        },
    )?;
    file.end(0);
    if let Some(check) = contents.read_once {
        check().map_err(|source| WriteError::Inconsistent { source })?;
    }
    file.working_set = hot.map(|hot| hot.set.encode());

    let mut metadata = contents.metadata;
    metadata.storage = file.storage();
    let header =
        file.finish(contents.regions, memory_bytes, contents.states, &metadata, options)?;
    output.publish()?;
    Ok((header, metadata))
}

/// A layer has the memory map of its parent.
pub(crate) fn check_regions(
    contents: &Contents<'_>,
    parent: Option<&Parent<'_>>,
) -> Result<(), WriteError> {
    match parent {
        Some(parent) if contents.regions != parent.regions => {
            Err(WriteError::Parent(ChainError::MemoryMap { id: parent.hint.id }.into()))
        }
        _ => Ok(()),
    }
}

pub(crate) fn check_limits(
    contents: &Contents<'_>,
    parent: Option<&Parent<'_>>,
    options: &WriteOptions,
) -> Result<(), WriteError> {
    let limit = |what, min, max, found: usize| match (min..=max).contains(&(found as u64)) {
        true => Ok(()),
        false => Err(WriteError::Limit { what, min, max, found: found as u64 }),
    };
    limit("pages per chunk", 1, MAX_CHUNK_PAGES as u64, options.chunk_pages)?;
    let others = 7 + u64::from(options.seal.is_some());
    limit("the number of states", 0, MAX_SECTIONS as u64 - others, contents.states.len())?;
    let hint_bytes = parent.map_or(0, |parent| parent.hint.encode().len());
    limit(
        "the length of the parent's path",
        0,
        most_hint_bytes(options.seal.is_some()),
        hint_bytes,
    )?;
    let parent_is_sealed = parent.is_some_and(|parent| parent.hint.header_hash.is_some());
    if parent.is_some() && parent_is_sealed != options.seal.is_some() {
        return Err(WriteError::ParentSeal { parent_is_sealed });
    }
    for state in contents.states {
        limit("the length of a state", 0, MAX_STATE_BYTES, state.bytes.len())?;
    }
    Ok(())
}

/// Most bytes of a parent hint.
pub(crate) fn most_hint_bytes(sealed: bool) -> u64 {
    if sealed { MAX_SEALED_PARENT_HINT_BYTES } else { MAX_PARENT_HINT_BYTES }
}

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
    working_set: Option<Vec<u8>>,
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
    fn append_hot(&mut self, packed: &mut PackedLeaf) -> Result<(), WriteError> {
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
    fn append_leaf(&mut self, packed: &mut PackedLeaf) -> Result<(), WriteError> {
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
