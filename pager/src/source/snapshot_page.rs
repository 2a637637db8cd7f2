//! How a page of a `.snap` file, and an error in reading it, look to the pager.

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{PageIndex, Permanent, ReadError};

use super::error::SourceError;
use super::load::LoadedPage;

/// The page in a decoded chunk, by its slot there.
pub(crate) fn loaded(page: PageIndex, slot: u16) -> LoadedPage {
    let buffer_offset = usize::from(slot) * PAGE_BYTES;
    LoadedPage { source_offset: page.source_offset(), buffer_offset }
}

/// An error of the storage is transient, unless the storage says that it is not. An error in the content of the file is permanent.
pub(crate) fn source_error(page: PageIndex, error: ReadError) -> SourceError {
    let message = format!("page {} of the snapshot", page.0);
    match error.root() {
        ReadError::Io { source, .. } if !Permanent::is_in(source) => SourceError::transient(message),
        _ => SourceError::permanent(message),
    }
    .caused_by(error)
}
