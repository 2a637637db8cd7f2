//! How a page of a `.snap` file, and an error in reading it, look to the pager.

use snapfmt::{PageIndex, ReadError};

use super::error::SourceError;
use super::load::LoadedPage;
use crate::region::PAGE_BYTES;

/// The page in a decoded chunk, by its slot there.
pub(crate) fn loaded(page: PageIndex, slot: u16) -> LoadedPage {
    let buffer_offset = usize::from(slot) * PAGE_BYTES;
    LoadedPage { source_offset: page.source_offset(), buffer_offset }
}

/// An error of the storage is transient. An error in the content of the file is permanent.
pub(crate) fn source_error(page: PageIndex, error: ReadError) -> SourceError {
    let message = format!("page {} of the snapshot", page.0);
    match error.root() {
        ReadError::Io { .. } => SourceError::transient(message),
        _ => SourceError::permanent(message),
    }
    .caused_by(error)
}
