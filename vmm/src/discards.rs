//! Memory that a guest gives back, while its content is still needed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whether devices return memory to the host that the guest does not use (a balloon). It is shared by the devices of a
/// machine.
#[derive(Clone, Debug, Default)]
pub struct Discards(Arc<Mutex<usize>>);

/// As long as this exists, devices discard no memory: the guest's requests to do so have no effect.
#[derive(Debug)]
#[must_use = "dropping it lets devices discard memory again"]
pub struct HeldDiscards(Discards);

impl Discards {
    /// Holds them. A discard that has begun has ended when this returns.
    pub fn hold(&self) -> HeldDiscards {
        *self.lock() += 1;
        HeldDiscards(self.clone())
    }

    /// Calls `discard`, unless discards are held.
    pub(crate) fn unless_held(&self, discard: impl FnOnce() -> u64) -> u64 {
        let held = self.lock();
        match *held {
            0 => discard(),
            _ => 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        // The number is right even after a panic of a discard.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for HeldDiscards {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_discarded_while_anyone_holds() {
        let discards = Discards::default();
        assert_eq!(discards.unless_held(|| 7), 7);
        let (one, two) = (discards.hold(), discards.clone().hold());
        assert_eq!(discards.unless_held(|| 7), 0);
        drop(one);
        assert_eq!(discards.unless_held(|| 7), 0);
        drop(two);
        assert_eq!(discards.unless_held(|| 7), 7);
    }
}
