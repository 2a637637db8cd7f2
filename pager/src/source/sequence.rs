//! Pages that are known beforehand, loaded in the order in which their source has them best.

use std::ops::Range;

use crate::source::error::SourceError;
use crate::source::load::{Load, PageReader};

/// Loads a list of pages, a part at a time: see [`crate::PageSource::sequence`].
pub trait PageSequence: Send {
    /// The next part; `None` when there is no more. Pages that are not wanted (any more) may be left out. A part is
    /// claimed right before it is read, and left out if that is refused.
    ///
    /// # Errors
    /// [`SourceError`] for a part that cannot be had; the call after it continues behind that part.
    fn next(&mut self, wanted: &dyn Wanted) -> Option<Result<Load<'_>, SourceError>>;

    /// The first part will soon be asked for: storage that takes its time may begin to read it. Does nothing unless it is
    /// overridden.
    fn prepare(&mut self, _wanted: &dyn Wanted) {}

    /// Passes over about so many pages, which do not come any more. Does nothing unless it is overridden.
    fn skip(&mut self, _pages: usize) {}
}

/// What is asked while a sequence is loaded. A function that tells whether the page at a source offset is wanted is one.
pub trait Wanted {
    /// Whether the page at this offset of the source is wanted.
    fn is_wanted(&self, source_offset: u64) -> bool;

    /// The pages at these offsets are about to be read and decoded. `false` refuses that: another thread is loading one
    /// of them.
    fn claim(&self, _source_offsets: &mut dyn Iterator<Item = u64>) -> bool {
        true
    }
}

impl<F: Fn(u64) -> bool> Wanted for F {
    fn is_wanted(&self, source_offset: u64) -> bool {
        self(source_offset)
    }
}

/// Page by page, in the order of the list.
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
    fn pages_that_are_skipped_do_not_come() {
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
