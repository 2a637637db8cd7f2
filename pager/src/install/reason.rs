//! Why pages are installed, and how their states change by that. The model in `model.rs` uses the same rules.

use crate::install::page_state::PageState;

/// Why pages are installed. This decides which of them are wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum InstallReason {
    /// Missing pages get the content of the source. A thread waits for `fault_page`.
    Load { fault_page: u64, zero: bool },
    /// The background population fills missing pages from the source.
    Populate,
    /// The prefetch fills missing pages from the source.
    Prefetch,
    /// This page was in memory before. It is filled with zeros if it is not now.
    FillZero { fault_page: u64 },
    /// Faults of the slice can no longer be served.
    PoisonMissing,
    /// This page cannot be loaded.
    Poison { fault_page: u64 },
}

impl InstallReason {
    /// Whether a page in this state shall be filled.
    pub(crate) fn wants(self, state: PageState) -> bool {
        match self {
            InstallReason::Load { .. } | InstallReason::Populate | InstallReason::Prefetch => {
                state == PageState::Missing
            }
            InstallReason::PoisonMissing => {
                matches!(state, PageState::Missing | PageState::Removed)
            }
            // A page that was removed or installed while its load failed is not lost.
            InstallReason::Poison { .. } => {
                matches!(state, PageState::Missing | PageState::Poisoned)
            }
            // A page that was put back to missing meanwhile has the content of the source.
            InstallReason::FillZero { .. } => state != PageState::Missing,
        }
    }

    /// The state of a page after it was filled.
    pub(crate) fn filled(self) -> PageState {
        match self {
            InstallReason::Poison { .. } | InstallReason::PoisonMissing => PageState::Poisoned,
            InstallReason::Load { .. }
            | InstallReason::Populate
            | InstallReason::Prefetch
            | InstallReason::FillZero { .. } => PageState::Present,
        }
    }

    /// The page that a thread waits for.
    pub(crate) fn fault_page(self) -> Option<u64> {
        match self {
            InstallReason::Populate | InstallReason::Prefetch | InstallReason::PoisonMissing => {
                None
            }
            InstallReason::Load { fault_page, .. }
            | InstallReason::FillZero { fault_page }
            | InstallReason::Poison { fault_page } => Some(fault_page),
        }
    }
}

impl PageState {
    /// The state of a page that was found in memory when it should have been filled.
    pub(crate) fn found(self) -> PageState {
        match self {
            // Another fault on the same page was answered before: the state stays.
            PageState::Present | PageState::Poisoned => self,
            PageState::Missing | PageState::Removed => PageState::Present,
        }
    }
}
