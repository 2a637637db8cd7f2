//! Where a pager keeps its window, and what the pager's threads report to it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::core::Core;
use super::error::WindowError;
use crate::install::page_state::PageState;

/// The window of a pager, if it has one.
#[derive(Debug, Default)]
pub(crate) struct WindowSlot {
    /// A copy of whether there is one, for threads that hold a slice lock. It changes while all of these are held.
    present: AtomicBool,
    /// Threads that answer a write, for the window that they have found.
    answering: AtomicUsize,
    state: Mutex<SlotState>,
    /// A window was closed, or a release has ended.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct SlotState {
    core: Option<Arc<Core>>,
    release: Release,
    /// The pager, or a thread of it, has ended: not all write faults would be answered.
    ended: bool,
}

/// Whether the pager has let the memory go, after all of it was loaded.
#[derive(Debug, Default, PartialEq, Eq)]
enum Release {
    #[default]
    No,
    /// It unregisters the memory now. Until then another userfaultfd cannot have it.
    Going,
    Done,
}

impl WindowSlot {
    /// Reserves the slot for a window. While the pager lets the memory go, it waits for the result.
    ///
    /// # Errors
    /// [`WindowError::Released`], [`WindowError::Ended`] or [`WindowError::Busy`].
    pub(super) fn reserve(&self, core: &Arc<Core>) -> Result<(), WindowError> {
        let going = |state: &mut SlotState| state.release == Release::Going;
        let mut state = self.wait_while(going);
        match &*state {
            SlotState { release: Release::Done, .. } => Err(WindowError::Released),
            SlotState { ended: true, .. } => Err(WindowError::ended("the pager has ended")),
            SlotState { core: Some(_), .. } => Err(WindowError::Busy),
            _ => {
                state.core = Some(Arc::clone(core));
                Ok(())
            }
        }
    }

    /// Shows the window to the pager's threads, if it still has the slot. The caller holds all slice locks.
    pub(super) fn present(&self, core: &Arc<Core>) -> Result<(), WindowError> {
        match self.lock().has(core) {
            true => {
                self.present.store(true, Ordering::SeqCst);
                Ok(())
            }
            false => Err(WindowError::ended("the pager has ended")),
        }
    }

    /// Empties the slot, if the window still has it. The caller holds all slice locks.
    pub(super) fn clear(&self, core: &Arc<Core>) {
        let mut state = self.lock();
        if state.has(core) {
            self.present.store(false, Ordering::SeqCst);
            state.core = None;
            self.changed.notify_all();
        }
    }

    /// From now on, no window is opened. Returns the one that is open, or is being opened.
    pub(super) fn end(&self) -> Option<Arc<Core>> {
        let mut state = self.lock();
        state.ended = true;
        state.core.clone()
    }

    /// The window, in a thread that holds a slice lock.
    pub(crate) fn get(&self) -> Option<Arc<Core>> {
        match self.present.load(Ordering::SeqCst) {
            false => None,
            true => self.lock().core.clone(),
        }
    }

    /// The window, for the answer to a write. Until the result is dropped, no other window protects memory.
    pub(super) fn answering(&self) -> Answering<'_> {
        self.answering.fetch_add(1, Ordering::SeqCst);
        Answering { slot: self, core: self.get() }
    }

    /// Waits for the threads that answer a write for an earlier window, or for none: they make a page writable, and this
    /// window would not note it. It is called after [`WindowSlot::present`] and before memory is protected. So they do not
    /// wait for a save, and no others follow.
    pub(super) fn wait_for_answers(&self) {
        while self.answering.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.lock().core.is_some()
    }

    /// Before the pager lets the memory go: waits until no window is open, and delays the next one until
    /// [`WindowSlot::released`].
    pub(crate) fn refuse(&self) {
        self.wait_while(|state| state.core.is_some()).release = Release::Going;
    }

    /// The pager has let the memory go, or could not.
    pub(crate) fn released(&self, done: bool) {
        self.lock().release = if done { Release::Done } else { Release::No };
        self.changed.notify_all();
    }

    fn wait_while(
        &self,
        condition: impl FnMut(&mut SlotState) -> bool,
    ) -> MutexGuard<'_, SlotState> {
        self.changed.wait_while(self.lock(), condition).unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, SlotState> {
        // The data is consistent whenever the lock is released.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread answers a write.
pub(super) struct Answering<'a> {
    slot: &'a WindowSlot,
    /// The window that was open when it began.
    pub(super) core: Option<Arc<Core>>,
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.slot.answering.fetch_sub(1, Ordering::SeqCst);
    }
}

impl SlotState {
    fn has(&self, core: &Arc<Core>) -> bool {
        self.core.as_ref().is_some_and(|own| Arc::ptr_eq(own, core))
    }
}

/// What it means for the window that a page was installed, also in the state that it has, or is given back. The caller holds the slice lock, and sets the state after it.
pub(crate) fn page_moved(core: &Core, page: u64, from: PageState, to: PageState) {
    match to {
        PageState::Removed => core.removed(page, from),
        PageState::Present | PageState::Poisoned => core.installed(page, from),
        PageState::Missing => {}
    }
    fence(Ordering::Release);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::layout::Layout;
    use crate::window::WindowOptions;

    fn core() -> Arc<Core> {
        let read = Arc::new(|_, _: &mut [u8]| Ok(()));
        let core = Core::new(Layout::cut(&[], 1), read, WindowOptions::default());
        Arc::new(core.expect("no pages"))
    }

    /// While the memory is being unregistered, another userfaultfd would get `EBUSY`.
    #[test]
    fn a_window_waits_for_a_release_that_has_begun() {
        for done in [false, true] {
            let slot = WindowSlot::default();
            slot.refuse();
            thread::scope(|scope| {
                let reserved = scope.spawn(|| slot.reserve(&core()));
                thread::sleep(Duration::from_millis(20));
                assert!(!reserved.is_finished());
                slot.released(done);
                match reserved.join().expect("no panic") {
                    Err(WindowError::Released) => assert!(done),
                    reserved => assert!(reserved.is_ok() && !done),
                }
            });
        }
    }

    #[test]
    fn a_release_waits_for_the_window() {
        let (slot, core) = (WindowSlot::default(), core());
        slot.reserve(&core).expect("it is free");
        assert!(matches!(slot.reserve(&core), Err(WindowError::Busy)));
        thread::scope(|scope| {
            let refused = scope.spawn(|| slot.refuse());
            thread::sleep(Duration::from_millis(20));
            assert!(!refused.is_finished());
            slot.clear(&self::core());
            assert!(slot.lock().core.is_some(), "another window clears only itself");
            slot.clear(&core);
        });
        assert_eq!(slot.lock().release, Release::Going);
    }

    /// Such a thread makes a page writable in the end, without a note in the new window.
    #[test]
    fn a_window_waits_for_answers_of_the_one_before() {
        let (slot, old, new) = (WindowSlot::default(), core(), core());
        slot.reserve(&old).expect("it is free");
        slot.present(&old).expect("it has the slot");
        let answering = slot.answering();
        assert!(answering.core.as_ref().is_some_and(|core| Arc::ptr_eq(core, &old)));
        slot.clear(&old);
        slot.reserve(&new).expect("it is free");
        slot.present(&new).expect("it has the slot");
        thread::scope(|scope| {
            let waited = scope.spawn(|| slot.wait_for_answers());
            thread::sleep(Duration::from_millis(20));
            assert!(!waited.is_finished());
            drop(answering);
        });
        assert!(slot.answering().core.as_ref().is_some_and(|core| Arc::ptr_eq(core, &new)));
        slot.wait_for_answers();
    }

    /// The pager may end between the two steps of opening a window.
    #[test]
    fn no_window_opens_after_the_end() {
        let (slot, core) = (WindowSlot::default(), core());
        slot.reserve(&core).expect("it is free");
        assert!(slot.end().is_some());
        slot.clear(&core);
        assert!(matches!(slot.present(&core), Err(WindowError::Ended { .. })));
        assert!(slot.get().is_none());
        assert!(matches!(slot.reserve(&core), Err(WindowError::Ended { .. })));
        slot.released(true);
        assert!(matches!(slot.reserve(&core), Err(WindowError::Released)));
    }
}
