//! The summary of a command that writes a snapshot.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use snapfmt::Header;
use snapfmt::layout::PAGE_BYTES;

use crate::millis::ms;

/// The pages of a file by where they are. `data` are those with bytes of their own in the file;
/// they share `stored` slots, so `duplicate` of them are equal to another.
#[derive(Serialize)]
pub(crate) struct Pages {
    pub(crate) total: u64,
    pub(crate) zero: u64,
    pub(crate) data: u64,
    pub(crate) stored: u64,
    pub(crate) duplicate: u64,
    pub(crate) parent: u64,
}

impl Pages {
    pub(crate) fn of(header: &Header) -> Self {
        Self {
            total: header.pages(),
            zero: header.zero_pages(),
            data: header.data_pages,
            stored: header.stored_pages,
            // A file may have any values.
            duplicate: header.data_pages.saturating_sub(header.stored_pages),
            parent: header.parent_pages,
        }
    }
}

/// Bytes of non-zero memory for each byte of the file.
pub(crate) fn ratio(header: &Header) -> f64 {
    (header.data_pages * PAGE_BYTES as u64) as f64 / header.file_bytes as f64
}

/// A file that was written.
#[derive(Serialize)]
pub(crate) struct Written<'a> {
    #[serde(serialize_with = "crate::path_text::serialize")]
    pub(crate) file: &'a Path,
    id: String,
    parent_id: Option<String>,
    pub(crate) memory_bytes: u64,
    pub(crate) nonzero_bytes: u64,
    pub(crate) file_bytes: u64,
    pub(crate) ratio: f64,
    pub(crate) pages: Pages,
    /// The whole command.
    pub(crate) total_ms: f64,
}

impl<'a> Written<'a> {
    pub(crate) fn new(file: &'a Path, header: &Header, started: Instant) -> Self {
        Self {
            file,
            id: header.id.to_string(),
            parent_id: header.parent_id.map(|id| id.to_string()),
            memory_bytes: header.memory_bytes,
            nonzero_bytes: header.data_pages * PAGE_BYTES as u64,
            file_bytes: header.file_bytes,
            ratio: ratio(header),
            pages: Pages::of(header),
            total_ms: ms(started.elapsed()),
        }
    }
}
