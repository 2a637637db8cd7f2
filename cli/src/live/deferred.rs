//! Writes a snapshot whose file opens before the guest's memory is in it, and then adds the memory.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use snapfmt::Progress;
use snapfmt::layout::PAGE_BYTES;

use super::adding::{Adding, Cutting};
use super::remote::{Done, Refused, StoreRequest};
use super::saving::{Save, progress_of};
use crate::exit;
use crate::restoring::snapshot_error;

/// Memory is added from then on, after the client has its answer. Until then the client starts the guests that use the
/// file, and has the CPU for that. What one of them needs is added at once.
const HEAD_START: Duration = Duration::from_millis(10);

/// Ends the file, however its thread ends: its clients wait for that.
struct Ending<'a> {
    adding: &'a Adding,
    id: String,
    result: Result<(), String>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.adding.release(&self.id);
        let panicked = Err("the thread that adds the memory panicked".into());
        self.adding.end(&self.id, std::mem::replace(&mut self.result, panicked));
    }
}

impl Save {
    /// Writes the file without memory, answers the client, and then adds the memory.
    pub(super) fn run_deferred(self) {
        let StoreRequest { out, options, .. } = &self.request;
        let begun = self.cut.write_deferred(out, &self.written, options);
        let (header, chunks) = match begun.map_err(snapshot_error) {
            Ok(begun) => begun,
            Err(error) => {
                let Save { cut, begun, .. } = self;
                drop(cut);
                return begun.end(Err(Refused::Failed(exit::describe(&error))));
            }
        };
        let summary = self.summary(&header);
        let Save { cut, request, mut begun, interrupt, .. } = self;
        let status = Arc::clone(&begun.status);
        let count = chunks.count();
        let total_bytes = header.data_pages * PAGE_BYTES as u64;
        let id = header.id.to_string();
        let cutting = Cutting { id: id.clone(), cut, chunks };
        status.adding.begin(cutting, &request.cancelled);
        let panicked = Err("the thread that adds the memory panicked".to_owned());
        let mut ending = Ending { adding: &status.adding, id, result: panicked };
        begun.answer(Ok(Done::Stored(summary)));
        std::thread::sleep(HEAD_START);
        let progress = progress_of(&request, &status, &interrupt);
        status.adding.release_others(&ending.id);
        let added = (0..count).try_for_each(|chunk| {
            status.adding.add(&ending.id, chunk)?;
            // Nearly: most chunks have the same length.
            let done_bytes = total_bytes / count as u64 * (chunk as u64 + 1);
            match progress(Progress::new(done_bytes, total_bytes)).is_break() {
                true => bail!("cancelled"),
                false => Ok(()),
            }
        });
        drop(progress);
        // The guest is free for the next snapshot when a client knows of the end. The next one may begin before this one
        // ends.
        ending.result = added.map_err(|error| exit::describe(&error));
        status.adding.release(&ending.id);
        drop(begun);
        drop(ending);
    }
}
