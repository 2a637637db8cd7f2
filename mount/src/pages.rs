//! Which pages of a file the kernel has been given.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use snapvm::snapfmt::layout::PAGE_BYTES;

const PAGE: u64 = PAGE_BYTES as u64;

/// One bit for each page that may hold something other than zeros. The kernel may have dropped a page since: then it
/// reads it again, and loading ahead leaves it alone.
pub(crate) struct LoadedPages(Vec<LoadedRange>);

struct LoadedRange {
    /// Pages of the file.
    pages: Range<u64>,
    words: Box<[AtomicU64]>,
}

impl LoadedPages {
    /// Of a file with data in these ranges of bytes: ascending, without overlaps.
    pub(crate) fn new(data: &[Range<u64>]) -> Self {
        let range = |bytes: &Range<u64>| {
            let pages = bytes.start / PAGE..bytes.end.div_ceil(PAGE);
            let words = (pages.end - pages.start).div_ceil(64);
            LoadedRange { pages, words: (0..words).map(|_| AtomicU64::new(0)).collect() }
        };
        Self(data.iter().map(range).collect())
    }

    /// The ranges with pages in a range of pages.
    fn ranges(&self, pages: Range<u64>) -> impl Iterator<Item = (&LoadedRange, Range<u64>)> {
        let first = self.0.partition_point(|range| range.pages.end <= pages.start);
        let found = self.0[first..].iter().take_while(move |range| range.pages.start < pages.end);
        found.map(move |range| {
            let common = range.pages.start.max(pages.start)..range.pages.end.min(pages.end);
            (range, common)
        })
    }

    /// The kernel has dropped them all.
    pub(crate) fn clear(&self) {
        let words = self.0.iter().flat_map(|range| &range.words);
        words.for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Notes the pages that lie in a range of bytes as a whole.
    pub(crate) fn insert(&self, bytes: Range<u64>) {
        for (range, pages) in self.ranges(bytes.start.div_ceil(PAGE)..bytes.end / PAGE) {
            for page in pages {
                let (word, bit) = range.place(page);
                range.words[word].fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// The first run of missing pages in a range of bytes, with at most `most` of them, as a range of bytes.
    pub(crate) fn missing(&self, bytes: Range<u64>, most: u64) -> Option<Range<u64>> {
        self.ranges(bytes.start / PAGE..bytes.end.div_ceil(PAGE)).find_map(|(range, mut pages)| {
            let missing = |page: &u64| !range.contains(*page);
            let first = pages.find(missing)?;
            let more = pages.take(most as usize - 1).take_while(missing).count() as u64;
            Some(first * PAGE..(first + 1 + more) * PAGE)
        })
    }
}

impl LoadedRange {
    fn place(&self, page: u64) -> (usize, u64) {
        let number = page - self.pages.start;
        ((number / 64) as usize, 1 << (number % 64))
    }

    fn contains(&self, page: u64) -> bool {
        let (word, bit) = self.place(page);
        self.words[word].load(Ordering::Relaxed) & bit != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_missing_pages() {
        let pages = LoadedPages::new(&[0..100 * PAGE, 1000 * PAGE..1200 * PAGE + 1]);
        let all = 0..5000 * PAGE;
        assert_eq!(pages.missing(all.clone(), 64), Some(0..64 * PAGE));
        // A page of which only a part was read is still missing.
        pages.insert(1..70 * PAGE + 5);
        assert_eq!(pages.missing(all.clone(), 64), Some(0..PAGE));
        pages.insert(0..PAGE);
        assert_eq!(pages.missing(all.clone(), 64), Some(70 * PAGE..100 * PAGE));
        pages.insert(71 * PAGE..72 * PAGE);
        assert_eq!(pages.missing(all.clone(), 64), Some(70 * PAGE..71 * PAGE));
        pages.insert(70 * PAGE..1001 * PAGE);
        assert_eq!(pages.missing(all.clone(), 64), Some(1001 * PAGE..1065 * PAGE));
        assert_eq!(pages.missing(0..1000 * PAGE, 64), None);
        pages.insert(1000 * PAGE..5000 * PAGE);
        assert_eq!(pages.missing(all, 64), None);
        assert_eq!(LoadedPages::new(&[]).missing(0..PAGE, 1), None);
    }
}
