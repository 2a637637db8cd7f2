//! Reading: open a snapshot, look pages up, read chunks, all from any number of threads.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::chunk::{Chunk, ChunkBuffer, ChunkHeader};
use crate::entry::{ChunkExtent, PageEntry, PageIndex};
use crate::error::{ChainError, Corruption, Part, Problem, ReadError};
use crate::header::Header;
use crate::layer::Layer;
use crate::layout::{CHUNK_HEADER_BYTES, LEAF_SPAN_BYTES, PAGE_BYTES};
use crate::memory_map::MemoryRegion;
use crate::metadata::Metadata;
use crate::page_table::PageTable;
use crate::parent::{ParentHint, Parents};
use crate::read_at::ReadAt;
use crate::seal::KeyProvider;
use crate::section::{Section, SectionKind};
use crate::storage::Storage;
use crate::working_set::WorkingSet;

/// How the storage knows which chunks [`Snapshot::fetch_chunk_ahead`] will read next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOrder {
    /// The caller announces them with [`Snapshot::expect_chunks`]. Nothing else is read.
    Announced,
    /// They are read in the order of the file, up to its end. The storage reads ahead on its own: see
    /// [`ReadAt::in_order`]. The kernel reads a file into large folios then, which takes less CPU time than single pages.
    Sequential,
}

/// Most bytes that one [`Snapshot::fetch_chunk_ahead`] reads, unless a single chunk has more.
pub const READ_AHEAD_BYTES: u64 = 2 << 20;

/// An opened snapshot: one file, or a file and all the parents that it builds on.
///
/// Opening reads and checks the header, the section table, the memory map and the root of the
/// page index: its cost does not depend on the size of the guest's memory. Leaves, chunks, state
/// and metadata are read and checked when they are needed.
///
/// Of a chain of layers, header, sections, state and metadata are those of the top one; pages are
/// found in whichever layer has them, with one look-up.
///
/// All methods take `&self`, and several threads may call them concurrently.
pub struct Snapshot<R = Storage> {
    /// The file itself, its parent, and so on.
    pub(crate) layers: Vec<Layer<R>>,
    pub(crate) table: PageTable,
    keys: Option<Arc<dyn KeyProvider>>,
    /// Distinguishes this snapshot's chunks from another's in a buffer that was used for both.
    serial: u64,
}

/// One state section: bytes that only their producer understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateBlob {
    /// The producer's number for this kind of state.
    pub tag: u32,
    /// Version of the producer's encoding.
    pub version: u32,
    /// The state.
    pub bytes: Vec<u8>,
}

impl Snapshot {
    /// Opens a snapshot file. For a layer it also opens the parents, at the paths that the layer stores.
    ///
    /// # Errors
    /// As [`Snapshot::open_with`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ReadError> {
        Self::open_with(path, &Parents::default())
    }

    /// Opens a snapshot file, and the parents of a layer, which are searched in more places.
    ///
    /// # Errors
    /// [`ReadError::Io`] when a file cannot be opened or read, [`ReadError::Chain`] when a parent is missing or does
    /// not match, [`ReadError::Key`] and [`ReadError::NotSealed`] with [`Parents::keys`], otherwise as
    /// [`Snapshot::new`].
    pub fn open_with(path: impl AsRef<Path>, parents: &Parents) -> Result<Self, ReadError> {
        Self::of_layers(parents.open_chain(path.as_ref())?, parents.keys.clone())
    }
}

impl<R: ReadAt> Snapshot<R> {
    /// Opens a snapshot in any storage.
    ///
    /// # Memory
    /// For any claims in a file, an open snapshot takes at most 4 bytes for each 2 MiB of the guest's memory between
    /// the first and the last page that is stored (32 MiB for the maximum of 16 TiB; zeroed, so only touched where
    /// there are pages) and 64 bytes (of a sealed file 80) for each 2 MiB that its index lists, and 48 bytes for each region of its memory
    /// map, of which there is at most one for each 2 MiB of memory, or 1024. A look-up keeps the leaf it has used: 4
    /// KiB, in a chain 5 KiB. Passes over all pages keep no leaves. A [`ChunkBuffer`] grows to at most 9 MiB,
    /// [`Snapshot::state`] takes 64 MiB at most, and [`Snapshot::metadata`] 16 MiB for the worst JSON.
    ///
    /// # Errors
    /// [`ReadError`], with section, offset, expected and found, when the storage fails, the bytes
    /// are no snapshot, or of a version or with a feature that this build does not know, or
    /// damaged in one of the parts that are read here; [`ReadError::KeyNeeded`] if it is sealed.
    pub fn new(storage: R) -> Result<Self, ReadError> {
        Self::of_layers(vec![Layer::open(storage, None)?], None)
    }

    /// Opens a chain of layers in any storage: the top one first, each followed by its parent,
    /// a complete snapshot last.
    ///
    /// # Errors
    /// As [`Snapshot::new`], and [`ReadError::Chain`] when a storage is not the parent of the one
    /// before it, or when the last one is a layer too.
    pub fn chain(storages: impl IntoIterator<Item = R>) -> Result<Self, ReadError> {
        let open = |storage| Layer::open(storage, None);
        Self::of_layers(storages.into_iter().map(open).collect::<Result<_, _>>()?, None)
    }

    /// As [`Snapshot::chain`], of storages with names: see [`Snapshot::paths`].
    ///
    /// # Errors
    /// As [`Snapshot::chain`].
    pub fn named_chain(
        storages: impl IntoIterator<Item = (R, PathBuf)>,
    ) -> Result<Self, ReadError> {
        Self::named_chain_with(storages, None)
    }

    /// As [`Snapshot::named_chain`], of sealed storages if there are `keys`: see [`Parents::keys`].
    ///
    /// # Errors
    /// As [`Snapshot::chain`], [`ReadError::Key`], [`ReadError::KeyNeeded`] and [`ReadError::NotSealed`].
    pub fn named_chain_with(
        storages: impl IntoIterator<Item = (R, PathBuf)>,
        keys: Option<Arc<dyn KeyProvider>>,
    ) -> Result<Self, ReadError> {
        let open = |(number, (storage, path))| match Layer::open(storage, keys.as_deref()) {
            Ok(mut layer) => {
                layer.path = Some(path);
                Ok(layer)
            }
            Err(error) if number == 0 => Err(error),
            Err(error) => Err(ChainError::Parent { path, source: Box::new(error) }.into()),
        };
        let layers = storages.into_iter().enumerate().map(open).collect::<Result<_, _>>()?;
        Self::of_layers(layers, keys)
    }

    fn of_layers(
        layers: Vec<Layer<R>>,
        keys: Option<Arc<dyn KeyProvider>>,
    ) -> Result<Self, ReadError> {
        for (number, layer) in layers.iter().enumerate() {
            let hint = layer.parent_hint().map_err(|error| layer.named(number, error))?;
            match (hint, layers.get(number + 1)) {
                (None, None) => {}
                // More storages than layers: the last layer is complete without them.
                (None, Some(extra)) => {
                    let (expected, found) = (layer.header.id, extra.header.id);
                    return Err(ChainError::WrongParent { expected, found }.into());
                }
                (Some(hint), None) => return Err(ChainError::ParentNeeded { id: hint.id }.into()),
                (Some(hint), Some(parent)) => {
                    hint.check(&parent.header)?;
                    if parent.regions != layer.regions {
                        return Err(ChainError::MemoryMap { id: hint.id }.into());
                    }
                }
            }
        }
        if layers.is_empty() {
            return Err(ReadError::NoLayer);
        }
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let table = PageTable::new(&layers);
        Ok(Self { layers, table, keys, serial: SERIAL.fetch_add(1, Ordering::Relaxed) })
    }

    fn top(&self) -> &Layer<R> {
        // `of_layers` refuses to make a snapshot without a layer.
        &self.layers[0]
    }

    /// The file's header.
    pub fn header(&self) -> &Header {
        &self.top().header
    }

    /// Who has the keys that the snapshot was opened with, if it is sealed.
    pub fn keys(&self) -> Option<&Arc<dyn KeyProvider>> {
        self.keys.as_ref()
    }

    /// The headers of the file, its parent, and so on.
    pub fn headers(&self) -> impl ExactSizeIterator<Item = &Header> {
        self.layers.iter().map(|layer| &layer.header)
    }

    /// The file's information about its parent, if it is a layer.
    ///
    /// # Errors
    /// [`ReadError`] when the section is damaged.
    pub fn parent_hint(&self) -> Result<Option<ParentHint>, ReadError> {
        self.top().parent_hint().map_err(|error| self.top().named(0, error))
    }

    /// The information about its parent in a file that is opened without its parents. `None`: it is not a layer.
    ///
    /// # Errors
    /// [`ReadError`] when the file is not a snapshot, or the section is damaged; [`ReadError::KeyNeeded`] for a sealed
    /// layer without `keys`.
    pub fn parent_hint_of(
        storage: R,
        keys: Option<&dyn KeyProvider>,
    ) -> Result<Option<ParentHint>, ReadError> {
        Layer::parent_hint_of(storage, keys)
    }

    /// The file's sections, in the order in which they are in the file.
    pub fn sections(&self) -> &[Section] {
        &self.top().sections
    }

    /// The guest's memory regions, in source order.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.top().regions
    }

    /// The storage that the file itself is read from.
    pub fn storage(&self) -> &R {
        &self.top().storage
    }

    /// The paths of the file, its parent, and so on, or the names that were given to [`Snapshot::named_chain`]; `None` for
    /// storage that was opened without either.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = Option<&Path>> {
        self.layers.iter().map(|layer| layer.path.as_deref())
    }

    /// The storages of the file, its parent, and so on.
    pub fn storages(&self) -> impl ExactSizeIterator<Item = &R> {
        self.layers.iter().map(|layer| &layer.storage)
    }

    /// The storages of the file, its parent, and so on, with their paths, to open them in another way.
    pub fn into_storages(self) -> impl ExactSizeIterator<Item = (R, Option<PathBuf>)> {
        self.layers.into_iter().map(|layer| (layer.storage, layer.path))
    }

    /// The metadata of the file.
    ///
    /// # Errors
    /// [`ReadError`] when the section is missing, damaged, larger than 1 MiB, of more than 16384
    /// values or not JSON.
    pub fn metadata(&self) -> Result<Metadata, ReadError> {
        self.top().metadata().map_err(|error| self.top().named(0, error))
    }

    /// The state with the given tag, if the file has it.
    ///
    /// # Errors
    /// [`ReadError`] when the section is damaged or larger than 64 MiB.
    pub fn state(&self, tag: u32) -> Result<Option<StateBlob>, ReadError> {
        self.top().state(tag).map_err(|error| self.top().named(0, error))
    }

    /// The pages that a restored guest accessed, if the file has them in a known version. It is a hint: it
    /// may be out of date or wrong.
    ///
    /// # Errors
    /// [`ReadError`] when the section is damaged, larger than 4 MiB, or not possible for this memory.
    pub fn working_set(&self) -> Result<Option<WorkingSet>, ReadError> {
        self.top().working_set().map_err(|error| self.top().named(0, error))
    }

    /// Where a page is; never [`PageEntry::Parent`].
    ///
    /// # Errors
    /// [`ReadError`] when the page is outside the memory, or its leaf is damaged or unreadable.
    pub fn entry(&self, page: PageIndex) -> Result<PageEntry, ReadError> {
        self.check_page(page)?;
        self.table.entry(&self.layers, page)
    }

    /// Announces to the storage that these pages will be looked up soon. Reading the parts of the index one after the
    /// other, at random offsets, takes many times as long.
    pub fn expect_entries(&self, pages: &[PageIndex]) {
        self.table.expect(&self.layers, pages);
    }

    /// Announces to the storage that chunks will be read at random, so that it should not read ahead of these reads. A read
    /// that waits for read-ahead of 8 MiB takes milliseconds on a disk. Reads with [`ReadOrder::Sequential`] are not
    /// affected.
    pub fn expect_random(&self) {
        self.layers.iter().for_each(|layer| layer.storage.expect_random());
    }

    /// Announces to the storage of a layer that these bytes of chunks will be read soon. It is a hint: bytes outside of
    /// the file's chunks are ignored.
    pub fn expect_chunks(&self, layer: u16, bytes: Range<u64>) {
        if let Some(layer) = self.layers.get(usize::from(layer)) {
            let end = bytes.end.min(layer.index.chunks().end);
            layer.storage.expect(bytes.start.min(end)..end);
        }
    }

    /// How many bytes of chunks a reader should announce ahead of its reads: [`ReadAt::ahead_bytes`] of the layer whose
    /// storage has the most.
    pub fn ahead_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.storage.ahead_bytes()).max().unwrap_or(0)
    }

    /// The longest run of zero pages around a zero page within its 2 MiB of memory, as a range of
    /// source offsets in bytes.
    ///
    /// # Errors
    /// As [`Snapshot::entry`].
    pub fn zero_run(&self, page: PageIndex) -> Result<Range<u64>, ReadError> {
        self.check_page(page)?;
        let run = self.table.zero_run(&self.layers, page)?;
        Ok(run.start * PAGE_BYTES as u64..run.end * PAGE_BYTES as u64)
    }

    /// Reads, checks and decodes one chunk into `buffer`. A chunk that the buffer holds already
    /// is not read again.
    ///
    /// # Errors
    /// [`ReadError`] when the chunk is unreadable or damaged.
    pub fn chunk<'b>(
        &self,
        extent: ChunkExtent,
        buffer: &'b mut ChunkBuffer,
    ) -> Result<Chunk<'b>, ReadError> {
        if !buffer.holds(self.serial, extent) {
            self.fetch_chunk(extent, buffer)?;
            self.decode_chunk(extent, buffer)?;
            buffer.hold(self.serial, extent);
        }
        buffer.held(extent)
    }

    /// The first half of reading a chunk: its stored bytes, unchecked. For callers that time the
    /// two halves; the second is [`Snapshot::decode_chunk`].
    ///
    /// # Errors
    /// [`ReadError::Io`] when the storage fails, [`ReadError::Changed`] when the file was written to since it was
    /// opened and the checksums of its chunks do not begin with the id of their snapshot.
    pub fn fetch_chunk(
        &self,
        extent: ChunkExtent,
        buffer: &mut ChunkBuffer,
    ) -> Result<(), ReadError> {
        // At most 4 MiB: an entry has no room for more.
        let stored = buffer.refill(extent.len_bytes() as usize);
        let layer = self.layer_of(extent)?;
        layer
            .read_chunks(&layer.storage, stored, extent.offset())
            .map_err(|error| layer.named(extent.layer().into(), error))
    }

    /// As [`Snapshot::fetch_chunk`], for chunks that are needed one after the other. It also reads the bytes behind the
    /// chunk, up to the offset `until` of its file but at most [`READ_AHEAD_BYTES`], so that the following chunks are
    /// not read again. Returns the number of bytes that were read now.
    ///
    /// # Errors
    /// As [`Snapshot::fetch_chunk`].
    pub fn fetch_chunk_ahead(
        &self,
        extent: ChunkExtent,
        until: u64,
        order: ReadOrder,
        buffer: &mut ChunkBuffer,
    ) -> Result<u64, ReadError> {
        if buffer.turn_to(self.serial, extent) {
            return Ok(0);
        }
        let layer = self.layer_of(extent)?;
        let furthest = layer.index.chunks().end.min(extent.offset() + READ_AHEAD_BYTES);
        let end = until.min(furthest).max(extent.end());
        let len = end - extent.offset();
        let stored = buffer.refill(len as usize);
        let read = match order {
            ReadOrder::Announced => layer.read_chunks(&layer.storage, stored, extent.offset()),
            ReadOrder::Sequential => layer.read_chunks(layer.in_order(), stored, extent.offset()),
        };
        read.map_err(|error| layer.named(extent.layer().into(), error))?;
        buffer.filled_ahead(self.serial, extent);
        Ok(len)
    }

    /// Whether a chunk of a snapshot from [`write_deferred`](crate::write_deferred) is in its file yet.
    ///
    /// # Errors
    /// [`ReadError::Io`] when the storage fails.
    pub fn has_chunk(&self, extent: ChunkExtent) -> Result<bool, ReadError> {
        let layer = self.layer_of(extent)?;
        let mut header = [0; CHUNK_HEADER_BYTES];
        layer
            .read_chunks(&layer.storage, &mut header, extent.offset())
            .map_err(|error| layer.named(extent.layer().into(), error))?;
        // A reader can see a part of a header that is being written: not all file systems lock the file for a write.
        Ok(ChunkHeader::decode(&header, extent.offset()).is_ok())
    }

    /// The second half of reading a chunk: checks and decodes what [`Snapshot::fetch_chunk`] has
    /// read for the same `extent`.
    ///
    /// # Errors
    /// [`ReadError::Corrupt`], of a layer's parent in [`ReadError::InParent`], when the chunk is damaged, of another
    /// snapshot, or not the fetched one; [`ReadError::Changed`] when the storage was written to since it was opened.
    pub fn decode_chunk<'b>(
        &self,
        extent: ChunkExtent,
        buffer: &'b mut ChunkBuffer,
    ) -> Result<Chunk<'b>, ReadError> {
        let layer = self.layer_of(extent)?;
        let checked = layer.check_chunk(extent, buffer);
        checked.map_err(|error| layer.named(extent.layer().into(), error))?;
        buffer.held(extent)
    }

    fn layer_of(&self, extent: ChunkExtent) -> Result<&Layer<R>, ReadError> {
        let layer = self.layers.get(usize::from(extent.layer()));
        layer.ok_or(ReadError::NoSuchLayer { layer: extent.layer() })
    }

    /// Copies one page into `page_bytes`.
    ///
    /// # Errors
    /// As [`Snapshot::entry`] and [`Snapshot::chunk`].
    ///
    /// # Panics
    /// When `page_bytes` is not 4096 bytes long.
    pub fn read_page(
        &self,
        page: PageIndex,
        buffer: &mut ChunkBuffer,
        page_bytes: &mut [u8],
    ) -> Result<(), ReadError> {
        match self.page(page, buffer)? {
            Some(bytes) => page_bytes.copy_from_slice(bytes),
            None => page_bytes.fill(0),
        }
        Ok(())
    }

    /// The bytes of one page; `None` when they are all zero.
    ///
    /// # Errors
    /// As [`Snapshot::entry`] and [`Snapshot::chunk`].
    pub fn page<'b>(
        &self,
        page: PageIndex,
        buffer: &'b mut ChunkBuffer,
    ) -> Result<Option<&'b [u8]>, ReadError> {
        match self.entry(page)? {
            PageEntry::Data { chunk, slot } => {
                let chunk = self.chunk(chunk, buffer)?;
                self.slot_of(page, slot, &chunk).map(Some)
            }
            PageEntry::Zero => Ok(None),
            // `of_layers` has checked that the last layer is complete.
            PageEntry::Parent => Err(ChainError::ParentNeeded { id: self.header().id }.into()),
        }
    }

    /// The bytes of `page`, which are in `slot` of `chunk` by its entry.
    ///
    /// # Errors
    /// [`Problem::Slot`] when the chunk has no such slot.
    pub fn slot_of<'b>(
        &self,
        page: PageIndex,
        slot: u16,
        chunk: &Chunk<'b>,
    ) -> Result<&'b [u8], ReadError> {
        let layer = usize::from(chunk.extent().layer());
        chunk.slot(slot).ok_or_else(|| self.bad_slot(layer, page, slot))
    }

    /// Number of 2 MiB leaves that may hold something other than zeros.
    pub fn leaf_count(&self) -> usize {
        self.table.leaf_numbers().len()
    }

    /// The parts of memory, each of 2 MiB or less at the end, that may hold something other than
    /// zeros, as ranges of source offsets in bytes, ascending. Costs no reads.
    pub fn populated(&self) -> impl Iterator<Item = Range<u64>> {
        let end = self.header().memory_bytes;
        self.table.leaf_numbers().map(move |number| {
            let start = u64::from(number) * LEAF_SPAN_BYTES;
            start..(start + LEAF_SPAN_BYTES).min(end)
        })
    }

    /// Calls `visit` with every page of some leaves (numbers from 0 to [`Snapshot::leaf_count`])
    /// that is not zero, in ascending order.
    ///
    /// # Errors
    /// What `visit` returns, or [`ReadError`] when a leaf is damaged or unreadable.
    pub fn for_each_entry(
        &self,
        leaves: Range<usize>,
        mut visit: impl FnMut(PageIndex, PageEntry) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        self.table.for_each_entry(&self.layers, leaves, &mut visit)
    }

    pub(crate) fn bad_slot(&self, number: usize, page: PageIndex, slot: u16) -> ReadError {
        let layer = &self.layers[number];
        let corruption = Corruption::new(
            Part::Section(SectionKind::INDEX_LEAVES),
            layer.index.entry_offset(page),
            Problem::Slot { page: page.0, slot },
        );
        layer.named(number, corruption.into())
    }

    fn check_page(&self, page: PageIndex) -> Result<(), ReadError> {
        let (page, pages) = (page.0.into(), self.header().pages());
        if page < pages { Ok(()) } else { Err(ReadError::NoSuchPage { page, pages }) }
    }
}
