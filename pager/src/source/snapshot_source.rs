//! The pages of a `.snap` file as a source.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use snapfmt::{ChunkBuffer, Header, PageEntry, PageIndex, ReadAt, ReadError, Snapshot};

use crate::region::PAGE_BYTES;
use crate::source::error::SourceError;
use crate::source::large_pages::LargePages;
use crate::source::load::{Load, LoadCost, LoadedPage, LoadedPages, PageReader, WhenReady};
use crate::source::page_source::PageSource;
use crate::source::sequence::{PageByPage, PageSequence};
use crate::source::shared_pages::SharedPages;
use crate::source::snapshot_page::{loaded, source_error};
use crate::source::snapshot_sequence::SnapshotSequence;

// The pages of a file are the smallest ones.
const _: () = assert!(PAGE_BYTES == snapfmt::layout::PAGE_BYTES);

/// The memory of a snapshot as a source. It loads whole chunks, and verifies them.
///
/// Source offsets are those of the memory map of the snapshot, in bytes. Its pages have 4 KiB. Larger ones are built
/// from these.
pub struct SnapshotSource<R: ReadAt> {
    snapshot: Arc<Snapshot<R>>,
    /// Shared pages that sequences have found. Each sequence loads one part of the memory, but equal pages are
    /// everywhere.
    shared: Arc<Mutex<SharedPages>>,
}

impl<R: ReadAt> SnapshotSource<R> {
    /// A source with the pages of the snapshot.
    pub fn new(snapshot: Arc<Snapshot<R>>) -> Self {
        snapshot.expect_random();
        Self { snapshot, shared: Arc::default() }
    }
}

impl<R: ReadAt + 'static> PageSource for SnapshotSource<R> {
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        if page_bytes != PAGE_BYTES {
            let small = self.reader(PAGE_BYTES)?;
            return Ok(Box::new(LargePages::of(small, PAGE_BYTES, page_bytes)?));
        }
        let most = self.snapshot.header().chunk_pages as usize;
        Ok(Box::new(SnapshotReader {
            is_remote: self.snapshot.is_remote(),
            snapshot: Arc::clone(&self.snapshot),
            buffer: ChunkBuffer::new(),
            shared: SharedPages::default(),
            pages: Vec::with_capacity(most * SPREAD as usize + 1),
            joined: Vec::new(),
        }))
    }

    fn len_bytes(&self) -> u64 {
        self.snapshot.header().memory_bytes
    }

    fn data_bytes(&self) -> u64 {
        // From the lowest layer up: the pages of a parent are at most those that the layer leaves to it.
        let headers: Vec<_> = self.snapshot.headers().collect();
        let add =
            |parent: u64, header: &&Header| header.data_pages + header.parent_pages.min(parent);
        headers.iter().rev().fold(0, add) * PAGE_BYTES as u64
    }

    fn sequence(
        &self,
        page_bytes: usize,
        pages: Vec<Range<u64>>,
    ) -> Result<Box<dyn PageSequence>, SourceError> {
        if page_bytes != PAGE_BYTES {
            let reader = self.reader(page_bytes)?;
            return Ok(Box::new(PageByPage::new(reader, page_bytes, pages)));
        }
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(SnapshotSequence::new(Arc::clone(&self.snapshot), shared, pages)))
    }
}

/// A fault on a page whose shared page is kept also loads such pages in the aligned 64 KiB around it.
const AROUND_PAGES: u32 = 16;
/// A fault on any other page also loads the equal pages between the pages of its chunk that need no read, if the chunk's pages
/// are spread over at most this many times as much memory.
const SPREAD: u32 = 2;

struct SnapshotReader<R: ReadAt> {
    snapshot: Arc<Snapshot<R>>,
    is_remote: bool,
    buffer: ChunkBuffer,
    shared: SharedPages,
    pages: Vec<LoadedPage>,
    /// The pages of a chunk, and kept pages after them.
    joined: Vec<u8>,
}

impl<R: ReadAt> PageReader for SnapshotReader<R> {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        let page = PageIndex::containing(source_offset)
            .ok_or_else(|| SourceError::permanent("offset above 16 TiB"))?;
        let failed = |error| source_error(page, error);
        let (extent, slot) = match self.snapshot.entry(page).map_err(failed)? {
            PageEntry::Data { chunk, slot } => (chunk, slot),
            PageEntry::Zero => {
                let range = self.snapshot.zero_run(page).map_err(failed)?;
                return Ok(Load::Zero { range });
            }
            PageEntry::Parent => {
                return Err(SourceError::permanent("the page is in a parent snapshot"));
            }
        };
        if let Some(buffer_offset) = self.shared.find(extent, slot) {
            self.pages.clear();
            self.pages.push(LoadedPage { source_offset: page.source_offset(), buffer_offset });
            self.kept_around(page);
            return Ok(Load::Pages(LoadedPages {
                bytes: self.shared.bytes(),
                pages: &self.pages,
                cost: LoadCost::default(),
            }));
        }
        let start = Instant::now();
        self.snapshot.fetch_chunk(extent, &mut self.buffer).map_err(failed)?;
        let fetched = Instant::now();
        let chunk = self.snapshot.decode_chunk(extent, &mut self.buffer).map_err(failed)?;
        let decode_ns = fetched.elapsed().as_nanos() as u64;

        // The entry of the faulting page was checked above. Other pages that the chunk lists are loaded only if their
        // index entries point to this chunk: the list alone proves nothing.
        self.snapshot.slot_of(page, slot, &chunk).map_err(failed)?;
        self.pages.clear();
        for (number, listed) in chunk.pages().iter().enumerate() {
            let here = PageEntry::Data { chunk: extent, slot: number as u16 };
            if *listed != page && self.snapshot.entry(*listed).is_ok_and(|entry| entry == here) {
                self.pages.push(loaded(*listed, number as u16));
            } else if *listed == page && number as u16 == slot {
                self.pages.push(loaded(page, slot));
            }
        }
        if chunk.pages().get(usize::from(slot)) != Some(&page) {
            // The page shares the slot of an equal page.
            self.pages.push(loaded(page, slot));
            let at = usize::from(slot) * PAGE_BYTES;
            if let Some(bytes) = chunk.bytes().get(at..at + PAGE_BYTES) {
                self.shared.keep(extent, slot, bytes);
            }
        }
        self.joined.clear();
        for between in between(chunk.pages()).filter(|between| *between != page) {
            // Zeros are left to their faults, and errors too.
            let Ok(PageEntry::Data { chunk: of, slot }) = self.snapshot.entry(between) else {
                continue;
            };
            if of == extent {
                let listed = chunk.pages().get(usize::from(slot));
                if listed.is_some_and(|listed| *listed != between) {
                    self.pages.push(loaded(between, slot));
                }
            } else if let Some(kept) = self.shared.find(of, slot) {
                if self.joined.is_empty() {
                    self.joined.extend_from_slice(chunk.bytes());
                }
                let (source_offset, buffer_offset) = (between.source_offset(), self.joined.len());
                self.joined.extend_from_slice(&self.shared.bytes()[kept..kept + PAGE_BYTES]);
                self.pages.push(LoadedPage { source_offset, buffer_offset });
            }
        }
        Ok(Load::Pages(LoadedPages {
            bytes: if self.joined.is_empty() { chunk.bytes() } else { &self.joined },
            pages: &self.pages,
            cost: LoadCost {
                read_ns: (fetched - start).as_nanos() as u64,
                decode_ns,
                bytes_read: extent.len_bytes().into(),
            },
        }))
    }

    fn would_wait(&mut self, source_offset: u64) -> bool {
        // The look-up below reads from a disk, which may be slow too: that is for `load` to do.
        if !self.is_remote {
            return false;
        }
        let Some(page) = PageIndex::containing(source_offset) else { return false };
        if self.snapshot.entry_would_wait(page) {
            return true;
        }
        match self.snapshot.entry(page) {
            Ok(PageEntry::Data { chunk, slot }) => {
                self.shared.find(chunk, slot).is_none() && self.snapshot.chunk_would_wait(chunk)
            }
            // The load returns the error.
            _ => false,
        }
    }

    fn when_ready(&mut self, source_offset: u64, ready: WhenReady) {
        let Some(page) = PageIndex::containing(source_offset) else { return ready(Ok(())) };
        let readable = move |result: Result<(), ReadError>| {
            ready(result.map_err(|error| source_error(page, error)));
        };
        self.snapshot.when_readable(page, Box::new(readable));
    }
}

impl<R: ReadAt> SnapshotReader<R> {
    /// Adds the other pages of the aligned block whose shared pages are kept.
    fn kept_around(&mut self, page: PageIndex) {
        let block = page.0 - page.0 % AROUND_PAGES;
        for other in (block..block.saturating_add(AROUND_PAGES)).map(PageIndex) {
            if other != page
                && let Ok(PageEntry::Data { chunk, slot }) = self.snapshot.entry(other)
                && let Some(buffer_offset) = self.shared.find(chunk, slot)
            {
                self.pages.push(LoadedPage { source_offset: other.source_offset(), buffer_offset });
            }
        }
    }
}

/// All pages from the first to the last of a chunk. None if the pages are spread.
fn between(of_chunk: &[PageIndex]) -> impl Iterator<Item = PageIndex> + use<> {
    let first = of_chunk.iter().map(|page| page.0).min().unwrap_or(0);
    let last = of_chunk.iter().map(|page| page.0).max().unwrap_or(0);
    let is_dense = last - first < of_chunk.len() as u32 * SPREAD;
    is_dense.then_some(first..=last).into_iter().flatten().map(PageIndex)
}
