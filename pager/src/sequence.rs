//! Pages that are known beforehand, loaded in the order in which their source has them best.

use std::ops::Range;

use crate::source::{Load, PageReader, SourceError};

/// Loads a list of pages, a part at a time: see [`crate::PageSource::sequence`].
pub trait PageSequence: Send {
    /// The next part; `None` when there is no more. Pages, by source offset, that are not `wanted` (any more) may be
    /// left out.
    ///
    /// # Errors
    /// [`SourceError`] for a part that cannot be had; the call after it goes on behind that part.
    fn next(&mut self, wanted: &dyn Fn(u64) -> bool) -> Option<Result<Load<'_>, SourceError>>;

    /// Passes over about so many pages, which do not come any more. Does nothing unless it is overridden.
    fn skip(&mut self, _pages: usize) {}
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

    fn next_wanted(&mut self, wanted: &dyn Fn(u64) -> bool) -> Option<u64> {
        loop {
            if self.now.is_empty() {
                self.now = self.ranges.next()?;
                self.now.start -= self.now.start % self.page_bytes;
                continue;
            }
            let offset = self.now.start;
            self.now.start = offset.checked_add(self.page_bytes)?;
            if wanted(offset) {
                return Some(offset);
            }
        }
    }
}

impl PageSequence for PageByPage {
    fn next(&mut self, wanted: &dyn Fn(u64) -> bool) -> Option<Result<Load<'_>, SourceError>> {
        let offset = self.next_wanted(wanted)?;
        Some(self.reader.load(offset))
    }

    fn skip(&mut self, pages: usize) {
        for _ in 0..pages {
            if self.next_wanted(&|_| true).is_none() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::source::PageSource;
    use crate::vec_source::VecSource;

    #[test]
    fn pages_that_are_skipped_do_not_come() {
        let source = Arc::new(VecSource::new(vec![1; 10 * 4096], 4096));
        let ranges = vec![0..3 * 4096, 5 * 4096..10 * 4096];
        let mut sequence = PageByPage::new(source.reader(4096).expect("4 KiB fit"), 4096, ranges);
        let next = |sequence: &mut PageByPage| match sequence.next(&|_| true) {
            Some(Ok(Load::Pages(loaded))) => Some(loaded.pages[0].source_offset / 4096),
            Some(other) => panic!("{other:?}"),
            None => None,
        };
        assert_eq!(next(&mut sequence), Some(0));
        sequence.skip(3);
        assert_eq!((next(&mut sequence), next(&mut sequence)), (Some(6), Some(7)));
        sequence.skip(100);
        assert!(sequence.next(&|_| true).is_none());
    }
}
