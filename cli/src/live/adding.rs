//! The file that opens before the guest's memory is in it, for the thread that adds the memory and for those of clients,
//! which add the pages that they need first.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use anyhow::Result;
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
    /// The newest file is complete, or will not be.
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
        let (id, cancelled) = (cutting.id.clone(), Arc::clone(cancelled));
        let mut files = self.files();
        files.truncate(FILES - 1);
        files.push_front(AddedFile { id, cancelled, result: None });
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(cutting);
    }

    /// Adds a chunk, unless it is there.
    pub(super) fn add(&self, chunk: usize) -> Result<()> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        match &*current {
            Some(Cutting { cut, chunks, .. }) => cut.add(chunks, chunk).map_err(snapshot_error),
            None => Ok(()),
        }
    }

    /// Frees the pages that are not for the file.
    pub(super) fn release_others(&self) {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(Cutting { cut, chunks, .. }) = &*current {
            cut.release_others(chunks);
        }
    }

    /// Ends the point in time, when no thread uses it any more.
    pub(super) fn release(&self) {
        let cutting = self.current.write().unwrap_or_else(PoisonError::into_inner).take();
        drop(cutting);
    }

    pub(super) fn end(&self, result: Result<(), String>) {
        if let Some(newest) = self.files().front_mut() {
            newest.result = Some(result);
        }
        self.ended.notify_all();
    }

    fn files(&self) -> MutexGuard<'_, VecDeque<AddedFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
