//! What is explored: a guest and a window, perhaps with a mistake in the code.

pub(super) const PAGES: usize = 2;
pub(super) const ZERO: u8 = 0;

/// What the source has for a page.
pub(super) fn source(page: usize) -> u8 {
    100 + page as u8
}

/// What a thread of the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Op {
    Write(usize),
    Remove(usize),
}

/// The guest and the window that are explored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    /// The window has one cut after the other.
    pub(super) tracks: bool,
    /// The memory has a pager, which has loaded nothing.
    pub(super) paged: bool,
    /// Both pages are in one block.
    pub(super) one_block: bool,
    /// Copies are short: a write copies its own page only.
    pub(super) short: bool,
    /// What the guest's threads do.
    pub(super) guests: &'static [&'static [Op]],
    /// A mistake in the code.
    pub(super) bug: Option<Bug>,
}

/// Mistakes that the model has to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bug {
    /// A page becomes writable before it is copied.
    WriteBeforeCopy,
    /// The sweep makes a page writable before it has read it.
    WriteBeforeRead,
    /// A page that the sweep has claimed, and not read yet, counts as saved.
    ClaimedIsSaved,
    /// A write after the cut is not noted for the next one.
    UnnotedWrite,
    /// A page that is loaded is not noted.
    UnnotedLoad,
    /// A page is loaded while the cut is taken.
    LoadInCut,
    /// The next cut does not wait for copies of the last one.
    CutDuringCopy,
    /// The blocks of a save that has failed are not in the next one.
    ForgottenFailure,
    /// Memory is reset between two cuts of one window.
    ResetInWindow,
    /// A removal after the cut does not fail the save.
    UnseenRemoval,
    /// The end of the window leaves pages protected, and has no thread that answers.
    ProtectedAtEnd,
    /// A window is opened while a thread still answers a write for the one before.
    StaleAnswer,
}

impl Setup {
    /// Whether pages are given back, which may fail a save.
    pub(super) fn removes(&self) -> bool {
        self.guests.iter().any(|ops| ops.iter().any(|op| matches!(op, Op::Remove(_))))
    }
}
