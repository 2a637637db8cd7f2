//! Records which pages are touched, and when.
//!
//! A fault loads a whole chunk, so faults show which chunks are touched. Only the page tables show which pages are. So
//! recorded memory is a private mapping of a file in memory (memfd). Loaded pages are added to that file
//! ([`FilledFile`]) and not mapped. The faulting thread tries again and maps its page. The kernel maps the other pages
//! of the chunk when they are touched, without the pager. So the mapped pages are the touched pages, and
//! `/proc/self/pagemap` shows that for many pages in one read. Each touched page costs a short fault in the kernel. (A
//! fault to the pager for each page costs ten times as much.)
//!
//! At a read fault the kernel maps up to 16 pages around it that are in the file. It does not do that in memory that is
//! registered for write protection. [`Pager::recording`](crate::Pager::recording) registers it so; no page is
//! protected.
//!
//! The pager fills in zero pages, 64 KiB together. All of these count as touched.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::fault::resolver::ZERO_FILL_BYTES;
use crate::install::filled_file::FilledFile;
use crate::install::runs::Run;
use crate::pagemap::{PageTableEntry, Pagemap};
use crate::region::Region;
use crate::source::error::SourceError;
use crate::source::load::{Load, LoadedPage, LoadedPages, PageReader, WhenReady};
use crate::source::page_source::PageSource;

const PAGE_BYTES: u64 = crate::region::PAGE_BYTES as u64;

/// A record of touched pages: see [`Pager::recording`](crate::Pager::recording).
pub struct Recording {
    shared: Arc<Shared>,
    /// Which pages of the log were found touched, and at which mark.
    marks: Mutex<Marks>,
}

struct Shared {
    source: Arc<dyn PageSource>,
    /// The file that the memory maps, by source offset.
    file: FilledFile,
    regions: Vec<Region>,
    log: Mutex<Log>,
}

/// The numbers of the loaded pages, in the order of loading. In each chunk, the requested page comes first.
struct Log {
    pages: Vec<u32>,
    /// One bit for each page: whether it is in the log.
    known: Vec<u64>,
}

struct Marks {
    pagemap: Pagemap,
    count: u32,
    /// The number of pages of the log that were checked.
    known: usize,
    /// For each region, the checked pages that are not touched yet, sorted by number, with their index in the log.
    pending: Vec<Vec<(u32, usize)>>,
    /// The touched pages: the mark that has found them, and their index in the log.
    found: Vec<(u32, usize)>,
}

impl Recording {
    /// A recording for the memory of `regions`. Each must be a private mapping of `file` at its source offset. The file
    /// must be as long as the source, and have only holes.
    ///
    /// # Errors
    /// If `/proc/self/pagemap` cannot be opened, the source has 16 TiB or more or is not whole pages, or no userfaultfd
    /// for files in memory can be opened.
    pub fn new(
        source: Arc<dyn PageSource>,
        file: File,
        regions: Vec<Region>,
    ) -> io::Result<Recording> {
        let pages = source.len_bytes().div_ceil(PAGE_BYTES);
        if u32::try_from(pages).is_err() {
            return Err(io::Error::other("a source of 16 TiB or more"));
        }
        let file = FilledFile::new(file.as_fd(), source.len_bytes()).map_err(io::Error::other)?;
        // The kernel provides both buffers when they are written, so that a fault allocates nothing.
        let log = Log {
            pages: Vec::with_capacity(pages as usize),
            known: vec![0; pages.div_ceil(64) as usize],
        };
        let marks = Marks {
            pagemap: Pagemap::open()?,
            count: 0,
            known: 0,
            pending: vec![Vec::new(); regions.len()],
            found: Vec::new(),
        };
        Ok(Recording {
            shared: Arc::new(Shared { source, file, regions, log: Mutex::new(log) }),
            marks: Mutex::new(marks),
        })
    }

    /// The source for the pager.
    pub(crate) fn source(&self) -> Arc<dyn PageSource> {
        Arc::new(RecordedSource(Arc::clone(&self.shared)))
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.shared.regions
    }

    /// Sets a mark: finds the pages that were touched since the last mark or the start. This takes some microseconds
    /// for each 32 MiB with loaded pages that are not touched yet.
    ///
    /// # Errors
    /// If `/proc/self/pagemap` cannot be read. Then the recording is unusable.
    pub fn mark(&self) -> io::Result<()> {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let Marks { pagemap, count, known, pending, found } = &mut *marks;
        let loaded = self.shared.log().pages[*known..].to_vec();
        for (region, pending) in self.shared.regions.iter().zip(pending) {
            let first = region.source_offset() / PAGE_BYTES;
            let end = first + region.len_bytes() / PAGE_BYTES;
            let of_region = loaded.iter().copied().zip(*known..);
            pending.extend(of_region.filter(|(page, _)| (first..end).contains(&u64::from(*page))));
            // Only the new pages are out of order.
            pending.sort();
            let read_of = |page: u32| (u64::from(page) - first) / Pagemap::MAX_PAGES as u64;
            let found_before = found.len();
            for of_read in pending.chunk_by(|a, b| read_of(a.0) == read_of(b.0)) {
                let (from, to) = (of_read[0].0, of_read[of_read.len() - 1].0);
                let host_addr = region.host_addr() + (u64::from(from) - first) * PAGE_BYTES;
                let mut entries = pagemap.entries(host_addr, (to - from + 1) as usize)?;
                let mut next = from;
                for (page, at) in of_read {
                    let entry = entries.nth((page - next) as usize);
                    if entry.is_some_and(PageTableEntry::is_mapped) {
                        found.push((*count, *at));
                    }
                    next = page + 1;
                }
            }
            // Both lists have the same order.
            let mut now = found[found_before..].iter().map(|(_, at)| *at).peekable();
            pending.retain(|(_, at)| now.next_if_eq(at).is_none());
        }
        *known += loaded.len();
        *count = count.saturating_add(1);
        Ok(())
    }

    /// The touched pages: their source offsets in bytes, each with the number of marks before the one that has found
    /// it. They are sorted by mark and, for the same mark, in the order of loading.
    pub fn touched(&self) -> Vec<(u64, u32)> {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let log = self.shared.log();
        let mut found = marks.found.clone();
        found.sort_unstable();
        found.into_iter().map(|(mark, at)| (u64::from(log.pages[at]) * PAGE_BYTES, mark)).collect()
    }
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recording").field("regions", &self.shared.regions).finish_non_exhaustive()
    }
}

impl Shared {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the zero pages that the pager fills in for a fault.
    fn zero(&self, asked: u64, range: &std::ops::Range<u64>) {
        let mut log = self.log();
        log.note(asked);
        let region = self.regions.iter().find(|region| {
            asked.checked_sub(region.source_offset()).is_some_and(|at| at < region.len_bytes())
        });
        let Some(region) = region else { return };
        // The block is aligned by address, not by source offset.
        let start = region.source_offset();
        let host_addr = region.host_addr() + (asked - start);
        let before = (host_addr % ZERO_FILL_BYTES).min(asked - start.max(range.start.min(asked)));
        let after = ZERO_FILL_BYTES - host_addr % ZERO_FILL_BYTES;
        let end = (asked + after).min(range.end).min(start + region.len_bytes());
        (asked - before..end).step_by(PAGE_BYTES as usize).for_each(|offset| log.note(offset));
    }

    /// Adds pages that are not in the file, and records them.
    fn store(
        &self,
        asked: u64,
        loaded: &LoadedPages<'_>,
        runs: &mut Vec<Run>,
    ) -> Result<(), SourceError> {
        let mut log = self.log();
        self.file.fill(loaded, Some(asked), runs)?;
        let new = |page: &&LoadedPage| !log.knows(page.source_offset);
        let new: Vec<u64> =
            loaded.pages.iter().filter(new).map(|page| page.source_offset).collect();
        let first = new.iter().filter(|&&offset| offset == asked);
        let others = new.iter().filter(|&&offset| offset != asked);
        first.chain(others).for_each(|&offset| log.note(offset));
        Ok(())
    }
}

impl Log {
    fn knows(&self, offset: u64) -> bool {
        let page = offset / PAGE_BYTES;
        self.known.get(page as usize / 64).is_none_or(|bits| bits >> (page % 64) & 1 == 1)
    }

    fn note(&mut self, offset: u64) {
        let page = offset / PAGE_BYTES;
        if !self.knows(offset) {
            self.known[page as usize / 64] |= 1 << (page % 64);
            self.pages.push(page as u32);
        }
    }
}

struct RecordedSource(Arc<Shared>);

impl PageSource for RecordedSource {
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        let reader = self.0.source.reader(page_bytes)?;
        let runs = Vec::with_capacity(512);
        Ok(Box::new(RecordedReader { reader, shared: Arc::clone(&self.0), runs }))
    }

    fn len_bytes(&self) -> u64 {
        self.0.source.len_bytes()
    }
}

struct RecordedReader {
    reader: Box<dyn PageReader>,
    shared: Arc<Shared>,
    runs: Vec<Run>,
}

impl PageReader for RecordedReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        match self.reader.load(source_offset)? {
            Load::Pages(loaded) => {
                self.shared.store(source_offset, &loaded, &mut self.runs)?;
                Ok(Load::InFile { cost: loaded.cost })
            }
            Load::Zero { range } => {
                self.shared.zero(source_offset, &range);
                Ok(Load::Zero { range })
            }
            in_file @ Load::InFile { .. } => Ok(in_file),
        }
    }

    fn would_wait(&mut self, source_offset: u64) -> bool {
        self.reader.would_wait(source_offset)
    }

    fn when_ready(&mut self, source_offset: u64, ready: WhenReady) {
        self.reader.when_ready(source_offset, ready);
    }
}
