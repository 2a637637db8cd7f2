//! A snapshot whose files are all checked against their roots.

use std::io;
use std::path::PathBuf;

use snapfmt::{ReadError, Snapshot, Storage, open_file};

use crate::error::TreeError;
use crate::root::Root;
use crate::shape::tree_path;
use crate::storage::HashedStorage;

/// A snapshot cannot be checked against the roots.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainRootsError {
    /// The snapshot has not as many files as there are roots.
    #[error(
        "the snapshot has {files} file(s), itself and its parents, and {roots} root(s) are given: each file needs its own"
    )]
    Number {
        /// The files of the chain.
        files: usize,
        /// The roots.
        roots: usize,
    },
    /// A file of the chain is an object in a bucket, whose tree is not stored there.
    #[error("{path}: only a file can be checked against a root")]
    NotAFile {
        /// The address.
        path: PathBuf,
    },
    /// The tree of a file cannot be opened.
    #[error("cannot open its hash tree {path}")]
    NoTree {
        /// The path of the tree.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not have its root.
    #[error("{path}")]
    Tree {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TreeError,
    },
    /// The bytes are right, but the snapshot cannot be opened.
    #[error("the snapshot has its roots, but cannot be opened")]
    Snapshot(#[source] ReadError),
}

/// Opens a snapshot once more, with all reads checked: `roots` are those of the file itself, of its parent, and so on.
/// Their trees are beside the files: see [`tree_path`].
///
/// Of `snapshot` only the opened files are used: what was read from them before was not checked.
///
/// # Errors
/// [`ChainRootsError`]
pub fn check_chain(snapshot: Snapshot, roots: &[Root]) -> Result<Snapshot, ChainRootsError> {
    let files = snapshot.headers().len();
    if files != roots.len() {
        return Err(ChainRootsError::Number { files, roots: roots.len() });
    }
    let checked = |((storage, path), root): ((Storage, Option<PathBuf>), &Root)| {
        let path = path.unwrap_or_default();
        if storage.file().is_none() {
            return Err(ChainRootsError::NotAFile { path });
        }
        let tree_path = tree_path(&path);
        let tree = open_file(&tree_path)
            .map_err(|source| ChainRootsError::NoTree { path: tree_path, source })?;
        match HashedStorage::open(storage, tree, *root) {
            Ok(storage) => Ok((Storage::other(storage), path)),
            Err(source) => Err(ChainRootsError::Tree { path, source }),
        }
    };
    let keys = snapshot.keys().cloned();
    let storages: Vec<_> =
        snapshot.into_storages().zip(roots).map(checked).collect::<Result<_, _>>()?;
    Snapshot::named_chain_with(storages, keys).map_err(ChainRootsError::Snapshot)
}
