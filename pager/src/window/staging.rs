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
}

impl Staging {
    pub(crate) fn new(most_bytes: usize) -> Staging {
        let most_pages = most_bytes / PAGE_BYTES;
        Staging { state: Mutex::default(), changed: Condvar::new(), most_pages }
    }

    /// Waits until there is room for that many pages. Returns `false` if the window is closed, and admits nothing.
    pub(crate) fn admit(&self, pages: usize) -> bool {
        let full = |state: &mut State| {
            !state.closed && state.copies.len() + state.admitted + pages > self.most_pages
        };
        let mut state = self.lock();
        if full(&mut state) {
            state.waits += 1;
            state = self.changed.wait_while(state, full).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.closed {
            state.admitted += pages;
        }
        !state.closed
    }

    /// Whether more than half of the room is used.
    pub(crate) fn is_short(&self) -> bool {
        let state = self.lock();
        2 * (state.copies.len() + state.admitted) > self.most_pages
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

    fn lock(&self) -> MutexGuard<'_, State> {
        // The data is consistent whenever the lock is released.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    fn page(byte: u8) -> Box<[u8]> {
        vec![byte; PAGE_BYTES].into()
    }

    #[test]
    fn a_full_store_waits_for_the_sweep_or_the_end() {
        let staging = Arc::new(Staging::new(2 * PAGE_BYTES));
        assert!(staging.admit(2));
        (0..2).for_each(|number| staging.put(number, page(7)));
        let waiter = Arc::clone(&staging);
        let admitted = thread::spawn(move || waiter.admit(1));
        while staging.waits() == 0 {
            thread::yield_now();
        }
        assert_eq!(staging.take(0), Some(page(7)));
        assert!(admitted.join().expect("no panic"));
        staging.dismiss(1);
        assert!(staging.admit(1));
        let waiter = Arc::clone(&staging);
        let admitted = thread::spawn(move || waiter.admit(1));
        while staging.waits() == 1 {
            thread::yield_now();
        }
        staging.close();
        assert!(!admitted.join().expect("no panic"));
        assert_eq!(staging.take(1), None);
    }
}
