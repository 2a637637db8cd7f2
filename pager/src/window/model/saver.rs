//! The thread that opens the window, cuts, saves, and resets the guest.

use super::setup::{Bug, PAGES, Setup, source};
use super::world::{Demand, Saver, Step, World};
use crate::install::page_state::PageState;
use crate::window::phase::Phase;
use crate::window::states::CutState;

impl World {
    /// All steps that it can make now.
    pub(super) fn step_saver(&self, setup: &Setup) -> Vec<World> {
        let after = |step: Step| {
            let mut next = self.clone();
            next.saver.step = step;
            next
        };
        match self.saver.step {
            // The answers of the window before are waited for.
            Step::Arm(0) if self.has_stale_answer() && setup.bug != Some(Bug::StaleAnswer) => {
                Vec::new()
            }
            Step::Arm(PAGES) => vec![after(Step::ArmAgain)],
            Step::Arm(page) => {
                let mut next = after(Step::Arm(page + 1));
                next.protected[page] = true;
                vec![next]
            }
            Step::ArmAgain => {
                // It is done only if enough was written.
                let mut next = after(Step::Pause);
                next.protect_hot(setup);
                vec![next, after(Step::Pause)]
            }
            Step::Pause if self.is_removing() => Vec::new(),
            Step::Pause => {
                let mut next = after(Step::Cut);
                next.paused = true;
                vec![next]
            }
            Step::Cut => self.cut(setup, after(Step::Resume)).into_iter().collect(),
            Step::Resume => {
                let mut next = after(Step::List(0));
                next.paused = false;
                vec![next]
            }
            // The save may be cancelled.
            Step::List(PAGES) => {
                vec![after(Step::Claim { first: 0, at: 0 }), after(Step::End { saved: false })]
            }
            Step::List(_) if self.slice_is_held => Vec::new(),
            Step::List(page) => {
                let mut next = after(Step::List(page + 1));
                next.list(setup, page);
                vec![next]
            }
            Step::End { saved } => {
                let mut next = after(Step::Close);
                next.end_cut(setup, saved && !self.failed);
                vec![next]
            }
            Step::Closed if self.saver.again == 0 => vec![after(Step::Ended)],
            Step::Closed => {
                let mut next = after(Step::Arm(0));
                next.reopen(setup);
                vec![next, after(Step::Reset)]
            }
            Step::Close | Step::Unprotecting(_) | Step::Reset => {
                self.close(setup, after).into_iter().collect()
            }
            Step::Ended => Vec::new(),
            Step::Claim { first, at } if first == at && self.failed => {
                vec![after(Step::End { saved: false })]
            }
            _ => self.sweep(setup, after).into_iter().collect(),
        }
    }

    /// As `Core::protect_blocks`, of the hot blocks.
    fn protect_hot(&mut self, setup: &Setup) {
        for block in self.phase.take_hot() {
            World::pages_of(setup, block as usize).for_each(|page| self.protected[page] = true);
        }
    }

    /// As `Window::cut`.
    fn cut(&self, setup: &Setup, mut next: World) -> Option<World> {
        let copies = self.phase.rounds.copying > 0 && setup.bug != Some(Bug::CutDuringCopy);
        if self.slice_is_held || copies {
            return None;
        }
        if self.failed {
            next.saver.step = Step::Close;
            next.paused = false;
            return Some(next);
        }
        next.protect_hot(setup);
        next.copies = [None; PAGES];
        let blocks = next.phase.begin_cut().cloned();
        for page in 0..PAGES {
            let block = World::block(setup, page) as u64;
            if blocks.as_ref().is_none_or(|blocks| blocks.contains(&block)) {
                next.cut_states[page] = CutState::Unsaved;
            }
            next.saver.expected[page] = match self.states[page] {
                PageState::Missing => self.memory[page].unwrap_or(source(page)),
                PageState::Removed => 0,
                PageState::Present | PageState::Poisoned => self.memory[page].unwrap_or(0),
            };
        }
        next.saver.listed = [false; PAGES];
        next.saver.cuts_left -= 1;
        Some(next)
    }

    /// As `own_pages` and `own_blocks`.
    fn list(&mut self, setup: &Setup, page: usize) {
        let state = self.states[page];
        if state == PageState::Removed {
            self.exclude(page, CutState::Zero);
        }
        let own = state != PageState::Missing && self.cut_states[page] != CutState::Missing;
        let blocks = self.phase.rounds.cut.as_ref();
        let block = World::block(setup, page) as u64;
        self.saver.listed[page] = own && blocks.is_none_or(|blocks| blocks.contains(&block));
    }

    /// As `Core::read`, of all listed pages in turn.
    fn sweep(&self, setup: &Setup, after: impl Fn(Step) -> World) -> Option<World> {
        Some(match self.saver.step {
            Step::Claim { first, at } => {
                let mut next = after(Step::Claim { first, at: at + 1 });
                let wanted = at < PAGES && self.saver.listed[at];
                if wanted && next.claim(at) {
                    return Some(next);
                }
                next.saver.step = match first < at {
                    // First the pages that are claimed.
                    true if setup.bug == Some(Bug::WriteBeforeRead) => {
                        (first..at).for_each(|page| next.unprotect(page));
                        Step::Read { first, at: first, end: at }
                    }
                    true => Step::Read { first, at: first, end: at },
                    false if at == PAGES => Step::End { saved: true },
                    false if !wanted => Step::Claim { first: at + 1, at: at + 1 },
                    false => {
                        return self.take(at, after(Step::Claim { first: at + 1, at: at + 1 }));
                    }
                };
                next
            }
            Step::Read { first, at, end } if at == end => after(Step::Unprotect { first, end }),
            Step::Read { first, at, end } => {
                let mut next = after(Step::Read { first, at: at + 1, end });
                next.saver.read[at] = self.memory[at].unwrap_or(0);
                next
            }
            Step::Unprotect { first, end } => {
                let mut next = after(Step::SetSaved { at: first, end });
                if !setup.tracks {
                    (first..end).for_each(|page| next.unprotect(page));
                }
                next
            }
            Step::SetSaved { at, end } if at == end => after(Step::Claim { first: end, at: end }),
            Step::SetSaved { at, end } => {
                let mut next = after(Step::SetSaved { at: at + 1, end });
                next.cut_states[at] = CutState::Saved;
                next
            }
            _ => return None,
        })
    }

    /// As `Core::take`.
    fn take(&self, page: usize, mut next: World) -> Option<World> {
        match self.cut_states[page] {
            CutState::Claimed => return None,
            CutState::Staged => match next.copies[page].take() {
                Some(byte) => {
                    next.saver.read[page] = byte;
                    next.cut_states[page] = CutState::Saved;
                }
                None => {
                    assert!(self.failed, "the copy of page {page} is lost: {self:?}");
                    next.saver.step = Step::End { saved: false };
                }
            },
            CutState::Zero => next.saver.read[page] = 0,
            CutState::Unsaved | CutState::Saved | CutState::Missing => {
                panic!("page {page} cannot be read: {self:?}");
            }
        }
        Some(next)
    }

    /// As `Core::end_cut`. A save that has not failed is checked.
    fn end_cut(&mut self, setup: &Setup, saved: bool) {
        if saved {
            let Saver { listed, read, expected, image, .. } = &mut self.saver;
            (0..PAGES).filter(|&page| listed[page]).for_each(|page| image[page] = read[page]);
            let right = image == expected;
            assert!(right, "the save is not the memory of the cut: {self:?}");
        }
        self.phase.end_cut(saved || setup.bug == Some(Bug::ForgottenFailure));
        self.copies = [None; PAGES];
        if setup.tracks && self.saver.cuts_left > 0 && !self.failed {
            self.saver.step = Step::ArmAgain;
            if setup.bug == Some(Bug::ResetInWindow) && setup.paged {
                self.saver.step = Step::Reset;
            }
        }
    }

    /// As `Window::drop`, and then as `Pager::reset`.
    fn close(&self, setup: &Setup, after: impl Fn(Step) -> World) -> Option<World> {
        match self.saver.step {
            Step::Close => {
                let mut next = after(Step::Unprotecting(0));
                next.phase.closed = true;
                next.copies = [None; PAGES];
                Some(next)
            }
            Step::Unprotecting(PAGES) => {
                let ended = !setup.paged && !matches!(self.demand, Demand::Idle);
                // Without a pager, the thread ends first. With one, all slice locks are taken.
                (!self.slice_is_held && !ended).then(|| {
                    let mut next = after(Step::Closed);
                    (next.window, next.saver.windows) = (None, self.saver.windows + 1);
                    next
                })
            }
            Step::Unprotecting(page) => {
                let mut next = after(Step::Unprotecting(page + 1));
                let writable = matches!(self.cut_states[page], CutState::Saved | CutState::Staged);
                if (setup.tracks || !writable || self.failed)
                    && setup.bug != Some(Bug::ProtectedAtEnd)
                {
                    next.unprotect(page);
                }
                Some(next)
            }
            // No vCPU runs. A thread of the pager may be about to answer a fault.
            Step::Reset if self.slice_is_held || self.is_removing() => None,
            Step::Reset => {
                let mut next = after(Step::ArmAgain);
                (next.memory, next.states) = ([None; PAGES], [PageState::Missing; PAGES]);
                if self.window.is_none() {
                    next.reopen(setup);
                }
                Some(next)
            }
            _ => None,
        }
    }

    /// Opens another window.
    fn reopen(&mut self, setup: &Setup) {
        let Saver { again, windows, .. } = self.saver;
        self.saver = Saver { again: again - 1, windows, ..Saver::new(setup) };
        self.forget_window();
        (self.window, self.failed, self.phase) = (Some(windows), false, Phase::default());
        self.cut_states = [CutState::Unsaved; PAGES];
    }
}
