//! Requests under way. Threads that miss the same block wait for one request, and continue when their block arrives.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};

use crate::cache::BLOCK_BYTES;
use crate::error::ObjectError;

/// A request for some blocks that follow each other.
pub(crate) struct Flight {
    blocks: Range<u64>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    /// The blocks that have arrived, from the first one on.
    come: Vec<Bytes>,
    failed: Option<Arc<ObjectError>>,
    /// Also all blocks that have arrived are stored.
    ended: bool,
}

impl Flight {
    pub(crate) fn new(blocks: Range<u64>) -> Self {
        Self { blocks, progress: Mutex::default(), changed: Condvar::new() }
    }

    pub(crate) fn blocks(&self) -> Range<u64> {
        self.blocks.clone()
    }

    /// Adds the next block.
    pub(crate) fn push(&self, block: Bytes) {
        self.progress().come.push(block);
        self.changed.notify_all();
    }

    /// The number of the next block to arrive.
    pub(crate) fn next(&self) -> u64 {
        self.blocks.start + self.progress().come.len() as u64
    }

    /// The blocks that have not arrived will not arrive.
    pub(crate) fn fail(&self, error: ObjectError) {
        self.progress().failed = Some(Arc::new(error));
        self.changed.notify_all();
    }

    /// Ends the request. Threads that wait for a block which has not arrived, after a panic, get an error.
    pub(crate) fn end(&self) {
        let mut progress = self.progress();
        let missing = (progress.come.len() as u64) < self.blocks.end - self.blocks.start;
        if missing && progress.failed.is_none() {
            progress.failed = Some(Arc::new(ObjectError::Cancelled));
        }
        progress.ended = true;
        drop(progress);
        self.changed.notify_all();
    }

    /// Waits for one of its blocks.
    pub(crate) fn wait(&self, block: u64) -> Result<Bytes, Arc<ObjectError>> {
        let at = block.saturating_sub(self.blocks.start) as usize;
        let waiting =
            |progress: &mut Progress| progress.come.len() <= at && progress.failed.is_none();
        let progress = self.changed.wait_while(self.progress(), waiting);
        let progress = progress.unwrap_or_else(PoisonError::into_inner);
        match (progress.come.get(at), &progress.failed) {
            (Some(bytes), _) => Ok(bytes.clone()),
            (None, Some(error)) => Err(Arc::clone(error)),
            // `wait_while` does not return in this case.
            (None, None) => Err(Arc::new(ObjectError::Cancelled)),
        }
    }

    /// Waits until nothing more is stored.
    pub(crate) fn wait_for_end(&self) {
        let ended = self.changed.wait_while(self.progress(), |progress| !progress.ended);
        drop(ended.unwrap_or_else(PoisonError::into_inner));
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts the bytes of an answer into blocks.
pub(crate) struct Blocks {
    /// The length of the rest of the answer: the last block of an object is shorter.
    left_bytes: u64,
    block: BytesMut,
}

impl Blocks {
    pub(crate) fn new(len_bytes: u64) -> Self {
        Self { left_bytes: len_bytes, block: BytesMut::new() }
    }

    /// Passes each block that is complete now to `complete`.
    pub(crate) fn push(&mut self, mut bytes: Bytes, complete: &mut dyn FnMut(Bytes)) {
        while !bytes.is_empty() && self.left_bytes > 0 {
            let whole = self.left_bytes.min(BLOCK_BYTES) as usize;
            if self.block.capacity() < whole {
                self.block.reserve(whole - self.block.len());
            }
            let now = bytes.len().min(whole - self.block.len());
            self.block.extend_from_slice(&bytes.split_to(now));
            if self.block.len() == whole {
                self.left_bytes -= whole as u64;
                complete(self.block.split().freeze());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_waiter_continues_when_its_block_arrives() {
        let flight = Arc::new(Flight::new(7..9));
        let waiter = |block| {
            let flight = Arc::clone(&flight);
            thread::spawn(move || flight.wait(block))
        };
        let (first, second) = (waiter(7), waiter(8));
        flight.push(Bytes::from_static(b"seven"));
        assert_eq!(first.join().unwrap().unwrap(), &b"seven"[..]);
        assert_eq!(flight.next(), 8);
        flight.fail(ObjectError::NotFound { url: "s3://a/b".into() });
        let error = second.join().unwrap().unwrap_err();
        assert!(matches!(*error, ObjectError::NotFound { .. }));
        // Blocks that have arrived stay.
        assert!(flight.wait(7).is_ok());
        let ended = Flight::new(7..8);
        ended.end();
        assert!(matches!(*ended.wait(7).unwrap_err(), ObjectError::Cancelled));
    }

    #[test]
    fn answers_in_any_parts_are_cut_into_blocks() {
        let len = 2 * BLOCK_BYTES + 100;
        let whole: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        for part in [1000, BLOCK_BYTES as usize, 700_000] {
            let (mut blocks, mut found) = (Blocks::new(len), Vec::new());
            for part in whole.chunks(part) {
                blocks.push(Bytes::copy_from_slice(part), &mut |block| found.push(block));
            }
            let lens: Vec<_> = found.iter().map(|block| block.len() as u64).collect();
            assert_eq!(lens, [BLOCK_BYTES, BLOCK_BYTES, 100]);
            assert_eq!(found.concat(), whole);
        }
    }
}
