//! The steps of a window: memory is protected, cut and saved, and perhaps again.
//!
//! A window that tracks has one cut after the other. A page that is saved stays protected, so the blocks that a thread
//! has written since a cut are those that were noted. Only these are protected again, and read, for the next cut.

use std::ops::Range;
use std::thread;

use super::core::{Core, Protect, STEP_PAGES};
use super::error::WindowError;
use super::phase::Rounds;
use super::states::CutState;

/// Blocks that are left to the pause, and the rounds to get there.
const FEW_BLOCKS: usize = 64;
const ROUNDS: u32 = 4;
/// Blocks that are protected again while the lock is held: a write waits that long.
const LOCKED_BLOCKS: usize = 64;

impl Core {
    /// Protects all memory, while it is used: then again what was written meanwhile, until little is left.
    pub(crate) fn arm(&self, protect: &dyn Protect) -> Result<(), WindowError> {
        for extent in self.layout.extents() {
            let pages = extent.first_page..extent.end_page(self.layout.page_bytes());
            for first in pages.clone().step_by(STEP_PAGES as usize) {
                let step = first..(first + STEP_PAGES).min(pages.end);
                self.protect(protect, step.clone(), true)?;
                let open = self.check_open(&self.lock());
                // Otherwise the end comes after this step, and takes the protection away itself.
                if open.is_err() {
                    self.protect(protect, step, false)?;
                }
                open?;
            }
        }
        self.arm_again(protect)
    }

    /// Protects what was written, while it is used, until little is left.
    pub(crate) fn arm_again(&self, protect: &dyn Protect) -> Result<(), WindowError> {
        for _ in 0..ROUNDS {
            let mut from = 0;
            loop {
                let mut phase = self.lock();
                self.check_open(&phase)?;
                if from == 0 && phase.hot.len() <= FEW_BLOCKS {
                    return Ok(());
                }
                let batch: Vec<u64> =
                    phase.hot.range(from..).take(LOCKED_BLOCKS).copied().collect();
                let Some(last) = batch.last() else { break };
                from = last + 1;
                for block in &batch {
                    phase.hot.remove(block);
                }
                self.protect_blocks(protect, &batch)?;
            }
        }
        Ok(())
    }

    /// From now on, the bytes of each page are kept. The caller makes sure that no thread writes to memory during this
    /// call, and that the pager installs nothing.
    pub(crate) fn cut(&self, protect: &dyn Protect) -> Result<(), WindowError> {
        let mut phase = self.lock();
        // They copy pages of an earlier cut that has ended.
        while phase.rounds.copying > 0 {
            drop(phase);
            thread::yield_now();
            phase = self.lock();
        }
        self.check_open(&phase)?;
        if phase.cut {
            return Err(WindowError::ended("it has a cut that has not ended"));
        }
        let hot = phase.take_hot();
        self.protect_blocks(protect, &hot)?;
        // Of an earlier cut that was not saved.
        self.staging.clear();
        let unsaved = |page| self.states.set(page, CutState::Unsaved);
        match phase.begin_cut() {
            Some(blocks) => blocks.iter().flat_map(|first| self.block(*first)).for_each(unsaved),
            None if self.tracks => (0..self.layout.pages()).for_each(unsaved),
            // It is the first cut: they are unsaved.
            None => {}
        }
        Ok(())
    }

    /// The cut has ended, and pages may change again. If it was `saved`, the next one has only what is written from it
    /// on; otherwise it also has all that this one had.
    pub(crate) fn end_cut(&self, saved: bool) {
        self.lock().end_cut(saved);
        // Threads that wait for room look again, too.
        self.staging.clear();
        self.forget_stats();
    }

    /// The blocks of the cut, as ranges of pages; `None` if they are all. They are all that may differ from what was
    /// saved last.
    pub(crate) fn cut_blocks(&self) -> Option<Vec<Range<u64>>> {
        let phase = self.lock();
        let blocks = phase.rounds.cut.as_ref()?;
        Some(blocks.iter().map(|first| self.block(*first)).collect())
    }

    /// Whether memory was written, or loaded, since the last cut that was saved.
    pub(crate) fn is_written(&self) -> bool {
        let Rounds { written, cut, saved, .. } = &self.lock().rounds;
        !saved || !written.is_empty() || cut.is_some()
    }

    fn protect_blocks(&self, protect: &dyn Protect, blocks: &[u64]) -> Result<(), WindowError> {
        for run in blocks.chunk_by(|one, next| self.block(*one).end == *next) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            // Two extents of the source may have consecutive pages.
            for part in self.parts(*first..self.block(*last).end) {
                self.protect(protect, part, true)?;
            }
        }
        Ok(())
    }
}
