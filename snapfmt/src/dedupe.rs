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
    /// The task whose turn it is.
    turn: usize,
    /// A task has failed and will not take its turn: nobody needs to wait any more.
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
    /// Waits for the turn. Then calls `visit` with a function that remembers a page by its hash,
    /// and gives the page that was remembered by the same hash before.
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

/// A hash of a page: its checksum. Equal hashes say "look closer", no more, so
/// a guest that makes up pages with equal hashes gains nothing.
pub(crate) fn hash(page: &[u8]) -> u32 {
    crc32fast::hash(page)
}

/// Where the hash of a page stands in the table: cheap, since it is a hash already, and different in each
/// process, since a guest can make up pages whose hashes would all stand in the same place.
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
