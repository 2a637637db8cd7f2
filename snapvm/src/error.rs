//! What can go wrong, with the values that tell why.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

use pager::shared::ShareError;
use pager::{Failure, with_causes};
use snapfmt::{ReadError, WriteError};
use vmm::state::StateError;

use crate::devices::DeviceError;

type Cause = Box<dyn StdError + Send + Sync>;

/// Guest memory that cannot be mapped, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// As mmap(2).
    #[error("cannot map guest memory")]
    Map(#[source] Cause),
    /// The mapped regions are not those of the snapshot.
    #[error("guest memory is not mapped as the snapshot says")]
    Layout,
    /// A raw image cannot be opened or read.
    #[error("{}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// As open(2) or fstat(2).
        #[source]
        error: io::Error,
    },
    /// A raw image is not as long as the guest's memory: a mapping beyond its end would be SIGBUS.
    #[error("{} is {found} bytes long, expected {expected}", path.display())]
    ImageLength {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The guest's memory in bytes.
        expected: u64,
    },
    /// Guest memory cannot be written.
    #[error("cannot write guest memory at gpa {gpa:#x}")]
    Write {
        /// Guest physical address.
        gpa: u64,
        /// Why.
        #[source]
        error: Cause,
    },
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// How it failed.
        #[source]
        error: io::Error,
    },
}

impl MemoryError {
    pub(crate) fn map(error: impl Into<Cause>) -> Self {
        Self::Map(error.into())
    }

    pub(crate) fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::System { what, error }
    }
}

/// A guest cannot run on: the file, or the page server, did not give a page of its memory.
#[derive(Clone, Debug, thiserror::Error)]
#[error("guest stopped: {}: {reason}", file.display())]
pub struct GuestFailure {
    /// The snapshot.
    pub file: PathBuf,
    /// What failed, with all causes, in one line.
    pub reason: String,
}

impl GuestFailure {
    pub(crate) fn new(file: &Path, reason: String) -> Self {
        Self { file: file.to_owned(), reason }
    }

    pub(crate) fn of_pager(file: &Path, failure: &Failure) -> Self {
        Self::new(file, with_causes(failure))
    }
}

/// A guest that cannot be restored. Each variant names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The file cannot be opened; the error names it.
    #[error(transparent)]
    Open(ReadError),
    /// The file, or a parent of it, is damaged or cannot be read; or the observer has cancelled an eager restore.
    #[error("{}", file.display())]
    Read {
        /// The snapshot.
        file: PathBuf,
        /// Why.
        #[source]
        error: ReadError,
    },
    /// The file has no state of this VMM: it was imported, or written by another program.
    #[error("{}: the file has no state of a KVM guest: it cannot be restored by snap", file.display())]
    NoState {
        /// The snapshot.
        file: PathBuf,
    },
    /// The state cannot be decoded.
    #[error("{}", file.display())]
    State {
        /// The snapshot.
        file: PathBuf,
        /// Why.
        #[source]
        error: StateError,
    },
    /// The file contradicts itself.
    #[error("{}: the memory map of the file and that of the guest's state are not the same", file.display())]
    MemoryMap {
        /// The snapshot.
        file: PathBuf,
    },
    /// This host's CPU lacks features that the guest uses: see [`crate::RestoreConfig::force_cpu`].
    #[error("{}: this host's CPU lacks what the guest was given: {}", file.display(), missing.join(", "))]
    Cpu {
        /// The snapshot.
        file: PathBuf,
        /// Names of the features.
        missing: Vec<String>,
    },
    /// KVM does not tell which features this host's CPU has.
    #[error("{}", file.display())]
    Features {
        /// The snapshot.
        file: PathBuf,
        /// Why.
        #[source]
        error: vmm::FeaturesError,
    },
    /// A device cannot be connected to this host.
    #[error("{}", file.display())]
    Device {
        /// The snapshot.
        file: PathBuf,
        /// Which, and why.
        #[source]
        error: DeviceError,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The page server does not share its memory.
    #[error("cannot share memory by {}", socket.display())]
    Share {
        /// The server's socket.
        socket: PathBuf,
        /// Why.
        #[source]
        error: ShareError,
    },
    /// The pager cannot be started: this host has no userfaultfd, or this process may not use it.
    #[error("cannot restore lazily")]
    Pager(#[source] pager::StartError),
    /// Guest memory does not fit the pager's rules.
    #[error("cannot restore lazily")]
    Region(#[source] pager::RegionError),
    /// The pages that the guest touches cannot be recorded.
    #[error("cannot record which pages are touched")]
    Record(#[source] Cause),
    /// KVM refuses the machine.
    #[error("cannot restore {}", file.display())]
    Machine {
        /// The snapshot.
        file: PathBuf,
        /// Why.
        #[source]
        error: vmm::RestoreError,
    },
    /// A page that the machine needs cannot be had.
    #[error(transparent)]
    Failed(GuestFailure),
}

/// A guest that cannot be written to a snapshot. It stays paused, and can run on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The output is the snapshot, or a parent of it, that the guest's missing pages come from.
    #[error("{} is read, itself or as a parent; choose another output", out.display())]
    OutputIsInput {
        /// The output.
        out: PathBuf,
    },
    /// A layer needs a parent, and the guest was not restored from one.
    #[error("the guest was not brought back from a snapshot that a layer could build on")]
    NotRestored,
    /// There is no address space for the writer: see RLIMIT_AS. One thread needs less.
    #[error("no memory to store the guest ({} MiB; fewer threads take less)", needed_bytes >> 20)]
    NoRoom {
        /// What the writer needs, in bytes.
        needed_bytes: usize,
        /// As mmap(2).
        #[source]
        error: io::Error,
    },
    /// A page of the guest could not be had: its memory is not complete.
    #[error(transparent)]
    Failed(GuestFailure),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM does not give the state.
    #[error(transparent)]
    State(#[from] vmm::SaveError),
    /// A device's content cannot be read.
    #[error("a device of the guest cannot be stored")]
    Device(#[source] io::Error),
    /// The snapshot that the guest was restored from.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The new file. [`WriteError::Cancelled`]: the caller's progress function has asked for that.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The way from the layer to its parent.
    #[error("cannot find the folder of {}", path.display())]
    ParentPath {
        /// The parent.
        path: PathBuf,
        /// As realpath(3).
        #[source]
        error: io::Error,
    },
    /// A snapshot that is open already cannot be looked at.
    #[error("cannot look at an open snapshot")]
    Look(#[source] io::Error),
}

/// A guest that cannot be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// No guest has this much memory.
    #[error(transparent)]
    Layout(#[from] vmm::LayoutError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM, or the kernel image.
    #[error("cannot boot the guest")]
    Machine(#[source] vmm::BootError),
}
