//! What a window knows about each page after the cut: one byte each.
//!
//! ```text
//! unsaved --claim--> claimed --+--> saved    the sweep has its bytes
//!                              +--> staged   a copy has its bytes
//! ```
//!
//! A claim has one winner. The winner copies the bytes, and only then sets the next state. A page becomes writable only
//! after that. So the page of a thread that finds `Saved` or `Staged` may be written.

use std::io;
use std::sync::atomic::Ordering;

use crate::install::page_bytes::PageBytes;
use crate::install::page_state::PageState;

/// The state of a page of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum CutState {
    /// Memory has the bytes of the cut, and the page is protected if it is in memory.
    Unsaved = 0,
    /// One thread copies it. It is protected.
    Claimed = 1,
    /// The sweep has copied it. It may be written.
    Saved = 2,
    /// A fault has copied it, and the sweep has not taken the copy yet. It may be written.
    Staged = 3,
    /// It was missing at the cut: it has the bytes of the pager's source.
    Missing = 4,
    /// It was given back before the cut: it is zero.
    Zero = 5,
}

impl CutState {
    /// Whether memory is not needed any more for the bytes of the page.
    pub(crate) fn is_done(self) -> bool {
        !matches!(self, CutState::Unsaved | CutState::Claimed)
    }

    /// What an unsaved page is that was in this state of the pager at the cut. `None`: memory has its bytes.
    pub(crate) fn without_bytes(at_cut: PageState) -> Option<CutState> {
        match at_cut {
            PageState::Missing => Some(CutState::Missing),
            PageState::Removed => Some(CutState::Zero),
            PageState::Present | PageState::Poisoned => None,
        }
    }

    fn of(byte: u8) -> CutState {
        match byte {
            0 => CutState::Unsaved,
            1 => CutState::Claimed,
            2 => CutState::Saved,
            3 => CutState::Staged,
            4 => CutState::Missing,
            _ => CutState::Zero,
        }
    }
}

/// The states of all pages of a window.
#[derive(Debug)]
pub(crate) struct CutStates(PageBytes);

impl CutStates {
    /// States that are all `Unsaved`: see [`PageBytes::zeros`].
    ///
    /// # Errors
    /// As mmap(2).
    pub(crate) fn all_unsaved(pages: u64) -> io::Result<CutStates> {
        Ok(CutStates(PageBytes::zeros(pages as usize)?))
    }

    pub(crate) fn of(&self, page: u64) -> CutState {
        CutState::of(self.0.at(page).load(Ordering::Acquire))
    }

    /// Sets the state of a page: by the winner of its claim, or under the slice lock of a page that is not in the cut.
    pub(crate) fn set(&self, page: u64, state: CutState) {
        self.0.at(page).store(state as u8, Ordering::Release);
    }

    /// Claims a page. Returns whether the caller has it now, and has to copy it.
    pub(crate) fn claim(&self, page: u64) -> bool {
        self.replace(page, CutState::Unsaved, CutState::Claimed)
    }

    /// Notes that an unsaved page is not in the cut. A page that is copied is.
    pub(crate) fn exclude(&self, page: u64, as_what: CutState) {
        self.replace(page, CutState::Unsaved, as_what);
    }

    fn replace(&self, page: u64, from: CutState, to: CutState) -> bool {
        let (from, to) = (from as u8, to as u8);
        self.0.at(page).compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}
