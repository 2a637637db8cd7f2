//! Finding pages with the same bytes, in the same way whatever the number of threads.
//!
//! Threads look pages up in the order of their tasks, each task in its turn, so that it is always
//! the first of several equal pages that is stored. Looking up is quick; compressing, which is not,
//! happens outside.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use siphasher::sip128::{Hasher128, SipHasher13};

use crate::entry::PageIndex;

/// Most pages that are remembered: about 20 MiB, or 60 MiB of memory that is read once. Of larger memories, pages that
/// come later are compared with these.
const MAX_REMEMBERED: usize = 1 << 20;

/// The pages that were stored so far, by a hash of their bytes.
pub(crate) struct Dedupe {
    state: Mutex<State>,
    changed: Condvar,
    /// The key of the hash that identifies a page, if pages cannot be compared.
    key: Option<[u8; 16]>,
}

struct State {
    /// The task that may continue now.
    turn: usize,
    /// A task has failed and will not take its turn, so no other task has to wait.
    abandoned: bool,
    seen: Seen,
}

/// The two kinds of hashes have different lengths, and so does the memory for them.
enum Seen {
    Candidates(HashMap<u32, PageIndex, Scatter>),
    Equal(HashMap<u128, PageIndex, Scatter>),
}

/// A task's right to its turn. If it is dropped before, all others stop waiting.
pub(crate) struct Ticket<'a> {
    dedupe: &'a Dedupe,
    task: usize,
    used: bool,
}

impl Dedupe {
    /// For memory that does not change: pages of the same hash are read again and compared.
    pub(crate) fn comparing() -> Self {
        Self::new(Seen::Candidates(HashMap::default()), None)
    }

    /// For memory that is read once: pages of the same hash are equal. A guest cannot make different pages with equal
    /// hashes, because it does not know the key (SipHash is made for that), and by chance it happens once in 2^88
    /// memories of a million pages.
    pub(crate) fn read_once() -> Self {
        // The key comes from the random-number generator of the system.
        let key = uuid::Uuid::new_v4().into_bytes();
        Self::new(Seen::Equal(HashMap::default()), Some(key))
    }

    fn new(seen: Seen, key: Option<[u8; 16]>) -> Self {
        let state = State { turn: 0, abandoned: false, seen };
        Self { state: Mutex::new(state), changed: Condvar::new(), key }
    }

    /// Whether pages with equal hashes still have to be compared.
    pub(crate) fn compares(&self) -> bool {
        self.key.is_none()
    }

    /// The hash of a page. If pages are compared, it is the checksum: a guest gains nothing by creating pages with
    /// equal checksums.
    pub(crate) fn hash(&self, page: &[u8]) -> u128 {
        match &self.key {
            None => crc32fast::hash(page).into(),
            Some(key) => {
                let mut hasher = SipHasher13::new_with_key(key);
                hasher.write(page);
                hasher.finish128().as_u128()
            }
        }
    }

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
        visit: impl FnOnce(&mut dyn FnMut(u128, PageIndex) -> Option<PageIndex>),
    ) {
        let mut state = self.dedupe.lock();
        while state.turn != self.task && !state.abandoned {
            state = self.dedupe.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let seen = &mut state.seen;
        visit(&mut |hash, page| match seen {
            Seen::Candidates(seen) => recorded(seen, hash as u32, page),
            Seen::Equal(seen) => recorded(seen, hash, page),
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

/// The page that was recorded with this hash before. If there is none, this one is recorded.
fn recorded<H: Eq + Hash>(
    seen: &mut HashMap<H, PageIndex, Scatter>,
    hash: H,
    page: PageIndex,
) -> Option<PageIndex> {
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

    fn write_u128(&mut self, hash: u128) {
        // It is as random as its key.
        self.hash = hash as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        self.write_u32(crc32fast::hash(bytes));
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}
