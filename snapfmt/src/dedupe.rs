//! Finding pages with the same bytes, in the same way whatever the number of threads.
//!
//! Threads look pages up in the order of their tasks, each task in its turn, so that it is always
//! the first of several equal pages that is stored. Looking up is quick; compressing, which is not,
//! happens outside.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::entry::PageIndex;

/// Most pages that are remembered: about 20 MiB. Of larger memories, pages that come later are
/// compared with these.
const MAX_REMEMBERED: usize = 1 << 20;

/// The pages that were stored so far, by a hash of their bytes.
#[derive(Default)]
pub(crate) struct Dedupe {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The task that may continue now.
    turn: usize,
    /// A task has failed and will not take its turn, so no other task has to wait.
    abandoned: bool,
    seen: HashMap<u32, PageIndex, Scatter>,
}

/// A task's right to its turn. If it is dropped before, all others stop waiting.
pub(crate) struct Ticket<'a> {
    dedupe: &'a Dedupe,
    task: usize,
    used: bool,
}

impl Dedupe {
    pub(crate) fn ticket(&self, task: usize) -> Ticket<'_> {
        Ticket { dedupe: self, task, used: false }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket<'_> {
    /// Waits for the turn. Then calls `visit` with a function that records a page by its hash,
    /// and returns the page that was recorded with the same hash before.
    pub(crate) fn take(
        mut self,
        visit: impl FnOnce(&mut dyn FnMut(u32, PageIndex) -> Option<PageIndex>),
    ) {
        let mut state = self.dedupe.lock();
        while state.turn != self.task && !state.abandoned {
            state = self.dedupe.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let seen = &mut state.seen;
        visit(&mut |hash, page| {
            let room = seen.len() < MAX_REMEMBERED;
            match seen.entry(hash) {
                Entry::Occupied(known) => Some(*known.get()),
                Entry::Vacant(new) => {
                    if room {
                        new.insert(page);
                    }
                    None
                }
            }
        });
        state.turn += 1;
        self.used = true;
        drop(state);
        self.dedupe.changed.notify_all();
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if !self.used {
            self.dedupe.lock().abandoned = true;
            self.dedupe.changed.notify_all();
        }
    }
}

/// A hash of a page: its checksum. Pages with equal hashes are compared byte for byte, so
/// a guest gains nothing by creating pages with equal hashes.
pub(crate) fn hash(page: &[u8]) -> u32 {
    crc32fast::hash(page)
}

/// The position of a page's hash in the table. It is cheap, because its input is a hash already. It is different in
/// each process, because a guest could otherwise create pages whose hashes have the same position.
#[derive(Clone)]
struct Scatter(u64);

impl Default for Scatter {
    fn default() -> Self {
        Self(RandomState::new().hash_one(0) | 1)
    }
}

impl BuildHasher for Scatter {
    type Hasher = Scattered;

    fn build_hasher(&self) -> Scattered {
        Scattered { by: self.0, hash: 0 }
    }
}

struct Scattered {
    by: u64,
    hash: u64,
}

impl Hasher for Scattered {
    fn write_u32(&mut self, hash: u32) {
        // Both halves of the product, so that every bit depends on all bits.
        let product = u128::from(u64::from(hash) ^ self.by >> 32) * u128::from(self.by);
        self.hash = (product >> 64) as u64 ^ product as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        self.write_u32(crc32fast::hash(bytes));
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}
