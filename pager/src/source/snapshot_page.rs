//! How a page of a `.snap` file, and an error in reading it, look to the pager.

use snapfmt::{PageIndex, Permanent, ReadError};

use super::error::SourceError;
use super::load::LoadedPage;
use crate::region::PAGE_BYTES;

/// The page in a decoded chunk, by its slot there.
pub(crate) fn loaded(page: PageIndex, slot: u16) -> LoadedPage {
    let buffer_offset = usize::from(slot) * PAGE_BYTES;
    LoadedPage { source_offset: page.source_offset(), buffer_offset }
}

/// An error of the storage is transient, unless the storage says that it is not. An error in the content of the file is permanent.
pub(crate) fn source_error(page: PageIndex, error: ReadError) -> SourceError {
    let message = format!("page {} of the snapshot", page.0);
    match error.root() {
        ReadError::Io { source, .. } if !Permanent::is_in(source) => {
            SourceError::transient(message)
        }
        _ => SourceError::permanent(message),
    }
    .caused_by(error)
}

#[cfg(test)]
mod tests {
    use std::io;

    use snapfmt::Part;

    use super::*;
    use crate::source::error::SourceErrorKind;

    #[test]
    fn the_storage_says_whether_a_retry_may_help() {
        let kind = |source| {
            let error = ReadError::Io { part: Part::Header, offset: 0, len: 1, source };
            source_error(PageIndex(7), error).kind()
        };
        assert_eq!(kind(io::ErrorKind::TimedOut.into()), SourceErrorKind::Transient);
        let gone = Permanent::error(io::ErrorKind::NotFound, "the object was deleted");
        assert_eq!(kind(gone), SourceErrorKind::Permanent);
    }
}
