//! Which pages are being loaded at this moment, and by whom: so that no chunk is decoded twice at the same time.
//!
//! A hint beside the page states, which alone decide what is installed: a mark that is wrong costs time only. A demand
//! thread whose page a background thread is just loading waits for that, and does not load it again. A background thread passes over
//! what a demand thread is loading.

use std::cell::RefCell;
use std::hint;
use std::io;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::page_bytes::PageBytes;
use crate::page_state::PageState;
use crate::sequence::Wanted;
use crate::slice::Shared;

const NOT: u8 = 0;
const BY_DEMAND: u8 = 1;
const BY_BACKGROUND: u8 = 2;

/// A demand thread waits no longer than this: the other thread may have been kept from running.
const LONGEST_WAIT: Duration = Duration::from_micros(500);
/// Looks, about 1 us each, before it lets others run.
const LOOKS: u32 = 100;

/// One mark a page. No memory is used before there are marks.
#[derive(Debug)]
pub(crate) struct LoadingPages(PageBytes);

impl LoadingPages {
    pub(crate) fn none(pages: usize) -> io::Result<LoadingPages> {
        Ok(LoadingPages(PageBytes::zeros(pages)?))
    }

    fn claim(&self, page: u64, by: u8) -> Result<(), u8> {
        let byte = self.0.at(page);
        byte.compare_exchange(NOT, by, Ordering::Relaxed, Ordering::Relaxed).map(|_| ())
    }

    fn release(&self, page: u64) {
        self.0.at(page).store(NOT, Ordering::Relaxed);
    }

    /// In a demand thread: marks the page, if no other thread has, until the answer is dropped. If a background thread is
    /// loading it: waits for that, and answers `None`; the page's state says what came of it.
    pub(crate) fn by_demand(&self, page: u64) -> Option<DemandMark<'_>> {
        match self.claim(page, BY_DEMAND) {
            Ok(()) => Some(DemandMark(Some((self, page)))),
            // Two faults on one page: the states sort that out.
            Err(BY_DEMAND) => Some(DemandMark(None)),
            Err(_) => {
                self.wait(page);
                None
            }
        }
    }

    fn wait(&self, page: u64) {
        let began = Instant::now();
        let mut looks = 0;
        while self.0.at(page).load(Ordering::Relaxed) == BY_BACKGROUND
            && began.elapsed() < LONGEST_WAIT
        {
            looks += 1;
            match looks < LOOKS {
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

/// What a background thread is loading: marked from before it is read until it is installed.
pub(crate) struct Claim<'a> {
    shared: &'a Shared,
    pages: RefCell<Vec<u64>>,
    /// A part was left out, because another thread is loading one of its pages.
    met: std::cell::Cell<bool>,
}

impl<'a> Claim<'a> {
    pub(crate) fn new(shared: &'a Shared) -> Claim<'a> {
        Claim { shared, pages: RefCell::new(Vec::with_capacity(64)), met: false.into() }
    }

    /// All is installed that was claimed. Answers whether a part was left out to another thread.
    pub(crate) fn end(&self) -> bool {
        self.pages.borrow_mut().drain(..).for_each(|page| self.shared.loading.release(page));
        self.met.replace(false)
    }
}

impl Wanted for Claim<'_> {
    fn is_wanted(&self, source_offset: u64) -> bool {
        let place = self.shared.layout.at_source(source_offset, 0);
        place.is_some_and(|place| self.shared.states.of(place.page) == PageState::Missing)
    }

    fn claim(&self, source_offsets: &mut dyn Iterator<Item = u64>) -> bool {
        let loading = &self.shared.loading;
        let mut pages = self.pages.borrow_mut();
        for offset in source_offsets {
            let Some(place) = self.shared.layout.at_source(offset, 0) else { continue };
            match loading.claim(place.page, BY_BACKGROUND) {
                Ok(()) => pages.push(place.page),
                Err(_) => {
                    pages.drain(..).for_each(|page| loading.release(page));
                    self.met.set(true);
                    return false;
                }
            }
        }
        true
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_waits_for_the_thread_that_is_loading_its_page() {
        let loading = LoadingPages::none(10).expect("10 bytes can be mapped");
        loading.claim(3, BY_BACKGROUND).expect("no other thread loads it");
        // It loads nothing itself, and looks at the page's state again. The other thread may have been kept from running: the
        // wait has an end.
        let began = Instant::now();
        assert!(loading.by_demand(3).is_none());
        assert!(began.elapsed() >= LONGEST_WAIT);
        loading.release(3);
        assert!(loading.by_demand(3).is_some());
    }

    #[test]
    fn what_a_fault_is_loading_is_left_to_it() {
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
