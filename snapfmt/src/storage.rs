//! The storage of a snapshot that was opened by its name: a file, or whatever else the caller can read from.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;

use crate::guard::Stamp;
use crate::read_at::{ReadAt, WhenHere};

/// A file, or other storage, for example an object in a bucket.
///
/// A type of its own and not `Box<dyn ReadAt>`, so that reads of files stay direct calls, and because some callers need
/// the file itself: to compare it with an output, or to drop it from the page cache.
#[non_exhaustive]
pub enum Storage {
    /// A file of this host.
    File(File),
    /// Anything else.
    Other(Box<dyn ReadAt>),
}

impl Storage {
    /// Storage that is not a file.
    pub fn other(storage: impl ReadAt + 'static) -> Self {
        Self::Other(Box::new(storage))
    }

    /// The file, if the bytes are in one.
    pub fn file(&self) -> Option<&File> {
        match self {
            Self::File(file) => Some(file),
            Self::Other(other) => other.file(),
        }
    }
}

impl From<File> for Storage {
    fn from(file: File) -> Self {
        Self::File(file)
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => f.debug_tuple("File").field(file).finish(),
            Self::Other(_) => f.debug_tuple("Other").finish_non_exhaustive(),
        }
    }
}

impl ReadAt for Storage {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::File(file) => ReadAt::read_exact_at(file, buf, offset),
            Self::Other(other) => other.read_exact_at(buf, offset),
        }
    }

    fn len_bytes(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => file.len_bytes(),
            Self::Other(other) => other.len_bytes(),
        }
    }

    fn file(&self) -> Option<&File> {
        self.file()
    }

    fn file_to_copy(&self) -> Option<&File> {
        match self {
            Self::File(file) => Some(file),
            Self::Other(other) => other.file_to_copy(),
        }
    }

    fn stamp(&self) -> io::Result<Option<Stamp>> {
        match self {
            Self::File(file) => file.stamp(),
            Self::Other(other) => other.stamp(),
        }
    }

    fn expect(&self, bytes: Range<u64>) {
        match self {
            Self::File(file) => file.expect(bytes),
            Self::Other(other) => other.expect(bytes),
        }
    }

    fn ahead_bytes(&self) -> u64 {
        match self {
            Self::File(file) => file.ahead_bytes(),
            Self::Other(other) => other.ahead_bytes(),
        }
    }

    fn expect_random(&self) {
        match self {
            Self::File(file) => file.expect_random(),
            Self::Other(other) => other.expect_random(),
        }
    }

    fn is_cached(&self, offset: u64) -> Option<bool> {
        match self {
            Self::File(file) => file.is_cached(offset),
            Self::Other(other) => other.is_cached(offset),
        }
    }

    fn is_remote(&self) -> bool {
        match self {
            Self::File(file) => file.is_remote(),
            Self::Other(other) => other.is_remote(),
        }
    }

    fn would_wait(&self, bytes: Range<u64>) -> bool {
        match self {
            Self::File(file) => file.would_wait(bytes),
            Self::Other(other) => other.would_wait(bytes),
        }
    }

    fn when_here(&self, bytes: Range<u64>, here: WhenHere) {
        match self {
            Self::File(file) => file.when_here(bytes, here),
            Self::Other(other) => other.when_here(bytes, here),
        }
    }

    fn release(&self, bytes: Range<u64>) {
        match self {
            Self::File(file) => file.release(bytes),
            Self::Other(other) => other.release(bytes),
        }
    }

    fn in_order(&self) -> Option<Box<dyn ReadAt>> {
        match self {
            Self::File(file) => file.in_order(),
            Self::Other(other) => other.in_order(),
        }
    }

    fn refetch(&self, bytes: Range<u64>) -> bool {
        match self {
            Self::File(file) => file.refetch(bytes),
            Self::Other(other) => other.refetch(bytes),
        }
    }
}

/// An error of a storage after which another try does not help, for example because the object was deleted, or because
/// the storage has tried for long enough itself. It stands inside of an [`io::Error`]; the page service fails such a page
/// without a retry.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Permanent(Box<dyn Error + Send + Sync>);

impl Permanent {
    /// An I/O error of this kind that no retry helps against.
    pub fn error(kind: io::ErrorKind, cause: impl Into<Box<dyn Error + Send + Sync>>) -> io::Error {
        io::Error::new(kind, Self(cause.into()))
    }

    /// Whether an I/O error is one of these.
    pub fn is_in(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }

    /// The cause.
    pub fn cause(&self) -> &(dyn Error + Send + Sync + 'static) {
        &*self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_whether_a_retry_may_help() {
        let gone = Permanent::error(io::ErrorKind::NotFound, "the object was deleted");
        assert!(Permanent::is_in(&gone));
        assert_eq!(gone.to_string(), "the object was deleted");
        assert!(!Permanent::is_in(&io::ErrorKind::TimedOut.into()));
        assert!(!Permanent::is_in(&io::Error::other("a lost connection")));
    }

    #[test]
    fn what_is_no_file_is_read_as_it_is() {
        let storage = Storage::other(vec![1u8, 2, 3]);
        let mut bytes = [0; 2];
        storage.read_exact_at(&mut bytes, 1).unwrap();
        assert_eq!((bytes, storage.len_bytes().unwrap()), ([2, 3], 3));
        assert!(storage.file().is_none() && storage.stamp().unwrap().is_none());
        let file = Storage::from(tempfile::tempfile().unwrap());
        assert!(file.file().is_some() && file.stamp().unwrap().is_some());
    }
}
