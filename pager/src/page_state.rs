//! The state of every page: one byte each, all "missing" at first, at no cost in the memory's size.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::mapping::Mapping;

/// What the pager knows of a page.
///
/// There is no state "loading": a page's state changes only under its slice's gate, together with the
/// ioctl that changes the page, so no thread can see one half done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum PageState {
    /// Never installed; its content is the source's.
    Missing = 0,
    /// Installed. Never asked of the source again.
    Present = 1,
    /// Given back by the guest (`MADV_DONTNEED`, balloon): reads as zero from now on.
    Removed = 2,
    /// Could not be had: accesses raise SIGBUS.
    Poisoned = 3,
}

impl PageState {
    fn of(byte: u8) -> PageState {
        match byte {
            0 => PageState::Missing,
            1 => PageState::Present,
            2 => PageState::Removed,
            _ => PageState::Poisoned,
        }
    }
}

/// The states of `pages` pages.
#[derive(Debug)]
pub(crate) struct PageStates {
    mapping: Arc<Mapping>,
    offset: usize,
    pages: usize,
}

impl PageStates {
    /// All missing. The memory is mapped, not filled: only the parts that are looked at become resident
    /// (4096 states, 16 MiB of guest, a page), where an allocator might hand out and clear reused memory.
    pub(crate) fn all_missing(pages: usize) -> io::Result<PageStates> {
        let mapping = Arc::new(Mapping::anonymous(pages.max(1))?);
        Ok(PageStates { mapping, offset: 0, pages })
    }

    /// Those that the mapping has at `offset`.
    #[cfg(feature = "serve")]
    pub(crate) fn within(mapping: Arc<Mapping>, offset: usize, pages: usize) -> PageStates {
        mapping.at(offset, pages);
        PageStates { mapping, offset, pages }
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn of(&self, page: u64) -> PageState {
        PageState::of(self.byte(page).load(Ordering::Relaxed))
    }

    /// Sets the state and answers the former one. The caller holds the gate of the page's slice.
    pub(crate) fn set(&self, page: u64, state: PageState) -> PageState {
        PageState::of(self.byte(page).swap(state as u8, Ordering::Relaxed))
    }

    fn byte(&self, page: u64) -> &AtomicU8 {
        let page = page as usize;
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let byte = self.mapping.at(self.offset + page, 1).cast::<AtomicU8>();
        // SAFETY: mapped, readable and writable as long as `self` lives, all bit patterns are valid for
        // an AtomicU8, and it is accessed as nothing else.
        unsafe { byte.as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_kept_apart_and_begin_as_missing() {
        let states = PageStates::all_missing(10_000).expect("10 KB can be mapped");
        assert_eq!(states.of(9_999), PageState::Missing);
        for (page, state) in
            [(0, PageState::Present), (1, PageState::Removed), (9_999, PageState::Poisoned)]
        {
            assert_eq!(states.set(page, state), PageState::Missing);
            assert_eq!(states.of(page), state);
        }
        assert_eq!(states.of(2), PageState::Missing);
    }

    #[test]
    #[should_panic(expected = "page 5 of 5")]
    fn a_page_outside_is_refused() {
        PageStates::all_missing(5).expect("5 bytes can be mapped").of(5);
    }
}
