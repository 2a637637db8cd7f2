//! Descriptors reserved for refusing clients.

use std::os::fd::OwnedFd;

use rustix::event::EventfdFlags;

/// Descriptors reserved for refusing a client when no others are left.
pub(super) struct Spare(Vec<OwnedFd>);

impl Spare {
    /// For its connection, its process, the descriptors that it sends, and what is read about those.
    const DESCRIPTORS: usize = 8;

    pub(super) fn full() -> Spare {
        let mut spare = Spare(Vec::new());
        spare.fill();
        spare
    }

    /// Opens as many as possible.
    fn fill(&mut self) {
        while self.0.len() < Self::DESCRIPTORS {
            match rustix::event::eventfd(0, EventfdFlags::CLOEXEC) {
                Ok(descriptor) => self.0.push(descriptor),
                Err(_) => return,
            }
        }
    }

    /// Does `work` while these descriptors are closed.
    pub(super) fn released<T>(&mut self, work: impl FnOnce() -> T) -> T {
        self.0.clear();
        let outcome = work();
        self.fill();
        outcome
    }
}
