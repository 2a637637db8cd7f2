//! The summary of a new snapshot.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use snapfmt::Header;
use snapfmt::layout::PAGE_BYTES;

use crate::millis::ms;
use crate::path_text;

/// The new file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Summary {
    #[serde(serialize_with = "path_text::serialize")]
    pub(crate) file: PathBuf,
    pub(crate) id: String,
    pub(crate) parent_id: Option<String>,
    pub(crate) memory_bytes: u64,
    pub(crate) nonzero_bytes: u64,
    pub(crate) file_bytes: u64,
    /// Bytes of non-zero memory for each byte of the file.
    pub(crate) ratio: f64,
    /// The whole command.
    pub(crate) total_ms: f64,
    /// Until the guest was ready to be snapshotted, or restored.
    pub(crate) ready_ms: f64,
    /// How long the guest was paused: reading its state, and writing the file unless it runs meanwhile.
    pub(crate) pause_ms: f64,
    /// Of a guest that ran while the file was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) live: Option<LiveFigures>,
}

/// What it took to let a guest run while its file was written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LiveFigures {
    /// Protecting memory from writes, before the pause.
    pub(crate) arm_ms: f64,
    /// Writes of the guest that had to wait.
    pub(crate) faults: u64,
    /// Memory that was copied before the guest wrote to it.
    pub(crate) copied_bytes: u64,
    /// Writes that had to wait until the file had more of the memory.
    pub(crate) waits: u64,
}

/// What a reset has done.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ResetSummary {
    /// What the guest was put back to.
    pub(crate) snapshot: PathBuf,
    /// Memory that was put back.
    pub(crate) memory_bytes: u64,
    /// From when the guest was paused until its state was that of the snapshot.
    pub(crate) reset_ms: f64,
    /// How long it did not run; 0 if it was paused before.
    pub(crate) pause_ms: f64,
}

impl Summary {
    /// The summary of a complete file.
    pub(crate) fn new(
        file: &Path,
        header: &Header,
        started: Instant,
        ready: Instant,
        paused: Instant,
    ) -> Self {
        let now = Instant::now();
        Self {
            file: file.to_owned(),
            id: header.id.to_string(),
            parent_id: header.parent_id.map(|id| id.to_string()),
            memory_bytes: header.memory_bytes,
            nonzero_bytes: header.data_pages * PAGE_BYTES as u64,
            file_bytes: header.file_bytes,
            ratio: (header.data_pages * PAGE_BYTES as u64) as f64 / header.file_bytes as f64,
            total_ms: ms(now - started),
            ready_ms: ms(ready - started),
            pause_ms: ms(now - paused),
            live: None,
        }
    }
}
