//! Requests under way. Threads that miss the same block wait for one request, and continue when their block arrives.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::cache::BLOCK_BYTES;
use crate::error::ObjectError;

/// A request for some blocks that follow each other.
pub(crate) struct Flight {
    blocks: Range<u64>,
    /// A thread that answers faults has caused it.
    is_demand: bool,
    progress: Mutex<Progress>,
    changed: Condvar,
    /// The same for tasks.
    changed_task: Notify,
}

#[derive(Default)]
struct Progress {
    /// The blocks that have arrived, from the first one on.
    come: Vec<Bytes>,
    failed: Option<Arc<ObjectError>>,
    /// Also all blocks that have arrived are stored.
    ended: bool,
    /// The end of the blocks that faults wait for.
    demanded: u64,
}

impl Flight {
    pub(crate) fn new(blocks: Range<u64>, is_demand: bool) -> Self {
        let (progress, changed) = (Mutex::default(), Condvar::new());
        Self { blocks, is_demand, progress, changed, changed_task: Notify::new() }
    }

    pub(crate) fn is_demand(&self) -> bool {
        self.is_demand
    }

    fn notify(&self) {
        self.changed.notify_all();
        self.changed_task.notify_waiters();
    }

    pub(crate) fn blocks(&self) -> Range<u64> {
        self.blocks.clone()
    }

    /// Adds the next block.
    pub(crate) fn push(&self, block: Bytes) {
        self.progress().come.push(block);
        self.notify();
    }

    /// The number of the next block to arrive.
    pub(crate) fn next(&self) -> u64 {
        self.blocks.start + self.progress().come.len() as u64
    }

    /// The number of blocks that have not arrived.
    pub(crate) fn blocks_to_come(&self) -> u64 {
        self.blocks.end - self.next()
    }

    /// Waits until fewer than this number of blocks have not arrived. Returns how many have not.
    pub(crate) async fn fewer_to_come(&self, than: u64) -> u64 {
        loop {
            // From here on no change is missed.
            let changed = self.changed_task.notified();
            let to_come = self.blocks_to_come();
            if to_come < than {
                return to_come;
            }
            changed.await;
        }
    }

    /// The blocks that have not arrived will not arrive.
    pub(crate) fn fail(&self, error: ObjectError) {
        self.progress().failed = Some(Arc::new(error));
        self.notify();
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
        self.notify();
    }

    /// Waits for one of its blocks.
    pub(crate) fn wait(&self, block: u64) -> Result<Bytes, Arc<ObjectError>> {
        let at = block.saturating_sub(self.blocks.start) as usize;
        let waiting = |progress: &mut Progress| progress.of(at).is_none();
        let progress = self.changed.wait_while(self.progress(), waiting);
        let progress = progress.unwrap_or_else(PoisonError::into_inner);
        // `wait_while` returns only then.
        progress.of(at).unwrap_or_else(|| Err(Arc::new(ObjectError::Cancelled)))
    }

    /// The same for a task. A fault waits for the block, so that a late request may be sent again.
    pub(crate) async fn demand(&self, block: u64) -> Result<Bytes, Arc<ObjectError>> {
        let at = block.saturating_sub(self.blocks.start) as usize;
        let further = self.progress().demand(block + 1);
        if further {
            self.changed_task.notify_waiters();
        }
        loop {
            // From here on no change is missed.
            let changed = self.changed_task.notified();
            if let Some(result) = self.progress().of(at) {
                return result;
            }
            changed.await;
        }
    }

    /// Waits until nothing has arrived for `delay` while a fault waits for a block. Returns the blocks that faults wait
    /// for. While there is no `delay`, this does not return.
    pub(crate) async fn late(&self, delay: impl Fn() -> Option<Duration>) -> Range<u64> {
        loop {
            let changed = self.changed_task.notified();
            let (next, end) = (self.next(), self.progress().demanded.min(self.blocks.end));
            match delay().filter(|_| next < end) {
                None => changed.await,
                Some(delay) => {
                    if timeout(delay, changed).await.is_err() && self.next() == next {
                        return next..end;
                    }
                }
            }
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

impl Progress {
    /// What has become of the block at this place; `None` if it may still arrive.
    fn of(&self, at: usize) -> Option<Result<Bytes, Arc<ObjectError>>> {
        let come = self.come.get(at).map(|bytes| Ok(bytes.clone()));
        come.or_else(|| self.failed.as_ref().map(|error| Err(Arc::clone(error))))
    }

    /// Returns whether faults did not wait for so many blocks before.
    fn demand(&mut self, end: u64) -> bool {
        let further = end > self.demanded;
        self.demanded = self.demanded.max(end);
        further
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
        let flight = Arc::new(Flight::new(7..9, false));
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
        let ended = Flight::new(7..8, false);
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
