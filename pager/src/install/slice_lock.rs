//! The slice lock: a thread holds it while it reads the messages of a slice or installs pages in it.
//!
//! Reading a REMOVE lets the removing thread continue, and the pages vanish. A thread that has checked the state of
//! such a page before, and installs it after, would restore content that the guest has given away. So the lock makes a
//! read and its state changes one step, and a check and its install one step.
//!
//! The lock is held for about 20 us. A thread that finds it taken spins for about as long before it sleeps, because a
//! wake takes longer and costs the holder time. Background threads let demand threads go first. A plain mutex would not
//! do that: the thread that has just released it can take it again immediately.

use std::hint;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

/// The number of attempts, about 1 us each, before a thread sleeps.
const SPINS: u32 = 40;
/// The longest time that a background thread lets demand threads go first. They may not be running.
const LONGEST_YIELD: Duration = Duration::from_micros(200);

#[derive(Debug, Default)]
pub(crate) struct SliceLock {
    mutex: Mutex<()>,
    /// The number of demand threads that wait for the lock.
    waiting: AtomicUsize,
}

impl SliceLock {
    /// Takes the lock in a demand thread.
    pub(crate) fn for_demand(&self) -> MutexGuard<'_, ()> {
        if let Some(guard) = self.try_lock() {
            return guard;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let guard = self.take();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    /// Takes the lock in a background thread.
    pub(crate) fn for_background(&self) -> MutexGuard<'_, ()> {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            let began = Instant::now();
            while self.waiting.load(Ordering::Relaxed) > 0 && began.elapsed() < LONGEST_YIELD {
                thread::yield_now();
            }
        }
        self.take()
    }

    fn take(&self) -> MutexGuard<'_, ()> {
        for _ in 0..SPINS {
            if let Some(guard) = self.try_lock() {
                return guard;
            }
            (0..32).for_each(|_| hint::spin_loop());
        }
        self.mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock if it is free.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, ()>> {
        match self.mutex.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_holds_it_at_a_time() {
        let lock = SliceLock::default();
        let inside = AtomicUsize::new(0);
        let work = |demand: bool| {
            for _ in 0..2000 {
                let held = if demand { lock.for_demand() } else { lock.for_background() };
                assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                assert!(lock.try_lock().is_none());
                inside.fetch_sub(1, Ordering::Relaxed);
                drop(held);
            }
        };
        thread::scope(|scope| {
            for demand in [true, true, false, false] {
                scope.spawn(move || work(demand));
            }
        });
        assert!(lock.try_lock().is_some());
    }

    #[test]
    fn the_background_does_not_wait_forever_for_threads_that_do_not_run() {
        let lock = SliceLock::default();
        lock.waiting.store(1, Ordering::Relaxed);
        drop(lock.for_background());
    }
}
