//! Blocks that could not be stored in the cache, for example because the disk is full. A few are kept in memory, so that
//! a thread which was called back for a block finds it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// The limit of kept blocks: 16 MiB. The oldest is dropped.
const MOST: usize = 128;

#[derive(Debug, Default)]
pub(crate) struct Unstored(Mutex<VecDeque<(u64, Bytes)>>);

impl Unstored {
    pub(crate) fn keep(&self, block: u64, bytes: Bytes) {
        let mut kept = self.kept();
        kept.retain(|(number, _)| *number != block);
        kept.truncate(MOST - 1);
        kept.push_front((block, bytes));
    }

    pub(crate) fn get(&self, block: u64) -> Option<Bytes> {
        self.kept().iter().find(|(number, _)| *number == block).map(|(_, bytes)| bytes.clone())
    }

    /// Drops blocks whose bytes are damaged.
    pub(crate) fn drop_blocks(&self, blocks: &Range<u64>) {
        self.kept().retain(|(number, _)| !blocks.contains(number));
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<(u64, Bytes)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_blocks_are_kept() {
        let unstored = Unstored::default();
        (0..300).for_each(|block| unstored.keep(block, Bytes::from_static(b"old")));
        unstored.keep(299, Bytes::from_static(b"new"));
        assert_eq!(unstored.get(299), Some(Bytes::from_static(b"new")));
        assert!(unstored.get(172).is_some() && unstored.get(171).is_none());
        unstored.drop_blocks(&(290..300));
        assert!(unstored.get(299).is_none() && unstored.get(289).is_some());
        assert!(unstored.kept().len() <= MOST);
    }
}
