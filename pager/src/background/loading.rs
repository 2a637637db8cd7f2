//! Marks the pages that are being loaded, so that two threads do not decode the same chunk at the same time.
//!
//! The marks are only hints: the page states decide what is installed, and a wrong mark costs only time. A demand
//! thread waits while a background thread loads its page, and does not load the page itself. A background thread skips
//! the pages that a demand thread is loading.

use std::hint;
use std::io;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::install::page_bytes::PageBytes;

const NOT: u8 = 0;
const BY_DEMAND: u8 = 1;
pub(super) const BY_BACKGROUND: u8 = 2;

/// The longest time that a demand thread waits for a background thread, which may not be running.
const LONGEST_WAIT: Duration = Duration::from_micros(500);
/// The number of spins, about 1 us each, before a waiting thread yields its CPU.
const SPINS: u32 = 100;

/// One mark for each page. Memory is used only for parts that have marks.
#[derive(Debug)]
pub(crate) struct LoadingPages(PageBytes);

impl LoadingPages {
    pub(crate) fn none(pages: usize) -> io::Result<LoadingPages> {
        Ok(LoadingPages(PageBytes::zeros(pages)?))
    }

    pub(super) fn claim(&self, page: u64, by: u8) -> Result<(), u8> {
        let byte = self.0.at(page);
        byte.compare_exchange(NOT, by, Ordering::Relaxed, Ordering::Relaxed).map(|_| ())
    }

    pub(super) fn release(&self, page: u64) {
        self.0.at(page).store(NOT, Ordering::Relaxed);
    }

    /// Called by a demand thread: marks the page until the result is dropped, if no other thread has marked it. If a
    /// background thread is loading the page, this waits for it and returns `None`. The page state then shows whether
    /// the page is installed.
    pub(crate) fn by_demand(&self, page: u64) -> Option<DemandMark<'_>> {
        match self.claim(page, BY_DEMAND) {
            Ok(()) => Some(DemandMark(Some((self, page)))),
            // Two demand threads have faults on this page. The page states handle that.
            Err(BY_DEMAND) => Some(DemandMark(None)),
            Err(_) => {
                self.wait(page);
                None
            }
        }
    }

    /// Whether a background thread is loading the page.
    pub(crate) fn is_by_background(&self, page: u64) -> bool {
        self.0.at(page).load(Ordering::Relaxed) == BY_BACKGROUND
    }

    fn wait(&self, page: u64) {
        let began = Instant::now();
        let mut spins = 0;
        while self.0.at(page).load(Ordering::Relaxed) == BY_BACKGROUND
            && began.elapsed() < LONGEST_WAIT
        {
            spins += 1;
            match spins < SPINS {
                true => (0..32).for_each(|_| hint::spin_loop()),
                false => thread::yield_now(),
            }
        }
    }
}

pub(crate) struct DemandMark<'a>(Option<(&'a LoadingPages, u64)>);

impl Drop for DemandMark<'_> {
    fn drop(&mut self) {
        if let Some((loading, page)) = self.0 {
            loading.release(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_waits_for_the_thread_that_is_loading_its_page() {
        let loading = LoadingPages::none(10).expect("10 bytes can be mapped");
        loading.claim(3, BY_BACKGROUND).expect("no other thread loads it");
        // It loads nothing itself, and checks the page state again. The wait is limited, because the other thread may
        // not be running.
        let began = Instant::now();
        assert!(loading.by_demand(3).is_none());
        assert!(began.elapsed() >= LONGEST_WAIT);
        loading.release(3);
        assert!(loading.by_demand(3).is_some());
    }

    #[test]
    fn pages_that_a_fault_is_loading_are_skipped() {
        let loading = LoadingPages::none(10).expect("10 bytes can be mapped");
        let mark = loading.by_demand(3).expect("no other thread loads it");
        assert_eq!(loading.claim(3, BY_BACKGROUND), Err(BY_DEMAND));
        // A second fault on it does not end the first one's mark.
        drop(loading.by_demand(3));
        assert_eq!(loading.claim(3, BY_BACKGROUND), Err(BY_DEMAND));
        drop(mark);
        assert_eq!(loading.claim(3, BY_BACKGROUND), Ok(()));
    }
}
