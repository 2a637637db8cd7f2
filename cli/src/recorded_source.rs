//! A page source that records which pages its guests touch.
//!
//! Each load gives only the requested page. So each page that a guest touches is a fault, and is recorded.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pager::{Load, LoadedPages, PageReader, PageSource, SourceError, WhenReady};
use snapfmt::{PageIndex, Phase, WorkingSet};
use snapvm::Touched;

/// The source that it wraps. Its guests must load nothing ahead.
pub(crate) struct RecordedSource {
    source: Arc<dyn PageSource>,
    record: Arc<Record>,
}

/// What all guests have touched.
#[derive(Default)]
pub(crate) struct Record(Mutex<Vec<Arc<Mutex<Touched>>>>);

impl Record {
    /// The working set of all guests that have touched a page.
    pub(crate) fn join(&self) -> WorkingSet {
        let guests: Vec<Touched> = lock(&self.0).iter().map(|guest| lock(guest).clone()).collect();
        let touched = guests.iter().filter(|guest| !guest.is_empty());
        WorkingSet::join(touched.map(Vec::as_slice))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RecordedSource {
    pub(crate) fn new(source: Arc<dyn PageSource>, record: Arc<Record>) -> Self {
        Self { source, record }
    }
}

impl PageSource for RecordedSource {
    /// Each guest has one.
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        let reader = self.source.reader(page_bytes)?;
        let touched = Arc::default();
        lock(&self.record.0).push(Arc::clone(&touched));
        let guest = Guest { page_bytes: page_bytes as u64, first: None };
        Ok(Box::new(RecordedReader { reader, touched, guest }))
    }

    fn len_bytes(&self) -> u64 {
        self.source.len_bytes()
    }
}

struct RecordedReader {
    reader: Box<dyn PageReader>,
    touched: Arc<Mutex<Touched>>,
    guest: Guest,
}

/// The size of the guest's pages, and when it touched the first one.
struct Guest {
    page_bytes: u64,
    first: Option<Instant>,
}

impl PageReader for RecordedReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        let loaded = self.reader.load(source_offset)?;
        let after = self.guest.first.get_or_insert_with(Instant::now).elapsed();
        let Load::Pages(LoadedPages { bytes, pages, cost }) = loaded else {
            // Zeros take no reading.
            return Ok(loaded);
        };
        let small = (0..self.guest.page_bytes).step_by(snapfmt::layout::PAGE_BYTES);
        let small = small.filter_map(|offset| PageIndex::containing(source_offset + offset));
        lock(&self.touched).extend(small.map(|page| (page, phase(after))));
        let only = pages.iter().position(|page| page.source_offset == source_offset);
        let pages = only.map_or(pages, |only| &pages[only..=only]);
        Ok(Load::Pages(LoadedPages { bytes, pages, cost }))
    }

    fn would_wait(&mut self, source_offset: u64) -> bool {
        self.reader.would_wait(source_offset)
    }

    fn when_ready(&mut self, source_offset: u64, ready: WhenReady) {
        self.reader.when_ready(source_offset, ready);
    }
}

/// The output of a guest of another program is not known here.
fn phase(after: Duration) -> Phase {
    match after.as_millis() {
        0..100 => Phase::First100Ms,
        100..1000 => Phase::FirstSecond,
        _ => Phase::Later,
    }
}

#[cfg(test)]
mod tests {
    use pager::VecSource;

    use super::*;

    #[test]
    fn only_the_requested_pages_are_loaded_and_recorded() {
        let record = Arc::new(Record::default());
        let source = Arc::new(VecSource::new(vec![7; 16 * 4096], 8 * 4096));
        let source = RecordedSource::new(source, Arc::clone(&record));
        let _idle = source.reader(4096).expect("it has such pages");
        for pages in [[9, 2], [9, 3]] {
            let mut guest = source.reader(4096).expect("it has such pages");
            for page in pages {
                match guest.load(page * 4096).expect("it is there") {
                    Load::Pages(LoadedPages { pages: [only], .. }) => {
                        assert_eq!(only.source_offset, page * 4096);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        let set = record.join();
        assert_eq!(set.restores(), 2);
        let pages: Vec<u32> = set.pages().map(|(page, _)| page.0).collect();
        assert_eq!(pages, [9, 2, 3]);
        assert_eq!(set.runs()[0].seen, 2);
    }
}
