//! The threads of a pager: one answers faults, and one loads pages before they are touched.

use super::setup::{Bug, PAGES, Setup, source};
use super::world::{Demand, Fault, Loading, Removing, World};
use crate::install::page_state::PageState;
use crate::window::states::CutState;

impl World {
    /// One step of loading a page, if it can be made. Returns whether the page is dealt with.
    fn load(&mut self, setup: &Setup, loading: &mut Loading) -> bool {
        match *loading {
            Loading::Look(page) => {
                if self.slice_is_held {
                    return false;
                }
                let from = self.states[page];
                if self.memory[page].is_some() {
                    *loading = Loading::Ended;
                    self.states[page] = match from {
                        // A removal was read, and the kernel has not dropped the page yet.
                        PageState::Removed => {
                            self.installed(setup, page, from);
                            PageState::Present
                        }
                        _ => from,
                    };
                    self.wake(page);
                    return true;
                }
                // The content of the source, or zeros.
                self.memory[page] = Some(if from == PageState::Missing { source(page) } else { 0 });
                self.protected[page] = false;
                self.wake(page);
                self.slice_is_held = setup.bug != Some(Bug::LoadInCut);
                *loading = Loading::Filled(page, from);
                true
            }
            Loading::Filled(page, from) => {
                self.installed(setup, page, from);
                self.states[page] = PageState::Present;
                self.slice_is_held = false;
                *loading = Loading::Ended;
                true
            }
            Loading::Ended => false,
        }
    }

    /// As `Loader::run`.
    pub(super) fn step_populating(&self, setup: &Setup) -> Option<World> {
        let mut next = self.clone();
        let mut loading = self.populating;
        let page = match loading {
            Loading::Look(PAGES) | Loading::Ended => return None,
            Loading::Look(page) | Loading::Filled(page, _) => page,
        };
        let looks = matches!(loading, Loading::Look(_)) && !self.slice_is_held;
        if looks && self.states[page] != PageState::Missing {
            // Another thread has loaded it, or it was removed.
            loading = Loading::Ended;
        } else if !next.load(setup, &mut loading) {
            return None;
        }
        if loading == Loading::Ended {
            loading = Loading::Look(page + 1);
        }
        next.populating = loading;
        Some(next)
    }

    /// As `Handler::serve_until_stopped`, and as the thread of a window of memory without a pager.
    pub(super) fn step_demand(&self, setup: &Setup) -> Option<World> {
        let mut next = self.clone();
        next.demand = match self.demand {
            Demand::Idle => next.receive(setup)?,
            Demand::Load(mut loading) => match next.load(setup, &mut loading) {
                true if loading == Loading::Ended => Demand::Idle,
                true => Demand::Load(loading),
                false => return None,
            },
            Demand::Answer { page, window, copied } => next.answer(setup, page, window, copied),
            Demand::Stage { page, at } if at == next.answered(setup, page).end => {
                Demand::Wait { page }
            }
            Demand::Stage { page, at } => match self.needs(setup, at) && next.claim(at) {
                true => Demand::Copy { page, at },
                false => Demand::Stage { page, at: at + 1 },
            },
            Demand::Copy { page, at } => {
                let ended = self.failed || self.phase.closed;
                next.copies[at] = if ended { None } else { self.memory[at].or(Some(0)) };
                Demand::Copied { page, at }
            }
            Demand::Copied { page, at } => {
                next.cut_states[at] = CutState::Staged;
                Demand::Stage { page, at: at + 1 }
            }
            Demand::Wait { page } => {
                let claimed = |at: usize| self.cut_states[at] == CutState::Claimed;
                let ignores = setup.bug == Some(Bug::ClaimedIsSaved);
                if !ignores && self.answered(setup, page).any(claimed) {
                    return None;
                }
                Demand::Answer { page, window: self.window, copied: true }
            }
        };
        Some(next)
    }

    /// Reads a message. An event comes before faults.
    fn receive(&mut self, setup: &Setup) -> Option<Demand> {
        if let Some((guest, page)) = self.queued_removal() {
            if self.slice_is_held {
                return None;
            }
            let from = self.states[page];
            if self.window.is_some() {
                self.removed(setup, page, from);
            }
            self.states[page] = PageState::Removed;
            self.guests[guest].removing = Removing::Read;
            return Some(Demand::Idle);
        }
        // Without a pager, the thread ends with the window.
        if self.faults.is_empty() || !(self.window.is_some() || setup.paged) {
            return None;
        }
        Some(match self.faults.remove(0) {
            Fault::Missing(page) => Demand::Load(Loading::Look(page)),
            Fault::Write(page) => Demand::Answer { page, window: self.window, copied: false },
        })
    }

    /// The pages that become writable by the answer to a write.
    fn answered(&self, setup: &Setup, page: usize) -> std::ops::Range<usize> {
        match setup.short {
            true => page..page + 1,
            false => World::pages_of(setup, World::block(setup, page)),
        }
    }

    /// As `Core::needs`, of one page.
    fn needs(&self, setup: &Setup, page: usize) -> bool {
        let done = match self.cut_states[page] {
            CutState::Claimed if setup.bug == Some(Bug::ClaimedIsSaved) => true,
            state => state.is_done(),
        };
        !done && self.states[page] == PageState::Present
    }

    /// A thread answers a write for a window that is not open any more.
    pub(super) fn has_stale_answer(&self) -> bool {
        match self.demand {
            Demand::Idle | Demand::Load(_) => false,
            Demand::Answer { window, .. } => window != self.window,
            _ => self.window.is_none(),
        }
    }

    /// The window ends, and another one is opened. A thread that answers a write has that one no longer.
    pub(super) fn forget_window(&mut self) {
        if let Demand::Stage { page, .. }
        | Demand::Copy { page, .. }
        | Demand::Copied { page, .. }
        | Demand::Wait { page } = self.demand
        {
            self.demand = Demand::Answer { page, window: None, copied: false };
        }
    }

    /// As `Core::answer`, from where it has the lock of the phase.
    fn answer(&mut self, setup: &Setup, page: usize, window: Option<u8>, copied: bool) -> Demand {
        let block = self.answered(setup, page);
        if window.is_none() || window != self.window {
            // No window, or one that is closed.
            block.for_each(|at| self.unprotect(at));
            return Demand::Idle;
        }
        if copied {
            self.phase.rounds.copying -= 1;
        }
        let needed = self.phase.cut && !self.phase.closed && !self.failed;
        if needed
            && block.clone().any(|at| self.needs(setup, at))
            && setup.bug != Some(Bug::WriteBeforeCopy)
        {
            self.phase.rounds.copying += 1;
            return Demand::Stage { page, at: block.start };
        }
        let unnoted = self.phase.cut && setup.bug == Some(Bug::UnnotedWrite);
        if self.phase.notes(setup.tracks) && !unnoted {
            self.phase.note(World::block(setup, page) as u64);
        }
        block.for_each(|at| self.unprotect(at));
        Demand::Idle
    }
}
