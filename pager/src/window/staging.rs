//! Copies of pages that were about to be written and that the sweep has not reached. Their number is bounded.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::region::PAGE_BYTES;

#[derive(Debug)]
pub(crate) struct Staging {
    state: Mutex<State>,
    /// A copy was taken, or the window was closed.
    changed: Condvar,
    most_pages: usize,
}

#[derive(Debug, Default)]
struct State {
    copies: HashMap<u64, Box<[u8]>>,
    /// Pages that were admitted and are not here yet.
    admitted: usize,
    closed: bool,
    /// How often a thread has waited for room.
    waits: u64,
    /// Threads that wait for room now.
    waiting: usize,
}

impl Staging {
    /// There is room for one page at least.
    pub(crate) fn new(most_bytes: usize) -> Staging {
        let most_pages = (most_bytes / PAGE_BYTES).max(1);
        Staging { state: Mutex::default(), changed: Condvar::new(), most_pages }
    }

    /// Waits until there is room for that many pages, as long as they are `needed`. Returns whether they are admitted.
    /// They are not if they are not needed any more, or if the window is closed.
    pub(crate) fn admit(&self, pages: usize, needed: impl Fn() -> bool) -> bool {
        let mut state = self.lock();
        let full = |state: &State| state.copies.len() + state.admitted + pages > self.most_pages;
        if !state.closed && full(&state) && needed() {
            state.waits += 1;
            state.waiting += 1;
            let waits = |state: &mut State| !state.closed && full(state) && needed();
            state = self.changed.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        let admitted = !state.closed && !full(&state);
        if admitted {
            state.admitted += pages;
        }
        admitted
    }

    /// Pages may not be needed any more: threads that wait for room look again.
    pub(crate) fn look_again(&self) {
        // Under the lock, so that no thread is between its look and its wait.
        if self.lock().waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Whether copies of that many pages would not fit into the half of the room that blocks may use.
    pub(crate) fn is_short(&self, pages: usize) -> bool {
        let state = self.lock();
        2 * (state.copies.len() + state.admitted + pages) > self.most_pages
    }

    /// Gives back the room that was admitted and not used.
    pub(crate) fn dismiss(&self, pages: usize) {
        let mut state = self.lock();
        state.admitted -= pages;
        self.changed.notify_all();
    }

    /// Keeps a copy, in room that was admitted.
    pub(crate) fn put(&self, page: u64, bytes: Box<[u8]>) {
        let mut state = self.lock();
        state.admitted -= 1;
        if !state.closed {
            state.copies.insert(page, bytes);
        }
    }

    /// Takes a copy.
    pub(crate) fn take(&self, page: u64) -> Option<Box<[u8]>> {
        let bytes = self.lock().copies.remove(&page);
        self.changed.notify_all();
        bytes
    }

    /// Drops the copies. Threads that wait for room look again.
    pub(crate) fn clear(&self) {
        self.lock().copies.clear();
        self.changed.notify_all();
    }

    /// Ends all waits, now and later, and drops the copies.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.copies.clear();
        self.changed.notify_all();
    }

    /// How often a thread has waited for room.
    pub(crate) fn waits(&self) -> u64 {
        self.lock().waits
    }

    pub(crate) fn forget_waits(&self) {
        self.lock().waits = 0;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The data is consistent whenever the lock is released.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    fn page(byte: u8) -> Box<[u8]> {
        vec![byte; PAGE_BYTES].into()
    }

    #[test]
    fn a_full_store_waits_for_the_sweep_or_the_end() {
        let staging = Arc::new(Staging::new(2 * PAGE_BYTES));
        assert!(staging.admit(2, || true));
        (0..2).for_each(|number| staging.put(number, page(7)));
        let waiter = Arc::clone(&staging);
        let admitted = thread::spawn(move || waiter.admit(1, || true));
        while staging.waits() == 0 {
            thread::yield_now();
        }
        assert_eq!(staging.take(0), Some(page(7)));
        assert!(admitted.join().expect("no panic"));
        staging.dismiss(1);
        assert!(staging.admit(1, || true));
        let waiter = Arc::clone(&staging);
        let admitted = thread::spawn(move || waiter.admit(1, || true));
        while staging.waits() == 1 {
            thread::yield_now();
        }
        staging.close();
        assert!(!admitted.join().expect("no panic"));
        assert_eq!(staging.take(1), None);
    }

    #[test]
    fn a_thread_does_not_wait_for_pages_that_are_not_needed_any_more() {
        let staging = Staging::new(PAGE_BYTES);
        assert!(staging.admit(1, || true));
        assert!(!staging.admit(1, || false));
        let needed = AtomicBool::new(true);
        thread::scope(|scope| {
            let admitted = scope.spawn(|| staging.admit(1, || needed.load(Ordering::Relaxed)));
            while staging.waits() == 0 {
                thread::yield_now();
            }
            needed.store(false, Ordering::Relaxed);
            staging.look_again();
            assert!(!admitted.join().expect("no panic"));
        });
    }

    #[test]
    fn even_the_smallest_store_has_room_for_a_page() {
        let staging = Staging::new(0);
        assert!(staging.is_short(16) && staging.admit(1, || true));
        assert!(!Staging::new(32 * PAGE_BYTES).is_short(16));
    }
}
