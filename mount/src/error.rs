//! Errors of a mount.

use std::io;
use std::path::PathBuf;

use snapvm::interchange::ExportError;
use snapvm::snapfmt::ReadError;

/// Why a snapshot is not mounted, or a mount has failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The folder cannot be used.
    #[error("{}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// The server of an earlier mount has died, and its mount is still there.
    #[error("{} is the mount of a server that has died; unmount it first (fusermount3 -u, or umount)", folder.display())]
    Dead {
        /// The folder.
        folder: PathBuf,
    },
    /// The files cannot be described.
    #[error("cannot describe the files")]
    Files(#[from] ExportError),
    /// This host has no /dev/fuse.
    #[error(
        "cannot open /dev/fuse: a mount needs it (kernel module `fuse`; in a container the device must be given)"
    )]
    NoFuse(#[source] io::Error),
    /// The kernel or fusermount3 refuses the mount.
    #[error("cannot mount at {} (it needs root, or the program fusermount3 of the package fuse3)", folder.display())]
    Mount {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// A thread or pipe cannot be created.
    #[error("cannot start the threads of a mount")]
    Start(#[source] io::Error),
    /// The requests of the kernel cannot be read any more.
    #[error("the mount has failed")]
    Serve(#[source] io::Error),
    /// The kernel or fusermount3 refuses to unmount it.
    #[error("cannot unmount {}", folder.display())]
    Unmount {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
}

/// What happens at a mount.
#[derive(Debug)]
#[non_exhaustive]
pub enum MountEvent<'a> {
    /// Readers are answered.
    Ready,
    /// A read got EIO. A chunk that is damaged is reported once.
    Failed(&'a ReadFailure),
    /// The folder is unmounted. Files that are open or mapped are served until the last one is closed.
    Detached,
}

/// A read that got EIO, because the snapshot is unreadable or damaged there.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {len_bytes} bytes at offset {offset} cannot be read")]
#[non_exhaustive]
pub struct ReadFailure {
    /// The path of the file below the mount.
    pub file: String,
    /// The offset of the read.
    pub offset: u64,
    /// How much was to be read. The kernel reads ahead: its next request is for single pages.
    pub len_bytes: u64,
    /// Why.
    #[source]
    pub error: ReadError,
}
