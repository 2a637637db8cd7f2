//! Checks every read of a file against its BLAKE3 root, without reading the whole file first.
//!
//! The root is the plain BLAKE3 hash of the file, as `b3sum` prints it. [`write_tree`] stores the tree of hashes below
//! it in a file of its own, which is a 250th of the size. With it, [`HashedStorage`] checks any read against the root: it
//! reads and hashes the groups of 16 KiB that the read touches, and the path from them to the root.
//!
//! A checksum in a file detects accidents. Whoever changes the file on purpose also changes its checksums; the root
//! does not come from the file, but from the caller, or from a list of roots with a signature: [`Roots`].
//!
//! # What it does
//! - Checks every read, also the second of the same bytes: the file may be changed while it is read.
//! - Opens in constant time, whatever the size of the file.
//! - Needs no trust in the file of the tree: a wrong node is an error, like a wrong byte of the data.
//!
//! # What it does not do
//! - It does not detect that a file is an old version, if that version has a valid root or signature too.
//! - It does not encrypt.
//!
//! # Example
//! ```
//! use std::fs::File;
//! use std::ops::ControlFlow;
//! use hashtree::{HashedStorage, tree_path, write_tree};
//! use snapfmt::{Existing, ReadAt};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! let path = folder.path().join("data");
//! std::fs::write(&path, vec![7; 100_000])?;
//! let root = write_tree(&File::open(&path)?, &tree_path(&path), Existing::Keep, &|_, _| ControlFlow::Continue(()))?;
//!
//! let checked = HashedStorage::open(File::open(&path)?, File::open(tree_path(&path))?, root)?;
//! let mut bytes = [0; 10];
//! checked.read_exact_at(&mut bytes, 99_990)?;
//! assert_eq!(bytes, [7; 10]);
//!
//! std::fs::write(&path, vec![8; 100_000])?;
//! assert!(checked.read_exact_at(&mut bytes, 99_990).is_err());
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod build;
mod chain;
mod error;
mod root;
mod roots;
mod shape;
mod storage;
mod values;

pub use build::{OnHashed, write_tree};
pub use chain::{ChainRootsError, check_chain};
pub use error::{HashError, TreeError};
pub use root::{Root, WrongRoot};
pub use roots::{Roots, RootsError};
pub use shape::{GROUP_BYTES, tree_bytes, tree_path};
pub use storage::HashedStorage;
