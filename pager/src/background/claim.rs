//! Marks the pages that a background thread is loading.

use std::cell::{Cell, RefCell};

use crate::background::loading::BY_BACKGROUND;
use crate::install::page_state::PageState;
use crate::pager_state::PagerState;
use crate::source::sequence::Wanted;

/// The pages that a background thread is loading. They are marked from before the read until after the install.
pub(crate) struct Claim<'a> {
    shared: &'a PagerState,
    pages: RefCell<Vec<u64>>,
    /// Pages were left out, because another thread is loading one of them.
    conflict: Cell<bool>,
}

impl<'a> Claim<'a> {
    pub(crate) fn new(shared: &'a PagerState) -> Claim<'a> {
        Claim { shared, pages: RefCell::new(Vec::with_capacity(64)), conflict: Cell::new(false) }
    }

    /// Removes the marks after the install. Returns whether pages were left out for another thread.
    pub(crate) fn end(&self) -> bool {
        self.pages.borrow_mut().drain(..).for_each(|page| self.shared.loading.release(page));
        self.conflict.replace(false)
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
                    self.conflict.set(true);
                    return false;
                }
            }
        }
        // A demand thread may have loaded them between the check of their states and their marks.
        let missing = pages.iter().any(|&page| self.shared.states.of(page) == PageState::Missing);
        if !missing {
            pages.drain(..).for_each(|page| loading.release(page));
        }
        missing
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.end();
    }
}
