//! The state of every page: one byte each, first `Missing`. Creating the states costs the same for any size of memory.

use std::io;
#[cfg(feature = "serve")]
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::install::page_bytes::PageBytes;
#[cfg(feature = "serve")]
use crate::mapping::Mapping;

/// What the pager knows about a page.
///
/// There is no state "loading". The state of a page changes only while the slice lock is held, together with the ioctl
/// that changes the page, so that no thread sees a half-done change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum PageState {
    /// Never installed. Its content is that of the source.
    Missing = 0,
    /// Installed. It is never loaded again.
    Present = 1,
    /// Given back by the guest (`MADV_DONTNEED`, balloon). It reads as zero from now on.
    Removed = 2,
    /// It could not be loaded. Accesses raise SIGBUS.
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
pub(crate) struct PageStates(PageBytes);

impl PageStates {
    /// States that are all `Missing`: see [`PageBytes::zeros`].
    ///
    /// # Errors
    /// As mmap(2).
    pub(crate) fn all_missing(pages: usize) -> io::Result<PageStates> {
        Ok(PageStates(PageBytes::zeros(pages)?))
    }

    /// The states that are in the mapping at `offset`.
    #[cfg(feature = "serve")]
    pub(crate) fn within(mapping: Arc<Mapping>, offset: usize, pages: usize) -> PageStates {
        PageStates(PageBytes::within(mapping, offset, pages))
    }

    pub(crate) fn pages(&self) -> usize {
        self.0.pages()
    }

    pub(crate) fn of(&self, page: u64) -> PageState {
        PageState::of(self.0.at(page).load(Ordering::Relaxed))
    }

    /// Sets the state and returns the former one. The caller holds the slice lock.
    pub(crate) fn set(&self, page: u64, state: PageState) -> PageState {
        PageState::of(self.0.at(page).swap(state as u8, Ordering::Relaxed))
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
}
