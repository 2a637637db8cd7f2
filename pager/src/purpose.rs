//! The rules by which the states of pages change when they are filled. The model in `model.rs` runs by the same.

use crate::page_state::PageState;

/// Why pages are installed, and so which of them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// Content of the source, for pages that are missing. `fault_page` is the one somebody waits for.
    Load { fault_page: u64, zero: bool },
    /// Content of the source, for pages that are missing and that nobody has asked for.
    Populate,
    /// The same, for pages that will probably be asked for.
    Prefetch,
    /// Whatever its state, this page is answered: with zeros where nothing is.
    Answer { fault_page: u64 },
    /// Nothing of the slice can be had any more.
    PoisonMissing,
    /// This page cannot be had.
    Poison { fault_page: u64 },
}

impl Purpose {
    /// Whether a page in that state is to be filled.
    pub(crate) fn wants(self, state: PageState) -> bool {
        match self {
            Purpose::Load { .. } | Purpose::Populate | Purpose::Prefetch => {
                state == PageState::Missing
            }
            Purpose::PoisonMissing => matches!(state, PageState::Missing | PageState::Removed),
            // What was removed or brought while its load failed is not lost.
            Purpose::Poison { .. } => matches!(state, PageState::Missing | PageState::Poisoned),
            Purpose::Answer { .. } => true,
        }
    }

    /// What a page is that was filled.
    pub(crate) fn filled(self) -> PageState {
        match self {
            Purpose::Poison { .. } | Purpose::PoisonMissing => PageState::Poisoned,
            Purpose::Load { .. }
            | Purpose::Populate
            | Purpose::Prefetch
            | Purpose::Answer { .. } => PageState::Present,
        }
    }

    /// The page that somebody waits for.
    pub(crate) fn fault_page(self) -> Option<u64> {
        match self {
            Purpose::Populate | Purpose::Prefetch | Purpose::PoisonMissing => None,
            Purpose::Load { fault_page, .. }
            | Purpose::Answer { fault_page }
            | Purpose::Poison { fault_page } => Some(fault_page),
        }
    }
}

impl PageState {
    /// What a page is that was found in memory when it should have been filled.
    pub(crate) fn found(self) -> PageState {
        match self {
            // Answered before, by another fault on the same page: what it is, it stays.
            PageState::Present | PageState::Poisoned => self,
            PageState::Missing | PageState::Removed => PageState::Present,
        }
    }
}
