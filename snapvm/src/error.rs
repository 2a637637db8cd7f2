//! The errors of this library, with the values that explain them.

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
    /// Guest memory cannot be mapped.
    #[error("cannot map guest memory")]
    Map(#[source] Cause),
    /// The mapped regions are not those of the snapshot.
    #[error("guest memory is not mapped with the regions of the snapshot")]
    Layout,
    /// A raw image cannot be opened or read.
    #[error("{}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// The error of open(2) or fstat(2), or the image has changed.
        #[source]
        error: io::Error,
    },
    /// A raw image is not as long as the guest's memory: touching a page beyond its end would raise SIGBUS.
    #[error("{} is {found} bytes long, expected {expected}", path.display())]
    ImageLength {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The guest's memory in bytes.
        expected: u64,
    },
    /// Guest memory cannot be read.
    #[error("cannot read guest memory at gpa {gpa:#x}")]
    Read {
        /// Guest physical address.
        gpa: u64,
        /// The cause.
        #[source]
        error: Cause,
    },
    /// Guest memory cannot be written.
    #[error("cannot write guest memory at gpa {gpa:#x}")]
    Write {
        /// Guest physical address.
        gpa: u64,
        /// The cause.
        #[source]
        error: Cause,
    },
    /// A system call failed.
    #[error("{what}")]
    System {
        /// The operation.
        what: &'static str,
        /// The error of the system call.
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

/// A guest cannot continue, because a page of its memory could not be loaded from the file or the page server.
#[derive(Clone, Debug, thiserror::Error)]
#[error("guest stopped: {}: {reason}", file.display())]
pub struct GuestFailure {
    /// The snapshot.
    pub file: PathBuf,
    /// The error with all its causes, in one line.
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
        /// The cause.
        #[source]
        error: ReadError,
    },
    /// The file has no state of this VMM: it was imported, or written by another program.
    #[error("{}: the file has no state of a KVM guest: snap cannot restore it", file.display())]
    NoState {
        /// The snapshot.
        file: PathBuf,
    },
    /// The file has the state of a guest of another virtual machine monitor.
    #[error(
        "{}: it is a guest of {program}, which can run it; snap can only export, mount and, for Firecracker, serve it",
        file.display()
    )]
    Foreign {
        /// The snapshot.
        file: PathBuf,
        /// The virtual machine monitor.
        program: &'static str,
    },
    /// The state cannot be decoded.
    #[error("{}", file.display())]
    State {
        /// The snapshot.
        file: PathBuf,
        /// The cause.
        #[source]
        error: StateError,
    },
    /// The memory map of the file and that of the guest's state differ.
    #[error("{}: the memory map of the file and that of the guest's state differ", file.display())]
    MemoryMap {
        /// The snapshot.
        file: PathBuf,
    },
    /// This host's CPU lacks features that the guest uses: see [`crate::RestoreConfig::force_cpu`].
    #[error("{}: this host's CPU lacks features that the guest uses: {}", file.display(), missing.join(", "))]
    Cpu {
        /// The snapshot.
        file: PathBuf,
        /// Names of the features.
        missing: Vec<String>,
    },
    /// KVM does not report the features of this host's CPU.
    #[error("{}", file.display())]
    Features {
        /// The snapshot.
        file: PathBuf,
        /// The cause.
        #[source]
        error: vmm::FeaturesError,
    },
    /// A device cannot be connected to this host.
    #[error("{}", file.display())]
    Device {
        /// The snapshot.
        file: PathBuf,
        /// The device, and the cause.
        #[source]
        error: DeviceError,
    },
    /// Guest memory cannot be mapped, read or written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The page server does not share its memory.
    #[error("cannot share memory through {}", socket.display())]
    Share {
        /// The server's socket.
        socket: PathBuf,
        /// The cause.
        #[source]
        error: ShareError,
    },
    /// The pager cannot be started: this host has no userfaultfd, or this process may not use it.
    #[error("cannot restore lazily")]
    Pager(#[source] pager::StartError),
    /// The pager cannot serve a region of guest memory.
    #[error("cannot restore lazily")]
    Region(#[source] pager::RegionError),
    /// The pages that the guest touches cannot be recorded.
    #[error("cannot record which pages are touched")]
    Record(#[source] Cause),
    /// The machine cannot be built from its state.
    #[error("cannot restore {}", file.display())]
    Machine {
        /// The snapshot.
        file: PathBuf,
        /// The cause.
        #[source]
        error: vmm::RestoreError,
    },
    /// A page that the building of the machine touches cannot be loaded.
    #[error(transparent)]
    Failed(GuestFailure),
}

/// A guest that cannot be written to a snapshot. It stays paused and can be resumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The output is the input, or a parent of it, from which pages are still read.
    #[error("{} is the input, or a parent of it; choose another output", out.display())]
    OutputIsInput {
        /// The output.
        out: PathBuf,
    },
    /// A layer needs a parent, and the guest was not restored from a snapshot.
    #[error("the guest was not restored from a snapshot, which a layer needs as its parent")]
    NotRestored,
    /// Changes need a point in time that they are relative to, and none was saved.
    #[error("no earlier point in time of the guest was saved, to which changes would be relative")]
    NothingSaved,
    /// The guest writes to a file that is not part of its state. While the guest runs, that file changes, and no longer
    /// matches the snapshot.
    #[error(
        "the guest writes to {}, which would be newer than the snapshot: give it an overlay for its disks, or let the guest \
         be paused until the snapshot is complete", path.display()
    )]
    OutsideFile {
        /// The disk.
        path: PathBuf,
    },
    /// Such a guest cannot be written while it runs.
    #[error(
        "a guest {what} cannot be snapshotted while it runs: let it be paused until the snapshot is complete"
    )]
    NotLive {
        /// What its memory is.
        what: &'static str,
    },
    /// The guest's memory cannot be protected from writes, so it cannot be written while it runs.
    #[error(
        "the guest's memory cannot be protected while it runs: let it be paused until the snapshot is complete"
    )]
    Window(#[source] pager::window::WindowError),
    /// The writer has too little address space: see RLIMIT_AS. Fewer threads need less.
    #[error("no memory to snapshot the guest ({} MiB; fewer threads need less)", needed_bytes >> 20)]
    NoRoom {
        /// The address space that the writer needs, in bytes.
        needed_bytes: usize,
        /// The error of mmap(2).
        #[source]
        error: io::Error,
    },
    /// A page of the guest could not be loaded, so its memory is not complete.
    #[error(transparent)]
    Failed(GuestFailure),
    /// Guest memory cannot be mapped, read or written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The state of the machine cannot be read.
    #[error(transparent)]
    State(#[from] vmm::SaveError),
    /// A device's content cannot be read.
    #[error("cannot read the content of a device")]
    Device(#[source] io::Error),
    /// The snapshot from which the guest was restored cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The new file cannot be written. [`WriteError::Cancelled`]: the caller's progress function has requested that.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The path from the layer to its parent cannot be found.
    #[error("cannot find the folder of {}", path.display())]
    ParentPath {
        /// The parent.
        path: PathBuf,
        /// The error of realpath(3).
        #[source]
        error: io::Error,
    },
    /// The parent's path names no file, or another one than the open parent: the layer could not be opened.
    #[error("{} is no longer the file that is open: a layer on it could not be opened", path.display())]
    ParentReplaced {
        /// The parent.
        path: PathBuf,
    },
    /// fstat(2) of an open snapshot failed.
    #[error("cannot identify the file of an open snapshot")]
    Look(#[source] io::Error),
}

/// A guest that cannot be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// A guest cannot have this amount of memory.
    #[error(transparent)]
    Layout(#[from] vmm::LayoutError),
    /// Guest memory cannot be mapped, read or written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The machine cannot be built, or its payload cannot be loaded.
    #[error("cannot boot the guest")]
    Machine(#[source] vmm::BootError),
}
