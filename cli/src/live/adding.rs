//! The file that opens before the guest's memory is in it, for the thread that adds the memory and for those of clients,
//! which add the pages that they need first.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

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

/// The interval of checks whether a client still waits.
const LOOK: Duration = Duration::from_millis(100);

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
    #[error("the client has left")]
    Left,
    /// With all causes.
    #[error("{0}")]
    Failed(String),
}

impl Adding {
    /// Adds the chunk of a page, unless it is there. `has_left` shows whether its client waits no more.
    pub(super) fn add_page(
        &self,
        id: &str,
        page: u32,
        has_left: &dyn Fn() -> bool,
    ) -> Result<(), AddError> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Cutting { cut, chunks, .. }) = current.as_ref().filter(|cut| cut.id == id) else {
            drop(current);
            return self.wait(id, has_left);
        };
        let Some(chunk) = chunks.of(PageIndex(page)) else { return Ok(()) };
        let added = cut.add(chunks, chunk).map_err(snapshot_error);
        added.map_err(|error| AddError::Failed(exit::describe(&error)))
    }

    /// Waits until all of the file's memory is in it, or the client has left: each client has a thread, and there are
    /// few.
    pub(super) fn wait(&self, id: &str, has_left: &dyn Fn() -> bool) -> Result<(), AddError> {
        let mut files = self.files();
        loop {
            let file = files.iter().find(|file| file.id == id).ok_or(AddError::Unknown)?;
            if let Some(result) = &file.result {
                return result.clone().map_err(AddError::Failed);
            }
            if has_left() {
                return Err(AddError::Left);
            }
            let waited = self.ended.wait_timeout(files, LOOK);
            files = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the file without the rest of its memory, unless it is complete. Then it has ended.
    pub(super) fn cancel(&self, id: &str, has_left: &dyn Fn() -> bool) -> Result<(), AddError> {
        for file in self.files().iter().filter(|file| file.id == id) {
            file.cancelled.store(true, Ordering::SeqCst);
        }
        match self.wait(id, has_left) {
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
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn stays() -> bool {
        false
    }

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
        assert!(
            matches!(adding.wait("first", &stays), Err(AddError::Failed(why)) if why == "first")
        );
        assert!(adding.files()[0].result.is_none(), "the second one has not ended");
        adding.end("second", Ok(()));
        assert!(adding.wait("second", &stays).is_ok());
        assert!(
            matches!(adding.wait("first", &stays), Err(AddError::Failed(why)) if why == "first")
        );
    }

    #[test]
    fn nothing_is_added_to_a_file_whose_point_in_time_has_ended() {
        let adding = Adding::default();
        begun(&adding, "first");
        assert!(adding.add("first", 0).is_err());
    }

    #[test]
    fn a_client_that_has_left_does_not_wait() {
        let adding = Adding::default();
        begun(&adding, "first");
        let looks = AtomicUsize::new(0);
        let leaves = || looks.fetch_add(1, Ordering::SeqCst) == 2;
        assert!(matches!(adding.wait("first", &leaves), Err(AddError::Left)));
        assert!(matches!(adding.add_page("first", 0, &|| true), Err(AddError::Left)));
        assert!(matches!(adding.cancel("first", &|| true), Err(AddError::Left)));
        assert!(adding.files()[0].cancelled.load(Ordering::SeqCst));
        // The result of a file that has ended is there for all.
        adding.end("first", Ok(()));
        assert!(adding.wait("first", &|| true).is_ok());
    }
}
