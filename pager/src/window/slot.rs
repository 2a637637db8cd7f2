//! Where a pager keeps its window, and what the pager's threads report to it.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::core::Core;
use crate::install::page_state::PageState;

/// The window of a pager, if it has one.
#[derive(Debug, Default)]
pub(crate) struct WindowSlot {
    /// A copy of whether there is one, for threads that hold a slice lock. It changes while all of these are held.
    pub(super) present: AtomicBool,
    state: Mutex<SlotState>,
    pub(super) closed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct SlotState {
    pub(super) core: Option<Arc<Core>>,
    /// The pager has let the memory go, or is about to.
    pub(super) released: bool,
}

impl WindowSlot {
    pub(super) fn lock(&self) -> MutexGuard<'_, SlotState> {
        // The data is consistent whenever the lock is released.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The window, in a thread that holds a slice lock or answers a write fault.
    pub(crate) fn get(&self) -> Option<Arc<Core>> {
        match self.present.load(Ordering::SeqCst) {
            false => None,
            true => self.lock().core.clone(),
        }
    }

    /// Lets no window be opened from now on, after the one that is open was closed.
    pub(crate) fn refuse(&self) {
        let state = self.lock();
        let open = |state: &mut SlotState| state.core.is_some();
        let mut state = self.closed.wait_while(state, open).unwrap_or_else(PoisonError::into_inner);
        state.released = true;
    }
}

/// What a change of a page's state means for the window. The caller holds the slice lock, and sets the state after it.
pub(crate) fn page_moved(core: &Core, page: u64, from: PageState, to: PageState) {
    let was_missing = from == PageState::Missing;
    match to {
        PageState::Removed => core.removed(page, was_missing),
        PageState::Present | PageState::Poisoned => core.installed(page, was_missing),
        PageState::Missing => {}
    }
    fence(Ordering::Release);
}
