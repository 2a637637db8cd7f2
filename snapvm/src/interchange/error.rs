//! Why a file cannot be imported or exported.

use std::io;
use std::path::{Path, PathBuf};

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ReadError, WriteError};

use crate::staged_output::OutputError;

/// Guest-physical ranges that are not a memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A range without bytes.
    #[error("the memory range at {gpa:#x} is empty")]
    Empty {
        /// Guest physical address.
        gpa: u64,
    },
    /// A range that does not start and end at a page.
    #[error("the memory range {start:#x}..{end:#x} is not whole pages of {PAGE_BYTES} bytes")]
    NotPages {
        /// Guest physical address.
        start: u64,
        /// Guest physical address of its end.
        end: u64,
    },
    /// Two ranges share a page.
    #[error("two memory ranges overlap at gpa {gpa:#x}")]
    Overlap {
        /// Guest physical address.
        gpa: u64,
    },
    /// Their lengths do not add up in 64 bits.
    #[error("the memory ranges have more than 2^64 bytes")]
    TooLong,
}

/// What a file is instead of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotMemory {
    /// It begins with the magic of this project's files.
    #[error("is a snapshot already")]
    Snapshot,
    /// It begins with the magic of an ELF file.
    #[error("is an ELF file, not a flat image of memory")]
    Elf,
    /// It has no bytes.
    #[error("is empty")]
    Empty,
}

/// A memory image, or a snapshot of another program, that cannot be imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// A file cannot be opened or read.
    #[error("{}", path.display())]
    Io {
        /// The file, or the folder.
        path: PathBuf,
        /// As open(2), read(2), lseek(2) or readdir(3).
        #[source]
        error: io::Error,
    },
    /// A folder where a file is expected.
    #[error("{} is a folder, expected a file", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
    },
    /// A pipe, a socket or a device: it has no length, and opening it could wait.
    #[error("{} is not a regular file", path.display())]
    NotRegular {
        /// What is there.
        path: PathBuf,
    },
    /// The file is something else than memory.
    #[error("{} {found}", path.display())]
    NotMemory {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: NotMemory,
    },
    /// A memory image does not end with a page.
    #[error("{}: {len_bytes} bytes are not whole pages of {PAGE_BYTES} bytes", path.display())]
    NotPages {
        /// The image.
        path: PathBuf,
        /// Its length.
        len_bytes: u64,
    },
    /// A memory image of Firecracker does not end with a MiB, as each of its guests does.
    #[error(
        "{}: {len_bytes} bytes are not whole MiB, as a Firecracker guest's memory is; the file was cut short or is \
         something else",
        path.display()
    )]
    NotMebibytes {
        /// The image.
        path: PathBuf,
        /// Its length.
        len_bytes: u64,
    },
    /// The memory image is not as long as its ranges.
    #[error(
        "{} is {found_bytes} bytes long, expected {expected_bytes}{}",
        path.display(),
        if found_bytes < expected_bytes { ": it was cut short" } else { "" }
    )]
    Length {
        /// The image.
        path: PathBuf,
        /// Its length.
        found_bytes: u64,
        /// The sum of its ranges.
        expected_bytes: u64,
    },
    /// The vmstate has no magic of Firecracker, so where memory lies is not known.
    #[error(
        "the file does not start like a vmstate of Firecracker; if it is one, give the guest's memory ranges"
    )]
    NoVmstate,
    /// A file of another program's state is larger than a state section.
    #[error("{}: {len_bytes} bytes; a {what} has at most {most_bytes}", path.display())]
    StateTooLong {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// Its length.
        len_bytes: u64,
        /// The length of the largest section.
        most_bytes: u64,
    },
    /// `state.json` is not JSON, or lacks the memory manager.
    #[error("{}: {what}", path.display())]
    StateJson {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
        /// Where.
        #[source]
        error: serde_json::Error,
    },
    /// Memory was not snapshotted with the state: its zones are shared files of their own.
    #[error(
        "{}: its table of memory ranges is empty: guest memory was not stored with it",
        path.display()
    )]
    NoRanges {
        /// The file `state.json`.
        path: PathBuf,
    },
    /// The ranges that the caller gives do not fit the memory image, or each other.
    #[error(transparent)]
    Ranges(Box<ImportError>),
    /// The ranges are not a memory.
    #[error("{}", path.display())]
    Layout {
        /// The file that gives them; the image if the caller does.
        path: PathBuf,
        /// Why.
        #[source]
        error: LayoutError,
    },
    /// A file of a Cloud Hypervisor folder is missing or unreadable.
    #[error("{} is no snapshot folder of Cloud Hypervisor", folder.display())]
    NoCloudHypervisor {
        /// The folder.
        folder: PathBuf,
        /// Which file, and why.
        #[source]
        error: Box<ImportError>,
    },
    /// The snapshot cannot be written, or the image cannot be read meanwhile. [`WriteError::Cancelled`]: the caller's
    /// progress function has requested that.
    #[error("import of {}", path.display())]
    Write {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        error: WriteError,
    },
}

impl ImportError {
    pub(super) fn io(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        |error| Self::Io { path: path.to_owned(), error }
    }

    /// Whether the bytes of a file are the cause: it is damaged, or is something else.
    #[must_use]
    pub fn is_bad_file(&self) -> bool {
        match self {
            Self::NoCloudHypervisor { error, .. } => error.is_bad_file(),
            Self::Io { .. }
            | Self::Folder { .. }
            | Self::NotRegular { .. }
            | Self::Ranges(_)
            | Self::Write { .. } => false,
            _ => true,
        }
    }
}

/// A snapshot that cannot be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The snapshot was not imported from this program's files.
    #[error("it holds no {what} (state section {}); it was not imported from one", tag.to_le_bytes().escape_ascii())]
    NoState {
        /// The file that is missing.
        what: &'static str,
        /// The tag of its state section.
        tag: u32,
    },
    /// A newer release has imported it in another way.
    #[error("its {what} is kept in version {found}, expected {expected}")]
    StateVersion {
        /// The file.
        what: &'static str,
        /// Version of its state section.
        found: u32,
        /// The version that this release reads.
        expected: u32,
    },
    /// The imported `state.json` cannot be used.
    #[error(transparent)]
    State(ImportError),
    /// The imported `state.json` and the snapshot contradict each other.
    #[error("its {what} and its memory map say different things")]
    MemoryMap {
        /// The file.
        what: &'static str,
    },
    /// The vmstate is not one in which asynchronous page faults can be switched off.
    #[error(
        "the vmstate is not one of Firecracker for x86_64 that ends with a right checksum: asynchronous page faults \
         cannot be switched off in it; boot the guest with `no-kvmapf` instead"
    )]
    AsyncPageFaults,
    /// Other formats have no vmstate.
    #[error(
        "asynchronous page faults are switched off in a Firecracker vmstate, which this format does not have"
    )]
    NotFirecracker,
    /// The snapshot is damaged or cannot be read. [`ReadError::Cancelled`]: the caller's progress function has requested
    /// that.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The output's files cannot be created.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The output cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The output.
        path: PathBuf,
        /// As write(2) or ftruncate(2).
        #[source]
        error: io::Error,
    },
    /// The stream cannot be written.
    #[error("cannot write all of it")]
    Stream(#[source] io::Error),
}

impl ExportError {
    pub(super) fn write(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        |error| Self::Write { path: path.to_owned(), error }
    }
}
