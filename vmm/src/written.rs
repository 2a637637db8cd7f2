//! Which pages of guest memory were written to: by vCPUs and KVM, which KVM records (KVM_MEM_LOG_DIRTY_PAGES), and by this
//! process, which it records itself.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::layout::PAGE_BYTES;

/// Pages of one word of a bitmap.
const WORD_PAGES: u64 = u64::BITS as u64;

/// A set of pages.
#[derive(Debug, Default)]
pub(crate) struct PageSet {
    /// A bit for each page. By page number divided by [`WORD_PAGES`].
    words: BTreeMap<u64, u64>,
}

impl PageSet {
    /// Adds the pages that have a byte of `gpas`.
    fn add(&mut self, gpas: Range<u64>) {
        for page in gpas.start / PAGE_BYTES..gpas.end.div_ceil(PAGE_BYTES) {
            *self.words.entry(page / WORD_PAGES).or_default() |= 1 << (page % WORD_PAGES);
        }
    }

    /// Adds the pages of a bitmap whose first bit is the page at `gpa`.
    fn add_bitmap(&mut self, gpa: u64, bitmap: &[u64]) {
        let (first_word, shift) = (gpa / PAGE_BYTES / WORD_PAGES, gpa / PAGE_BYTES % WORD_PAGES);
        for (index, &word) in (first_word..).zip(bitmap).filter(|(_, word)| **word != 0) {
            *self.words.entry(index).or_default() |= word << shift;
            if shift > 0 && word >> (WORD_PAGES - shift) != 0 {
                *self.words.entry(index + 1).or_default() |= word >> (WORD_PAGES - shift);
            }
        }
    }

    /// The runs of pages, as ascending ranges of guest physical addresses.
    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (index, word) in &self.words {
            for bit in (0..WORD_PAGES).filter(|bit| word >> bit & 1 == 1) {
                let gpa = (index * WORD_PAGES + bit) * PAGE_BYTES;
                match ranges.last_mut() {
                    Some(last) if last.end == gpa => last.end += PAGE_BYTES,
                    _ => ranges.push(gpa..gpa + PAGE_BYTES),
                }
            }
        }
        ranges
    }
}

/// The pages that this process has written to, or discarded. Clones share one log. The default one records nothing.
#[derive(Clone, Debug, Default)]
pub struct WriteLog(Option<Arc<Mutex<PageSet>>>);

impl WriteLog {
    /// A log that records.
    pub(crate) fn recording() -> WriteLog {
        WriteLog(Some(Arc::default()))
    }

    pub(crate) fn is_recording(&self) -> bool {
        self.0.is_some()
    }

    /// Records a write to these guest physical addresses. It is called before the write.
    pub fn note(&self, gpas: Range<u64>) {
        if let Some(mut pages) = self.lock() {
            pages.add(gpas);
        }
    }

    /// Records the pages of a bitmap whose first bit is the page at `gpa`.
    pub(crate) fn note_bitmap(&self, gpa: u64, bitmap: &[u64]) {
        if let Some(mut pages) = self.lock() {
            pages.add_bitmap(gpa, bitmap);
        }
    }

    /// The pages so far, as [`PageSet::ranges`] has them. `None` if it records nothing.
    pub(crate) fn ranges(&self) -> Option<Vec<Range<u64>>> {
        self.lock().map(|pages| pages.ranges())
    }

    /// The pages so far, which the log forgets. `None` if it records nothing.
    pub(crate) fn take(&self) -> Option<PageSet> {
        self.lock().map(|mut pages| std::mem::take(&mut *pages))
    }

    fn lock(&self) -> Option<MutexGuard<'_, PageSet>> {
        // The set is consistent whenever the lock is released.
        self.0.as_ref().map(|pages| pages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_both_logs_are_joined() {
        let log = WriteLog::recording();
        log.note(4095..4097);
        log.note(100 * 4096..100 * 4096);
        log.note(63 * 4096..66 * 4096);
        log.note_bitmap(1 << 32, &[0b101, 0, 1 << 63]);
        // Of a slot that begins in the middle of a word.
        log.note_bitmap(70 * 4096, &[1 << 60 | 1]);
        let page = |page: u64, pages: u64| page * 4096..(page + pages) * 4096;
        let high = (1 << 32) / 4096;
        let expected = [
            page(0, 2),
            page(63, 3),
            page(70, 1),
            page(130, 1),
            page(high, 1),
            page(high + 2, 1),
            page(high + 191, 1),
        ];
        assert_eq!(log.ranges().expect("it records"), expected);
        assert_eq!(log.take().expect("it records").ranges(), expected);
        assert!(log.take().expect("it records").ranges().is_empty());
        assert!(WriteLog::default().take().is_none());
    }
}
