//! The lock of a slice: held by whoever reads its messages or installs its pages.
//!
//! Why: reading a REMOVE lets the thread that removes go on, and the pages vanish. Were another thread then between
//! looking at a page's state and installing it, it would put back content that the guest has given away. So a read and
//! the state changes that it brings are one step, and looking and installing are one step.
//!
//! It is held for 20 us or so. Who finds it taken looks again for about as long before it sleeps: to be woken takes
//! longer, and waking it would be one more thing to do for who has it. Threads that load in the background let
//! demand threads go first, which a plain lock, taken again at once by who has just released it, would not.

use std::hint;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

/// So often one looks, about 1 us each, before it sleeps.
const LOOKS: u32 = 40;
/// A background thread waits for demand threads no longer than this: they may have been kept from running.
const LONGEST_ASIDE: Duration = Duration::from_micros(200);

#[derive(Debug, Default)]
pub(crate) struct Gate {
    lock: Mutex<()>,
    /// Demand threads that wait for it.
    waiting: AtomicUsize,
}

impl Gate {
    /// For a thread that answers faults.
    pub(crate) fn demand(&self) -> MutexGuard<'_, ()> {
        if let Some(gate) = self.try_take() {
            return gate;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let gate = self.take();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        gate
    }

    /// For a thread that nobody waits for.
    pub(crate) fn background(&self) -> MutexGuard<'_, ()> {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            let began = Instant::now();
            while self.waiting.load(Ordering::Relaxed) > 0 && began.elapsed() < LONGEST_ASIDE {
                thread::yield_now();
            }
        }
        self.take()
    }

    fn take(&self) -> MutexGuard<'_, ()> {
        for _ in 0..LOOKS {
            if let Some(gate) = self.try_take() {
                return gate;
            }
            (0..32).for_each(|_| hint::spin_loop());
        }
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// If nobody has it.
    pub(crate) fn try_take(&self) -> Option<MutexGuard<'_, ()>> {
        match self.lock.try_lock() {
            Ok(gate) => Some(gate),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_it_at_a_time() {
        let gate = Gate::default();
        let inside = AtomicUsize::new(0);
        let work = |demand: bool| {
            for _ in 0..2000 {
                let held = if demand { gate.demand() } else { gate.background() };
                assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                assert!(gate.try_take().is_none());
                inside.fetch_sub(1, Ordering::Relaxed);
                drop(held);
            }
        };
        thread::scope(|scope| {
            for demand in [true, true, false, false] {
                scope.spawn(move || work(demand));
            }
        });
        assert!(gate.try_take().is_some());
    }

    #[test]
    fn the_background_does_not_wait_for_ever_for_who_does_not_run() {
        let gate = Gate::default();
        gate.waiting.store(1, Ordering::Relaxed);
        drop(gate.background());
    }
}
