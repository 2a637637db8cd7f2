//! Loads pages of a `.snap` file that are known in advance: chunk by chunk in the order of the file, with large reads.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use snapfmt::{ChunkBuffer, ChunkExtent, PageEntry, PageIndex, ReadAt, ReadOrder, Snapshot};

use crate::region::PAGE_BYTES;
use crate::sched::give_way::give_way;
use crate::source::error::SourceError;
use crate::source::load::{Load, LoadCost, LoadedPage, LoadedPages};
use crate::source::sequence::{PageSequence, Wanted};
use crate::source::shared_pages::SharedPages;
use crate::source::snapshot_page::{loaded, source_error};

/// The number of pages that are looked up together, and then loaded in the order of the file. The first batch is small,
/// so that its pages are loaded soon. The size doubles up to `BATCH`. Larger batches delay the next pages: all pages of
/// a batch that share a slot are loaded with the first of them.
const FIRST_BATCH: usize = 256;
const BATCH: usize = 512;
/// The batch size if the pages are scattered, with fewer than `DENSE_PAGES` in a chunk. Then the order of the file
/// matters more.
const SCATTERED_BATCH: usize = 4096;
const DENSE_PAGES: usize = 4;
/// The limit of batches that are looked up ahead. More would not be announced sooner.
const MOST_BATCHES: usize = 64;
/// The number of look-ups between two yields of the CPU. A look-up that reads the index takes 10 us, and a demand
/// thread may have been woken on this CPU.
const LOOK_UPS: usize = 16;
/// The limit of one read, so that its bytes stay in the cache of the core until they are decoded.
const READ_BYTES: u64 = 256 << 10;
/// A gap between two chunks up to this size is read with them, instead of two reads.
const GAP_BYTES: u64 = 64 << 10;

pub(crate) struct SnapshotSequence<R: ReadAt> {
    snapshot: Arc<Snapshot<R>>,
    /// Shared pages that some sequence has found.
    shared: Arc<Mutex<SharedPages>>,
    ranges: std::vec::IntoIter<Range<u64>>,
    now: Range<u64>,
    batch_pages: usize,
    /// The pages that are being looked up.
    pages_of_batch: Vec<PageIndex>,
    /// Pages whose look-up would wait for another host. They are looked up when the others have been announced.
    put_off: VecDeque<PageIndex>,
    is_remote: bool,
    order: ReadOrder,
    /// The pages that are being loaded, and the next ones, which the storage already reads.
    batch: Batch,
    next: VecDeque<Batch>,
    /// How many bytes of chunks the next batches should have, in storage that answers late. There is one at least.
    ahead_bytes: u64,
    /// The number of pages to skip after those.
    skip: usize,
    failed: Option<SourceError>,
    buffer: ChunkBuffer,
    pages: Vec<LoadedPage>,
}

/// Pages that were looked up together.
#[derive(Default)]
struct Batch {
    /// Stored pages, by chunk in the order of the file. Those before `at` are done.
    stored: Vec<(ChunkExtent, u16, PageIndex)>,
    at: usize,
    /// The bytes of their chunks.
    stored_bytes: u64,
    /// Zero pages. They are taken from the end.
    zeros: Vec<Range<u64>>,
    /// Pages whose shared page is kept, and their content.
    kept: Vec<LoadedPage>,
    kept_bytes: Vec<u8>,
}

impl Batch {
    fn keep(&mut self, page: PageIndex, bytes: &[u8]) {
        let (source_offset, buffer_offset) = (page.source_offset(), self.kept_bytes.len());
        self.kept.push(LoadedPage { source_offset, buffer_offset });
        self.kept_bytes.extend_from_slice(bytes);
    }
}

impl<R: ReadAt> SnapshotSequence<R> {
    pub(crate) fn new(
        snapshot: Arc<Snapshot<R>>,
        shared: Arc<Mutex<SharedPages>>,
        ranges: Vec<Range<u64>>,
    ) -> Self {
        let pages = ranges.iter().fold(0u64, |sum, range| {
            sum.saturating_add((range.end - range.start) / PAGE_BYTES as u64)
        });
        let batch_pages = if pages <= BATCH as u64 { BATCH } else { FIRST_BATCH };
        SnapshotSequence {
            ahead_bytes: snapshot.ahead_bytes(),
            is_remote: snapshot.is_remote(),
            order: ReadOrder::Announced,
            snapshot,
            shared,
            ranges: ranges.into_iter(),
            now: 0..0,
            batch_pages,
            pages_of_batch: Vec::with_capacity(BATCH),
            put_off: VecDeque::new(),
            batch: Batch::default(),
            next: VecDeque::new(),
            skip: 0,
            failed: None,
            buffer: ChunkBuffer::new(),
            pages: Vec::new(),
        }
    }

    /// Takes the pages of the next batch. Pages whose look-up would wait for another host are put off, so that the chunks of
    /// the other pages are announced before that. Returns `false` after the last page.
    fn take_pages(&mut self, wanted: &dyn Wanted) -> bool {
        let (mut new_pages, mut count) = (Vec::new(), 0);
        while count < self.batch_pages {
            if self.now.is_empty() {
                let Some(range) = self.ranges.next() else { break };
                self.now = range.start - range.start % PAGE_BYTES as u64..range.end;
                continue;
            }
            let offset = self.now.start;
            self.now.start = offset.saturating_add(PAGE_BYTES as u64);
            if self.skip > 0 {
                self.skip -= 1;
                continue;
            }
            count += 1;
            new_pages.extend(PageIndex::containing(offset).filter(|_| wanted.is_wanted(offset)));
        }
        self.snapshot.expect_entries(&new_pages);
        let again = self.put_off.len().min(self.batch_pages);
        self.pages_of_batch.clear();
        self.pages_of_batch.extend(self.put_off.drain(..again));
        self.pages_of_batch.append(&mut new_pages);
        if self.is_remote && count > 0 {
            let waits = |page: &mut PageIndex| self.snapshot.entry_would_wait(*page);
            self.put_off.extend(self.pages_of_batch.extract_if(.., waits));
        }
        count > 0 || !self.pages_of_batch.is_empty()
    }

    /// Looks up the next pages, and lets the storage start to read them. `None` after the last page.
    fn look_up(&mut self, wanted: &dyn Wanted) -> Option<Batch> {
        if !self.take_pages(wanted) {
            return None;
        }
        let mut batch = Batch::default();
        for (number, &page) in self.pages_of_batch.iter().enumerate() {
            if number % LOOK_UPS == 0 {
                give_way();
            }
            let (offset, end) = (page.source_offset(), page.source_offset() + PAGE_BYTES as u64);
            match self.snapshot.entry(page) {
                Ok(PageEntry::Data { chunk, slot }) => {
                    let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
                    match shared.find(chunk, slot) {
                        Some(at) => batch.keep(page, &shared.bytes()[at..at + PAGE_BYTES]),
                        None => batch.stored.push((chunk, slot, page)),
                    }
                }
                Ok(PageEntry::Zero) => match batch.zeros.last_mut() {
                    Some(last) if last.end == offset => last.end = end,
                    _ => batch.zeros.push(offset..end),
                },
                Ok(PageEntry::Parent) => {}
                Err(error) => self.failed = Some(source_error(page, error)),
            }
        }
        batch.stored.sort_unstable();
        let mut chunks = 0;
        for of_chunk in batch.stored.chunk_by(|a, b| a.0 == b.0) {
            chunks += 1;
            batch.stored_bytes += of_chunk[0].0.end() - of_chunk[0].0.offset();
        }
        self.batch_pages = match batch.stored.len() < chunks * DENSE_PAGES {
            true => SCATTERED_BATCH,
            false => (self.batch_pages * 2).min(BATCH),
        };
        batch.zeros.reverse();
        self.expect(&batch);
        Some(batch)
    }

    /// Looks up the next batch, and further ones for storage that answers late.
    fn look_ahead(&mut self, wanted: &dyn Wanted) {
        let mut bytes: u64 = self.next.iter().map(|batch| batch.stored_bytes).sum();
        while self.next.is_empty() || bytes < self.ahead_bytes && self.next.len() < MOST_BATCHES {
            let Some(batch) = self.look_up(wanted) else { return };
            bytes += batch.stored_bytes;
            self.next.push_back(batch);
        }
    }

    /// Lets the storage start to read the chunks of a batch. Chunks that are close to each other are read together.
    fn expect(&self, batch: &Batch) {
        if self.order == ReadOrder::Sequential {
            return;
        }
        let near = |a: &(ChunkExtent, u16, PageIndex), b: &(ChunkExtent, u16, PageIndex)| {
            a.0.layer() == b.0.layer() && b.0.offset() <= a.0.end().saturating_add(GAP_BYTES)
        };
        for together in batch.stored.chunk_by(near) {
            let [(first, ..), .., (last, ..)] = together else {
                let [(only, ..)] = together else { continue };
                self.snapshot.expect_chunks(only.layer(), only.offset()..only.end());
                continue;
            };
            self.snapshot.expect_chunks(first.layer(), first.offset()..last.end());
        }
    }

    /// The pages of the next chunk with wanted pages.
    fn next_chunk(&mut self, wanted: &dyn Wanted) -> Option<Range<usize>> {
        let Batch { stored, at, .. } = &mut self.batch;
        while let Some((extent, ..)) = stored.get(*at) {
            let of_chunk = stored[*at..].iter().take_while(|stored| stored.0 == *extent);
            let range = *at..*at + of_chunk.count();
            *at = range.end;
            let mut offsets = stored[range.clone()].iter().map(|(.., page)| page.source_offset());
            if offsets.clone().any(|offset| wanted.is_wanted(offset)) && wanted.claim(&mut offsets)
            {
                return Some(range);
            }
        }
        None
    }

    /// The end of a read that starts with this chunk. It includes the next chunks that will be loaded.
    fn read_until(&self, extent: ChunkExtent) -> u64 {
        let mut end = extent.end();
        for (next, ..) in &self.batch.stored[self.batch.at..] {
            let within = next.end() <= extent.offset() + READ_BYTES;
            if next.layer() != extent.layer() || next.offset() > end + GAP_BYTES || !within {
                break;
            }
            end = end.max(next.end());
        }
        end
    }

    /// The pages of the batch that need no read.
    fn kept(&mut self) -> Load<'_> {
        self.pages.clear();
        self.pages.append(&mut self.batch.kept);
        Load::Pages(LoadedPages {
            bytes: &self.batch.kept_bytes,
            pages: &self.pages,
            cost: LoadCost::default(),
        })
    }

    fn load(&mut self, range: Range<usize>) -> Result<Load<'_>, SourceError> {
        let (extent, _, page) = self.batch.stored[range.start];
        let start = Instant::now();
        let until = self.read_until(extent);
        let bytes_read = self
            .snapshot
            .fetch_chunk_ahead(extent, until, self.order, &mut self.buffer)
            .map_err(|error| source_error(page, error))?;
        let fetched = Instant::now();
        let chunk = self
            .snapshot
            .decode_chunk(extent, &mut self.buffer)
            .map_err(|error| source_error(page, error))?;
        self.pages.clear();
        for (_, slot, page) in &self.batch.stored[range] {
            self.snapshot
                .slot_of(*page, *slot, &chunk)
                .map_err(|error| source_error(*page, error))?;
            self.pages.push(loaded(*page, *slot));
            let at = usize::from(*slot) * PAGE_BYTES;
            if chunk.pages().get(usize::from(*slot)) != Some(page)
                && let Some(bytes) = chunk.bytes().get(at..at + PAGE_BYTES)
            {
                // The page shares the slot of an equal page.
                let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
                shared.keep(extent, *slot, bytes);
            }
        }
        Ok(Load::Pages(LoadedPages {
            bytes: chunk.bytes(),
            pages: &self.pages,
            cost: LoadCost {
                read_ns: (fetched - start).as_nanos() as u64,
                decode_ns: fetched.elapsed().as_nanos() as u64,
                bytes_read,
            },
        }))
    }
}

impl<R: ReadAt> PageSequence for SnapshotSequence<R> {
    fn next(&mut self, wanted: &dyn Wanted) -> Option<Result<Load<'_>, SourceError>> {
        loop {
            if let Some(error) = self.failed.take() {
                return Some(Err(error));
            }
            if let Some(range) = self.batch.zeros.pop() {
                return Some(Ok(Load::Zero { range }));
            }
            if !self.batch.kept.is_empty() {
                return Some(Ok(self.kept()));
            }
            if let Some(range) = self.next_chunk(wanted) {
                return Some(self.load(range));
            }
            self.batch = match self.next.pop_front() {
                Some(next) => next,
                None => self.look_up(wanted)?,
            };
            // The storage reads them while this batch is decoded.
            self.look_ahead(wanted);
        }
    }

    fn prepare(&mut self, wanted: &dyn Wanted) {
        self.look_ahead(wanted);
    }

    fn continues(&mut self) {
        // Storage of other hosts reads only what is announced.
        if !self.is_remote {
            self.order = ReadOrder::Sequential;
        }
    }

    fn skip(&mut self, pages: usize) {
        let mut left = pages;
        for batch in std::iter::once(&mut self.batch).chain(&mut self.next) {
            let of_batch = left.min(batch.stored.len() - batch.at);
            batch.at += of_batch;
            left -= of_batch;
        }
        self.skip += left;
    }
}
