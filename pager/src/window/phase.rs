//! In which step a window is, and which blocks were written.

use std::collections::BTreeSet;

/// The steps of a window. A write before the cut is noted, and one after the cut is preceded by a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Phase {
    /// Pages have to be kept as they were at the cut.
    pub(super) cut: bool,
    pub(super) closed: bool,
    /// First pages of the blocks that are not protected. It is of no use after the last cut.
    pub(super) hot: BTreeSet<u64>,
    pub(super) rounds: Rounds,
}

/// What a window that tracks knows of its cuts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
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
    /// Whether a write to a protected page is noted when it is let through. After the last cut it is of no use.
    pub(super) fn notes(&self, tracks: bool) -> bool {
        !self.closed && (!self.cut || tracks)
    }

    /// The blocks that are to be protected again. They are hot no longer.
    pub(super) fn take_hot(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.hot).into_iter().collect()
    }

    /// Begins a cut, when all memory is protected. Returns the blocks whose pages are unsaved in it. `None`: all pages
    /// are.
    pub(super) fn begin_cut(&mut self) -> Option<&BTreeSet<u64>> {
        self.cut = true;
        let Rounds { written, cut, saved, .. } = &mut self.rounds;
        let written = std::mem::take(written);
        saved.then(|| {
            let blocks = cut.get_or_insert_default();
            blocks.extend(written);
            &*blocks
        })
    }

    /// Ends a cut. If it was not `saved`, its blocks are those of the next one, too.
    pub(super) fn end_cut(&mut self, saved: bool) {
        self.cut = false;
        if saved {
            self.rounds.saved = true;
            self.rounds.cut = None;
        }
    }

    /// A block is not protected from now on.
    pub(super) fn note(&mut self, first_page: u64) {
        self.hot.insert(first_page);
        self.rounds.written.insert(first_page);
    }
}
