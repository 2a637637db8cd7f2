//! What can be wrong with a file and its tree.

use std::io;

use snapfmt::Permanent;

use crate::root::Root;

/// Bytes are not those that the root was computed of. Reads of a [`crate::HashedStorage`] return it inside of an
/// [`io::Error`] of kind `InvalidData`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HashError {
    /// Bytes of the file.
    #[error("the bytes {start} to {end} are not those that the root {root} was computed of", end = start + len)]
    Data {
        /// Offset of the first one.
        start: u64,
        /// How many, in bytes.
        len: u64,
        /// The expected root of the file.
        root: Root,
    },
    /// A node of the tree.
    #[error("the hash tree is damaged at offset {offset}, or not that of the root {root}")]
    Node {
        /// Offset of the node in the file of the tree.
        offset: u64,
        /// The expected root of the file.
        root: Root,
    },
}

impl HashError {
    /// The error in that of a read, if it is one.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref::<Permanent>()?.cause().downcast_ref()
    }
}

/// A file cannot be opened with a tree, or a tree cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// The file cannot be read, or has other bytes: see [`HashError`].
    #[error("cannot read the file")]
    File(#[source] io::Error),
    /// The tree cannot be read, or has wrong nodes: see [`HashError`].
    #[error("cannot read the hash tree")]
    Tree(#[source] io::Error),
    /// The tree is that of a file of another length.
    #[error("the hash tree is that of a file of {expected} bytes, the file has {found}")]
    Length {
        /// The length in the tree.
        expected: u64,
        /// The length of the file.
        found: u64,
    },
    /// The file of the tree has not as many bytes as the tree of this file has.
    #[error("the hash tree has {found} bytes, that of a file of {file_bytes} bytes has {expected}")]
    TreeLength {
        /// Length of the file in bytes.
        file_bytes: u64,
        /// Length of its tree in bytes.
        expected: u64,
        /// Length of the tree that was given.
        found: u64,
    },
    /// The tree cannot be written.
    #[error(transparent)]
    Write(#[from] snapfmt::WriteError),
    /// The caller has cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl TreeError {
    /// Whether the file or its tree is not the one that the root was computed of. Otherwise it could not be read.
    pub fn is_mismatch(&self) -> bool {
        match self {
            Self::File(error) | Self::Tree(error) => {
                HashError::of(error).is_some() || error.kind() == io::ErrorKind::UnexpectedEof
            }
            Self::Length { .. } | Self::TreeLength { .. } => true,
            Self::Write(_) | Self::Cancelled => false,
        }
    }
}
