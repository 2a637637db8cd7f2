//! Why a file cannot be imported or exported.

use std::io;
use std::path::{Path, PathBuf};

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ReadError, WriteError};

use super::mapped_ram_error::MappedRamError;
use crate::staged_output::OutputError;

/// Guest-physical ranges that cannot be a guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A range is empty.
    #[error("the memory range at {gpa:#x} is empty")]
    Empty {
        /// Guest physical address.
        gpa: u64,
    },
    /// A range does not start and end at a page.
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
    /// The ranges are not as long as the memory that they are for.
    #[error("the memory ranges have {found_bytes} bytes together, expected {expected_bytes}")]
    OtherLength {
        /// The sum of the lengths of the ranges.
        found_bytes: u64,
        /// The length of the memory.
        expected_bytes: u64,
    },
    /// The sum of their lengths, or the end of a range, does not fit in 64 bits.
    #[error("the memory ranges exceed 2^64 bytes")]
    TooLong,
}

/// The kind of a file that is not guest memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotMemory {
    /// It begins with the magic of this project's files.
    #[error("is a snapshot already")]
    Snapshot,
    /// It begins with the magic of an ELF file.
    #[error("is an ELF file, not a flat image of memory")]
    Elf,
    /// It begins with the magic of a migration stream of QEMU.
    #[error("is a migration file of QEMU, not a flat image of memory")]
    QemuMigration,
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
        /// The error of open(2), read(2), lseek(2) or readdir(3).
        #[source]
        error: io::Error,
    },
    /// The path is a folder, where a file is expected.
    #[error("{} is a folder, expected a file", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
    },
    /// The path is a pipe, a socket or a device. It has no length, and opening it could wait.
    #[error("{} is not a regular file", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
    },
    /// The file is not guest memory.
    #[error("{} {found}", path.display())]
    NotMemory {
        /// The file.
        path: PathBuf,
        /// The kind of the file.
        found: NotMemory,
    },
    /// The length of a memory image is not whole pages.
    #[error("{}: {len_bytes} bytes are not whole pages of {PAGE_BYTES} bytes", path.display())]
    NotPages {
        /// The image.
        path: PathBuf,
        /// Its length.
        len_bytes: u64,
    },
    /// The length of a Firecracker memory image is not whole MiB, which it is for each of its guests.
    #[error(
        "{}: {len_bytes} bytes are not whole MiB, as a Firecracker guest's memory is; the file was cut short or is \
         not memory",
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
        /// The sum of the lengths of its ranges.
        expected_bytes: u64,
    },
    /// The memory image is not as long as the memory of the guest to which the vmstate belongs.
    #[error(
        "{} is {found_bytes} bytes long, but the vmstate is of a guest with {expected_bytes} bytes of memory: they do \
         not belong together, or the file was cut short",
        path.display()
    )]
    OtherVmstate {
        /// The image.
        path: PathBuf,
        /// Its length.
        found_bytes: u64,
        /// The size in the vmstate.
        expected_bytes: u64,
    },
    /// The memory file of a Firecracker snapshot has holes. In that of a diff snapshot they mean memory of its base, in
    /// one that was copied sparsely they mean zeros.
    #[error(
        "{} has holes, {hole_bytes} bytes of {len_bytes}, as the memory file of a diff snapshot has",
        path.display()
    )]
    Holes {
        /// The image.
        path: PathBuf,
        /// The sum of the lengths of its holes.
        hole_bytes: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// The base of a diff snapshot has its memory at other addresses.
    #[error("{} is not a diff of this base: their memory maps differ", path.display())]
    OtherBase {
        /// The image.
        path: PathBuf,
    },
    /// A layer is to be written, and the caller has given no base for the holes of the memory image.
    #[error("{}: a layer needs the base of the diff snapshot", path.display())]
    NoBase {
        /// The image.
        path: PathBuf,
    },
    /// The vmstate has no magic of Firecracker, so the memory ranges are not known.
    #[error(
        "the file does not start like a vmstate of Firecracker; if it is one, give the guest's memory ranges"
    )]
    NoVmstate,
    /// A file of another program's state is larger than a state section may be.
    #[error("{}: {len_bytes} bytes; a {what} has at most {most_bytes}", path.display())]
    StateTooLong {
        /// The file.
        path: PathBuf,
        /// The expected kind of file.
        what: &'static str,
        /// Its length.
        len_bytes: u64,
        /// The length of the largest state section.
        most_bytes: u64,
    },
    /// `state.json` is not JSON, or lacks the memory manager.
    #[error("{}: {what}", path.display())]
    StateJson {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
        /// The error of the JSON parser.
        #[source]
        error: serde_json::Error,
    },
    /// Memory was not stored with the state: its zones are separate shared files.
    #[error(
        "{}: its table of memory ranges is empty: guest memory was not stored with it",
        path.display()
    )]
    NoRanges {
        /// The file `state.json`.
        path: PathBuf,
    },
    /// A migration file of QEMU is damaged, or is not of the kind that can be imported.
    #[error("{}", path.display())]
    MappedRam {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        error: MappedRamError,
    },
    /// The caller's ranges are not valid, or do not fit the memory image.
    #[error(transparent)]
    Ranges(Box<ImportError>),
    /// The ranges cannot be a guest's memory.
    #[error("{}", path.display())]
    Layout {
        /// The file that contains them, or the image if the caller gives them.
        path: PathBuf,
        /// The cause.
        #[source]
        error: LayoutError,
    },
    /// A file of a Cloud Hypervisor folder is missing or unreadable.
    #[error("{} is not a snapshot folder of Cloud Hypervisor", folder.display())]
    NoCloudHypervisor {
        /// The folder.
        folder: PathBuf,
        /// The file, and the cause.
        #[source]
        error: Box<ImportError>,
    },
    /// The snapshot cannot be written, or the image cannot be read meanwhile. [`WriteError::Cancelled`]: the caller's
    /// progress function has requested that.
    #[error("cannot import {}", path.display())]
    Write {
        /// The image.
        path: PathBuf,
        /// The cause.
        #[source]
        error: WriteError,
    },
}

impl ImportError {
    pub(super) fn io(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        |error| Self::Io { path: path.to_owned(), error }
    }

    /// Whether the bytes of a file are the cause: it is damaged, or of another kind.
    #[must_use]
    pub fn is_bad_file(&self) -> bool {
        match self {
            Self::NoCloudHypervisor { error, .. } => error.is_bad_file(),
            Self::MappedRam { error, .. } => !matches!(error, MappedRamError::Io(_)),
            Self::Io { .. }
            | Self::Folder { .. }
            | Self::NotRegular { .. }
            | Self::Ranges(_)
            | Self::Holes { .. }
            | Self::OtherBase { .. }
            | Self::NoBase { .. }
            | Self::Write { .. } => false,
            _ => true,
        }
    }
}

/// A snapshot that cannot be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The snapshot was not imported from files of this format.
    #[error("it has no {what} (state section {}); it was not imported from one", tag.to_le_bytes().escape_ascii())]
    NoState {
        /// The file that is missing.
        what: &'static str,
        /// The tag of its state section.
        tag: u32,
    },
    /// A newer release has stored the file in another form.
    #[error("its {what} is stored in version {found}, expected {expected}")]
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
    /// The imported `state.json` and the snapshot have different memory maps.
    #[error("its {what} and its memory map contradict each other")]
    MemoryMap {
        /// The file.
        what: &'static str,
    },
    /// The state section of a migration file of QEMU cannot be decoded.
    #[error("its {what} cannot be decoded")]
    Skeleton {
        /// The file.
        what: &'static str,
    },
    /// Asynchronous page faults cannot be switched off in this vmstate.
    #[error(
        "the vmstate is not one of Firecracker for x86_64 that ends with a valid checksum: asynchronous page faults \
         cannot be switched off in it; boot the guest with `no-kvmapf` instead"
    )]
    AsyncPageFaults,
    /// Other formats have no vmstate.
    #[error(
        "asynchronous page faults are switched off in a Firecracker vmstate, which this format does not have"
    )]
    NotFirecracker,
    /// The snapshot is damaged or cannot be read. [`ReadError::Cancelled`]: the caller's progress function has
    /// requested that.
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
        /// The error of write(2) or ftruncate(2).
        #[source]
        error: io::Error,
    },
    /// The stream cannot be written.
    #[error("cannot write the whole stream")]
    Stream(#[source] io::Error),
}

impl ExportError {
    pub(super) fn write(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        |error| Self::Write { path: path.to_owned(), error }
    }
}
