//! The state of the model: memory, the guest's threads, and what the threads of this crate know.

use super::setup::{Bug, Op, PAGES, Setup, ZERO, source};
use crate::install::page_state::PageState;
use crate::window::phase::Phase;
use crate::window::states::CutState;

/// How far the removal of a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Removing {
    Not,
    /// The event is queued. The thread continues after it was read.
    Queued,
    Read,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Guest {
    ops: &'static [Op],
    pub(super) done: usize,
    /// It waits for the answer to a fault.
    pub(super) waits: bool,
    pub(super) removing: Removing,
}

impl Guest {
    fn op(&self) -> Option<Op> {
        self.ops.get(self.done).copied()
    }
}

/// A message of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fault {
    Missing(usize),
    Write(usize),
}

/// Loads a page, as `SliceObserver` does: the page is filled, and then the window gets to know of it. Both are done with
/// the slice lock held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Loading {
    Look(usize),
    Filled(usize, PageState),
    Ended,
}

/// The thread that answers faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Demand {
    Idle,
    Load(Loading),
    /// As `Core::answer`, for this window. It may have copied pages already.
    Answer {
        page: usize,
        window: Option<u8>,
        copied: bool,
    },
    /// As `Core::stage`: the next page of the block that it looks at.
    Stage {
        page: usize,
        at: usize,
    },
    /// It has claimed this one, and reads it.
    Copy {
        page: usize,
        at: usize,
    },
    /// It has the bytes.
    Copied {
        page: usize,
        at: usize,
    },
    /// It waits for pages that the sweep has claimed.
    Wait {
        page: usize,
    },
}

/// Cuts of one window.
const CUTS: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// Protects the pages from this one on.
    Arm(usize),
    ArmAgain,
    Pause,
    Cut,
    Resume,
    /// Looks whether this page is in the save.
    List(usize),
    /// Reads the pages of the save from this one on. It has claimed the pages from `first` on.
    Claim {
        first: usize,
        at: usize,
    },
    Read {
        first: usize,
        at: usize,
        end: usize,
    },
    Unprotect {
        first: usize,
        end: usize,
    },
    SetSaved {
        at: usize,
        end: usize,
    },
    End {
        saved: bool,
    },
    Close,
    /// Makes the pages writable from this one on.
    Unprotecting(usize),
    Closed,
    Reset,
    Ended,
}

/// What it does next, and what it has seen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Saver {
    pub(super) step: Step,
    pub(super) cuts_left: usize,
    /// Windows that were opened.
    pub(super) windows: u8,
    /// How many more are opened, after a reset or without one.
    pub(super) again: usize,
    /// The pages of the save.
    pub(super) listed: [bool; PAGES],
    /// Their bytes.
    pub(super) read: [u8; PAGES],
    /// The memory of the cut.
    pub(super) expected: [u8; PAGES],
    /// The last save that has not failed; the source before the first.
    pub(super) image: [u8; PAGES],
}

impl Saver {
    pub(super) fn new(setup: &Setup) -> Saver {
        Saver {
            step: Step::Arm(0),
            cuts_left: if setup.tracks { CUTS } else { 1 },
            windows: 0,
            again: usize::from(setup.paged && !setup.tracks),
            listed: [false; PAGES],
            read: [0; PAGES],
            expected: [0; PAGES],
            image: [source(0), source(1)],
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.step == Step::Ended
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) memory: [Option<u8>; PAGES],
    pub(super) protected: [bool; PAGES],
    pub(super) faults: Vec<Fault>,
    pub(super) guests: Vec<Guest>,
    pub(super) paused: bool,
    /// The states of the pager. Without one, all pages are `Present`.
    pub(super) states: [PageState; PAGES],
    /// A thread holds the slice lock, to load a page.
    pub(super) slice_is_held: bool,
    /// The number of the window that is open.
    pub(super) window: Option<u8>,
    pub(super) phase: Phase,
    pub(super) cut_states: [CutState; PAGES],
    pub(super) copies: [Option<u8>; PAGES],
    pub(super) failed: bool,
    pub(super) demand: Demand,
    pub(super) populating: Loading,
    pub(super) saver: Saver,
}

impl World {
    pub(super) fn new(setup: &Setup) -> World {
        let guest =
            |ops: &&'static [Op]| Guest { ops, done: 0, waits: false, removing: Removing::Not };
        let (memory, state) = match setup.paged {
            true => ([None; PAGES], PageState::Missing),
            false => ([Some(ZERO); PAGES], PageState::Present),
        };
        World {
            memory,
            protected: [false; PAGES],
            faults: Vec::new(),
            guests: setup.guests.iter().map(guest).collect(),
            paused: false,
            states: [state; PAGES],
            slice_is_held: false,
            window: Some(0),
            phase: Phase::default(),
            cut_states: [CutState::Unsaved; PAGES],
            copies: [None; PAGES],
            failed: false,
            demand: Demand::Idle,
            populating: if setup.paged { Loading::Look(0) } else { Loading::Ended },
            saver: Saver::new(setup),
        }
    }

    /// Every state that one step of a thread leads to.
    pub(super) fn next(&self, setup: &Setup) -> Vec<World> {
        let mut next: Vec<World> =
            (0..self.guests.len()).filter_map(|guest| self.step_guest(guest)).collect();
        next.extend(self.step_demand(setup));
        next.extend(self.step_populating(setup));
        next.extend(self.step_saver(setup));
        next
    }

    pub(super) fn is_done(&self) -> bool {
        let loaded = matches!(self.populating, Loading::Look(PAGES) | Loading::Ended);
        self.guests.iter().all(|guest| guest.op().is_none()) && self.saver.has_ended() && loaded
    }

    /// A step of a thread of the guest, if it can make one.
    fn step_guest(&self, number: usize) -> Option<World> {
        let mut next = self.clone();
        let guest = &mut next.guests[number];
        if self.paused || guest.waits || guest.removing == Removing::Queued {
            return None;
        }
        match guest.op()? {
            Op::Write(page) => match self.memory[page] {
                None => {
                    guest.waits = true;
                    next.faults.push(Fault::Missing(page));
                }
                Some(_) if self.protected[page] => {
                    guest.waits = true;
                    next.faults.push(Fault::Write(page));
                }
                Some(_) => {
                    // A value that no other write has.
                    next.memory[page] = Some((10 * (number + 1) + guest.done) as u8);
                    guest.done += 1;
                }
            },
            Op::Remove(page) => match guest.removing {
                Removing::Read => {
                    guest.removing = Removing::Not;
                    guest.done += 1;
                    next.memory[page] = None;
                }
                // The state `Queued` is above.
                Removing::Not | Removing::Queued => guest.removing = Removing::Queued,
            },
        }
        Some(next)
    }

    /// The page whose removal was reported first.
    pub(super) fn queued_removal(&self) -> Option<(usize, usize)> {
        self.guests.iter().enumerate().find_map(|(number, guest)| match guest.op() {
            Some(Op::Remove(page)) if guest.removing == Removing::Queued => Some((number, page)),
            _ => None,
        })
    }

    /// A removal is in progress: the pause waits for the device that makes it.
    pub(super) fn is_removing(&self) -> bool {
        self.guests.iter().any(|guest| guest.removing != Removing::Not)
    }

    /// Threads that wait for this page try again. The kernel drops their messages if they were not read.
    pub(super) fn wake(&mut self, page: usize) {
        self.faults
            .retain(|fault| !matches!(fault, Fault::Missing(at) | Fault::Write(at) if *at == page));
        for guest in &mut self.guests {
            if guest.op() == Some(Op::Write(page)) {
                guest.waits = false;
            }
        }
    }

    pub(super) fn unprotect(&mut self, page: usize) {
        self.protected[page] = false;
        self.wake(page);
    }

    /// The first page of the block of a page.
    pub(super) fn block(setup: &Setup, page: usize) -> usize {
        if setup.one_block { 0 } else { page }
    }

    pub(super) fn pages_of(setup: &Setup, block: usize) -> std::ops::Range<usize> {
        if setup.one_block { 0..PAGES } else { block..block + 1 }
    }

    /// As `Core::installed`.
    pub(super) fn installed(&mut self, setup: &Setup, page: usize, from: PageState) {
        if self.phase.cut {
            self.changed(setup, page, from);
        }
        if (!self.phase.cut || setup.tracks) && setup.bug != Some(Bug::UnnotedLoad) {
            self.phase.note(World::block(setup, page) as u64);
        }
    }

    /// As `Core::removed`.
    pub(super) fn removed(&mut self, setup: &Setup, page: usize, from: PageState) {
        if self.phase.cut {
            self.changed(setup, page, from);
        }
        if setup.tracks {
            self.phase.note(World::block(setup, page) as u64);
        }
    }

    fn changed(&mut self, setup: &Setup, page: usize, from: PageState) {
        match CutState::without_bytes(from) {
            Some(state) => self.exclude(page, state),
            None if !self.cut_states[page].is_done() && setup.bug != Some(Bug::UnseenRemoval) => {
                assert!(setup.removes(), "page {page} is lost: {self:?}");
                self.failed = true;
                self.copies = [None; PAGES];
            }
            None => {}
        }
    }

    /// As `CutStates::exclude`.
    pub(super) fn exclude(&mut self, page: usize, state: CutState) {
        if self.cut_states[page] == CutState::Unsaved {
            self.cut_states[page] = state;
        }
    }

    /// As `CutStates::claim`.
    pub(super) fn claim(&mut self, page: usize) -> bool {
        let free = self.cut_states[page] == CutState::Unsaved;
        if free {
            self.cut_states[page] = CutState::Claimed;
        }
        free
    }
}
