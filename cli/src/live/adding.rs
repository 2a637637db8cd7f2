//! The file that opens before the guest's memory is in it, for the thread that adds the memory and for those of clients,
//! which add the pages that they need first.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use anyhow::{Context, Result};
use snapfmt::{DeferredChunks, PageIndex};
use snapvm::Cut;

use crate::exit;
use crate::restoring::snapshot_error;

/// A guest at one point in time, and the file that gets its memory.
pub(super) struct Cutting {
    pub(super) id: String,
    pub(super) cut: Cut,
    pub(super) chunks: DeferredChunks,
}

/// The file whose memory is being added, for the threads of clients.
#[derive(Default)]
pub(super) struct Adding {
    /// Held for reading while a chunk is added, so that the guest's point in time is kept.
    current: RwLock<Option<Cutting>>,
    /// The last files that were begun, newest first: a client may ask after the next one has begun.
    files: Mutex<VecDeque<AddedFile>>,
    /// One of the files is complete, or will not be.
    ended: Condvar,
}

/// How many of them are remembered.
const FILES: usize = 16;

/// A file that was begun.
struct AddedFile {
    id: String,
    cancelled: Arc<AtomicBool>,
    /// `None`: it is not complete yet.
    result: Option<Result<(), String>>,
}

/// Why a page is not in a file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AddError {
    #[error("memory was not added to a file with this id, or to many others since")]
    Unknown,
    /// With all causes.
    #[error("{0}")]
    Failed(String),
}

impl Adding {
    /// Adds the chunk of a page, unless it is there.
    pub(super) fn add_page(&self, id: &str, page: u32) -> Result<(), AddError> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Cutting { cut, chunks, .. }) = current.as_ref().filter(|cut| cut.id == id) else {
            drop(current);
            return self.wait(id);
        };
        let Some(chunk) = chunks.of(PageIndex(page)) else { return Ok(()) };
        let added = cut.add(chunks, chunk).map_err(snapshot_error);
        added.map_err(|error| AddError::Failed(exit::describe(&error)))
    }

    /// Waits until all of the file's memory is in it.
    pub(super) fn wait(&self, id: &str) -> Result<(), AddError> {
        let of_id = |files: &VecDeque<AddedFile>| files.iter().position(|file| file.id == id);
        let adding = |files: &mut VecDeque<AddedFile>| {
            of_id(files).is_some_and(|at| files[at].result.is_none())
        };
        let files = self.ended.wait_while(self.files(), adding);
        let files = files.unwrap_or_else(PoisonError::into_inner);
        match of_id(&files).and_then(|at| files[at].result.clone()) {
            Some(result) => result.map_err(AddError::Failed),
            None => Err(AddError::Unknown),
        }
    }

    /// Ends the file without the rest of its memory, unless it is complete. Then it has ended.
    pub(super) fn cancel(&self, id: &str) -> Result<(), AddError> {
        for file in self.files().iter().filter(|file| file.id == id) {
            file.cancelled.store(true, Ordering::SeqCst);
        }
        match self.wait(id) {
            Err(AddError::Failed(_)) => Ok(()),
            ended => ended,
        }
    }

    pub(super) fn begin(&self, cutting: Cutting, cancelled: &Arc<AtomicBool>) {
        self.remember(&cutting.id, cancelled);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(cutting);
    }

    fn remember(&self, id: &str, cancelled: &Arc<AtomicBool>) {
        let (id, cancelled) = (id.to_owned(), Arc::clone(cancelled));
        let mut files = self.files();
        files.truncate(FILES - 1);
        files.push_front(AddedFile { id, cancelled, result: None });
    }

    /// Adds a chunk to the file with this id, unless it is there.
    pub(super) fn add(&self, id: &str, chunk: usize) -> Result<()> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let of_id = current.as_ref().filter(|cutting| cutting.id == id);
        let Cutting { cut, chunks, .. } = of_id.context("the point in time has ended")?;
        cut.add(chunks, chunk).map_err(snapshot_error)
    }

    /// Frees the pages that are not for the file with this id.
    pub(super) fn release_others(&self, id: &str) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let of_id = current.as_ref().filter(|cutting| cutting.id == id);
        if let Some(Cutting { cut, chunks, .. }) = of_id {
            cut.release_others(chunks);
        }
    }

    /// Ends the point in time of the file with this id, when no thread uses it any more. That of the next file may have
    /// begun.
    pub(super) fn release(&self, id: &str) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let cutting = current.take_if(|cutting| cutting.id == id);
        drop(current);
        drop(cutting);
    }

    /// Ends the file with this id. The next one may have begun.
    pub(super) fn end(&self, id: &str, result: Result<(), String>) {
        if let Some(file) = self.files().iter_mut().find(|file| file.id == id) {
            file.result = Some(result);
        }
        self.ended.notify_all();
    }

    fn files(&self) -> MutexGuard<'_, VecDeque<AddedFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(adding: &Adding, id: &str) {
        adding.remember(id, &Arc::default());
    }

    /// The thread of a file may end after the next file has begun.
    #[test]
    fn a_file_that_ends_late_does_not_end_the_next_one() {
        let adding = Adding::default();
        begun(&adding, "first");
        begun(&adding, "second");
        adding.end("first", Err("first".into()));
        assert!(matches!(adding.wait("first"), Err(AddError::Failed(why)) if why == "first"));
        assert!(adding.files()[0].result.is_none(), "the second one has not ended");
        adding.end("second", Ok(()));
        assert!(adding.wait("second").is_ok());
        assert!(matches!(adding.wait("first"), Err(AddError::Failed(why)) if why == "first"));
    }

    #[test]
    fn nothing_is_added_to_a_file_whose_point_in_time_has_ended() {
        let adding = Adding::default();
        begun(&adding, "first");
        assert!(adding.add("first", 0).is_err());
    }
}
