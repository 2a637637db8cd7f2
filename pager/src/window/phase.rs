//! In which step a window is, and which blocks were written.

use std::collections::BTreeSet;

/// The steps of a window. A write before the cut is noted, and one after the cut is preceded by a copy.
#[derive(Debug, Default)]
pub(super) struct Phase {
    /// Pages have to be kept as they were at the cut.
    pub(super) cut: bool,
    pub(super) closed: bool,
    /// First pages of the blocks that are not protected. It is of no use after the last cut.
    pub(super) hot: BTreeSet<u64>,
    pub(super) rounds: Rounds,
}

/// What a window that tracks knows of its cuts.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    /// First pages of the blocks that were written, or loaded, since the last cut.
    pub(super) written: BTreeSet<u64>,
    /// First pages of the blocks that may differ from what was saved last. `None`: all may, because nothing was saved.
    pub(super) cut: Option<BTreeSet<u64>>,
    /// Something was saved.
    pub(super) saved: bool,
    /// Threads that copy pages of the cut.
    pub(super) copying: usize,
}

impl Phase {
    /// A block is not protected from now on.
    pub(super) fn note(&mut self, first_page: u64) {
        self.hot.insert(first_page);
        self.rounds.written.insert(first_page);
    }
}
