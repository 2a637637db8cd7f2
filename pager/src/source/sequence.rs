//! Loads pages that are known in advance, in the best order for their source.

use std::ops::Range;

use crate::source::error::SourceError;
use crate::source::load::{Load, PageReader};

/// Loads a list of pages, part by part: see [`crate::PageSource::sequence`].
pub trait PageSequence: Send {
    /// Loads the next part. `None` after the last one. Pages that are not wanted may be left out. A part is claimed
    /// immediately before it is read, and left out if the claim is refused.
    ///
    /// # Errors
    /// [`SourceError`] if a part cannot be loaded. The next call continues after that part.
    fn next(&mut self, wanted: &dyn Wanted) -> Option<Result<Load<'_>, SourceError>>;

    /// Announces that the first part will soon be loaded, so that slow storage can start to read it. The default does
    /// nothing.
    fn prepare(&mut self, _wanted: &dyn Wanted) {}

    /// Announces that the pages after the last one will probably be wanted, too. Storage may then read further ahead than
    /// the sequence. The default does nothing.
    fn continues(&mut self) {}

    /// Skips about this number of pages. They are not loaded later. The default does nothing.
    fn skip(&mut self, _pages: usize) {}
}

/// Decides which pages of a sequence are loaded. A function that returns whether the page at a source offset is wanted
/// implements this.
pub trait Wanted {
    /// Whether the page at this source offset (in bytes) is wanted.
    fn is_wanted(&self, source_offset: u64) -> bool;

    /// Claims the pages at these source offsets before they are read and decoded. `false` refuses that, because another
    /// thread is loading one of them, or has loaded all of them.
    fn claim(&self, _source_offsets: &mut dyn Iterator<Item = u64>) -> bool {
        true
    }
}

impl<F: Fn(u64) -> bool> Wanted for F {
    fn is_wanted(&self, source_offset: u64) -> bool {
        self(source_offset)
    }
}

/// Loads page by page, in the order of the list.
pub(crate) struct PageByPage {
    reader: Box<dyn PageReader>,
    ranges: std::vec::IntoIter<Range<u64>>,
    now: Range<u64>,
    page_bytes: u64,
}

impl PageByPage {
    pub(crate) fn new(
        reader: Box<dyn PageReader>,
        page_bytes: usize,
        ranges: Vec<Range<u64>>,
    ) -> PageByPage {
        PageByPage { reader, ranges: ranges.into_iter(), now: 0..0, page_bytes: page_bytes as u64 }
    }

    fn next_wanted(&mut self, wanted: &dyn Wanted) -> Option<u64> {
        loop {
            if self.now.is_empty() {
                self.now = self.ranges.next()?;
                self.now.start -= self.now.start % self.page_bytes;
                continue;
            }
            let offset = self.now.start;
            self.now.start = offset.checked_add(self.page_bytes)?;
            if wanted.is_wanted(offset) {
                return Some(offset);
            }
        }
    }
}

impl PageSequence for PageByPage {
    fn next(&mut self, wanted: &dyn Wanted) -> Option<Result<Load<'_>, SourceError>> {
        loop {
            let offset = self.next_wanted(wanted)?;
            if wanted.claim(&mut std::iter::once(offset)) {
                return Some(self.reader.load(offset));
            }
        }
    }

    fn skip(&mut self, pages: usize) {
        for _ in 0..pages {
            if self.next_wanted(&|_: u64| true).is_none() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::source::page_source::PageSource;
    use crate::source::vec_source::VecSource;

    #[test]
    fn skipped_pages_are_not_loaded() {
        let source = Arc::new(VecSource::new(vec![1; 10 * 4096], 4096));
        let ranges = vec![0..3 * 4096, 5 * 4096..10 * 4096];
        let mut sequence = PageByPage::new(source.reader(4096).expect("4 KiB fit"), 4096, ranges);
        let next = |sequence: &mut PageByPage| match sequence.next(&|_: u64| true) {
            Some(Ok(Load::Pages(loaded))) => Some(loaded.pages[0].source_offset / 4096),
            Some(other) => panic!("{other:?}"),
            None => None,
        };
        assert_eq!(next(&mut sequence), Some(0));
        sequence.skip(3);
        assert_eq!((next(&mut sequence), next(&mut sequence)), (Some(6), Some(7)));
        sequence.skip(100);
        assert!(sequence.next(&|_: u64| true).is_none());
    }
}
