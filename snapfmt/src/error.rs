//! Errors of reading and writing, with the values that are needed to find the place.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::guard::Stamp;
use crate::seal::KeyError;
use crate::section::SectionKind;

/// Why a snapshot could not be opened or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A file cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The error is in one of the parents and not in the file itself.
    #[error("parent {}", parent_name(path.as_deref(), id))]
    InParent {
        /// Which one: 1 the file's own parent, 2 the parent's, and so on.
        layer: u16,
        /// Its id.
        id: Uuid,
        /// Where it is, if it was opened by path.
        path: Option<PathBuf>,
        /// The error there.
        source: Box<ReadError>,
    },
    /// The storage failed.
    #[error("cannot read {len} bytes at offset {offset} ({part})")]
    Io {
        /// What was being read.
        part: Part,
        /// Where, in bytes from the start of the file.
        offset: u64,
        /// How much.
        len: u64,
        /// The storage's own error.
        source: io::Error,
    },
    /// The first bytes are not those of a snapshot.
    #[error(
        "not a snapshot: the file starts with \"{}\", a snapshot with \"{}\"",
        found.escape_ascii(),
        expected.escape_ascii()
    )]
    NotASnapshot {
        /// The magic of a snapshot.
        expected: [u8; 8],
        /// The bytes found.
        found: [u8; 8],
    },
    /// The file ends too early.
    #[error("the file is {found} bytes long, expected {expected}: it was cut short or extended")]
    WrongLength {
        /// Length by the header, or the least that a header needs.
        expected: u64,
        /// Length of the file.
        found: u64,
    },
    /// The file was written in a version of the format that this library does not know.
    #[error("format version {found}; this build reads version {supported}: use a newer one")]
    UnsupportedVersion {
        /// Version in the header.
        found: u32,
        /// The version that this library reads.
        supported: u32,
    },
    /// The file needs a feature that this library does not have.
    #[error("the file needs features {unknown:#x} that this build does not know: use a newer one")]
    UnsupportedFeatures {
        /// Set bits of the incompatible kind that are not known here.
        unknown: u64,
    },
    /// A chunk is stored in a codec that was left out of this build.
    #[error("codec {codec} is not in this build (cargo feature)")]
    CodecNotBuilt {
        /// Name of the codec.
        codec: &'static str,
    },
    /// The page is outside of the snapshot's memory.
    #[error("page {page} is outside the snapshot's {pages} pages")]
    NoSuchPage {
        /// The requested page.
        page: u64,
        /// How many the snapshot has.
        pages: u64,
    },
    /// The requested chunk is in none of the snapshot's files.
    #[error("no layer {layer} in this snapshot")]
    NoSuchLayer {
        /// The layer that the extent names.
        layer: u16,
    },
    /// A chunk was to be decoded from a buffer without a fetched chunk.
    #[error("nothing was fetched into the chunk buffer")]
    NothingFetched,
    /// No storage was given.
    #[error("a snapshot has one file at least")]
    NoLayer,
    /// The bytes of the file contradict themselves or their checksum.
    #[error(transparent)]
    Corrupt(#[from] Corruption),
    /// The file was written to since it was opened: its bytes may belong to another snapshot now.
    #[error(
        "the file was written to after it was opened ({}), and may be another snapshot by now; start again from a file \
         that does not change, and replace a snapshot by renaming a new file over it",
        change(opened, found)
    )]
    Changed {
        /// The stamp of the storage when it was opened.
        opened: Stamp,
        /// The value found now.
        found: Stamp,
        /// The mismatch, if the change was detected by one.
        source: Option<Box<ReadError>>,
    },
    /// The layers of the snapshot do not make a chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The file is sealed, and was opened without a key.
    #[error("the snapshot is sealed: its key is needed")]
    KeyNeeded,
    /// A key was given, so that only sealed files are accepted, and this one is not.
    #[error("the snapshot is not sealed, and a key was given: anyone may have written it")]
    NotSealed,
    /// The key of the file cannot be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The caller's progress callback asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// Why the layers of a snapshot do not make a chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// The file is a layer, and was opened without its parent.
    #[error("the file holds only what differs from its parent {id}: open it with the parent")]
    ParentNeeded {
        /// The parent's id.
        id: Uuid,
    },
    /// No file that might be the parent exists.
    #[error(
        "parent {id} is missing; searched at {}{}: give its path",
        listed(looked_at),
        searched_in(searched, *most)
    )]
    NotFound {
        /// The parent's id.
        id: Uuid,
        /// Where it was searched.
        looked_at: Vec<PathBuf>,
        /// Folders in which it was searched by its id.
        searched: Vec<PathBuf>,
        /// How many files were read there, if there are more.
        most: Option<usize>,
    },
    /// A file that should be the parent is not, or cannot be used.
    #[error("parent {path}")]
    Parent {
        /// The file.
        path: PathBuf,
        /// Its error.
        source: Box<ReadError>,
    },
    /// A snapshot, but not the parent.
    #[error("snapshot {expected} expected as the parent, found {found}")]
    WrongParent {
        /// The parent's id.
        expected: Uuid,
        /// The id found.
        found: Uuid,
    },
    /// The parent's id, but not its header.
    #[error("header of parent {id}: checksum {expected:#010x} expected, found {found:#010x}")]
    ChangedParent {
        /// The parent's id.
        id: Uuid,
        /// Checksum of the header when the layer was written.
        expected: u32,
        /// Checksum of the header now.
        found: u32,
    },
    /// The parent's id and the checksum of its header, but another header: it was forged.
    #[error("header of parent {id}: not the one that the sealed layer was written for")]
    ForgedParent {
        /// The parent's id.
        id: Uuid,
    },
    /// The parent's memory has other regions.
    #[error("the memory map of parent {id} is not that of its layer")]
    MemoryMap {
        /// The parent's id.
        id: Uuid,
    },
    /// A layer is its own ancestor.
    #[error("snapshot {id} is its own ancestor")]
    Loop {
        /// Its id.
        id: Uuid,
    },
    /// More layers than can be opened.
    #[error("more than {most} layers: flatten the chain")]
    TooLong {
        /// The most there may be.
        most: usize,
    },
}

fn other_seal(parent_is_sealed: bool) -> &'static str {
    match parent_is_sealed {
        true => "the parent is sealed, so its layer must be sealed too: a key is needed",
        false => {
            "a sealed layer needs a sealed parent, and this parent is not: write it again with a key"
        }
    }
}

fn change(opened: &Stamp, found: &Stamp) -> String {
    match opened.len_bytes == found.len_bytes {
        true => format!("{} bytes then and now", found.len_bytes),
        false => format!("{} bytes then, {} now", opened.len_bytes, found.len_bytes),
    }
}

fn searched_in(folders: &[PathBuf], most: Option<usize>) -> String {
    match most {
        _ if folders.is_empty() => String::new(),
        None => format!(" and, by its id, in the files of {}", listed(folders)),
        Some(most) => format!(" and, by its id, in the first {most} files of {}", listed(folders)),
    }
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl ReadError {
    pub(crate) fn io(part: Part, offset: u64, len: u64, source: io::Error) -> Self {
        Self::Io { part, offset, len, source }
    }

    /// The error itself, without [`ReadError::InParent`] around it.
    pub fn root(&self) -> &Self {
        let mut root = self;
        while let Self::InParent { source, .. } = root {
            root = source;
        }
        root
    }
}

fn parent_name(path: Option<&Path>, id: &Uuid) -> String {
    path.map_or_else(|| id.to_string(), |path| path.display().to_string())
}

/// A part of the file, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// The first 4 KiB.
    Header,
    /// The section table at the end.
    SectionTable,
    /// A section.
    Section(SectionKind),
    /// The zeros between two sections.
    Padding,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::SectionTable => f.write_str("section table"),
            Self::Section(kind) => kind.fmt(f),
            Self::Padding => f.write_str("padding"),
        }
    }
}

/// One place of the file that violates the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("corrupt {part} at offset {offset}: {problem}")]
#[non_exhaustive]
pub struct Corruption {
    /// The part of the file.
    pub part: Part,
    /// Offset of the damaged item in the file, in bytes.
    pub offset: u64,
    /// The error there.
    pub problem: Problem,
}

impl Corruption {
    pub(crate) fn new(part: Part, offset: u64, problem: Problem) -> Self {
        Self { part, offset, problem }
    }
}

/// The error at one place of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The checksum does not match the bytes.
    #[error("checksum expected {expected:#010x}, found {found:#010x}")]
    Checksum {
        /// The checksum stored in the file.
        expected: u32,
        /// The checksum of the bytes as they are.
        found: u32,
    },
    /// The bytes of a sealed file do not have the tag that the file's key gives them.
    #[error("not sealed with the key of this file: changed, moved, or of another file")]
    NotAuthentic,
    /// A field must have one value and has another.
    #[error("{field} expected {expected:#x}, found {found:#x}")]
    Field {
        /// Name of the field, as in `docs/format.md`.
        field: &'static str,
        /// The value it must have.
        expected: u64,
        /// The value it has.
        found: u64,
    },
    /// A field is outside its bounds.
    #[error("{field} expected {min:#x} to {max:#x}, found {found:#x}")]
    Range {
        /// Name of the field.
        field: &'static str,
        /// Least value allowed.
        min: u64,
        /// Greatest value allowed.
        max: u64,
        /// The value it has.
        found: u64,
    },
    /// A codec could not decode a chunk with a correct checksum, or it decoded another length.
    #[error("{codec} payload decodes to {found:?} bytes, expected {expected}")]
    Undecodable {
        /// Name of the codec.
        codec: &'static str,
        /// Bytes that the chunk declares.
        expected: usize,
        /// Length of the decoded bytes, if there are any.
        found: Option<usize>,
    },
    /// A section that every file has is missing.
    #[error("section {kind} expected once, found {found} times")]
    SectionCount {
        /// Kind of the section.
        kind: SectionKind,
        /// How often it is there.
        found: usize,
    },
    /// A memory region is not whole pages, overlaps another or leaves a gap in source space.
    #[error(
        "region at gpa {gpa:#x}, {len:#x} bytes, source offset {source_offset:#x} does not follow the one before it"
    )]
    Region {
        /// Its guest-physical address.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
        /// Its offset in the source space.
        source_offset: u64,
    },
    /// A page entry has bits that no writer of this version produces.
    #[error("page entry {raw:#018x} has an unknown kind")]
    Entry {
        /// The entry.
        raw: u64,
    },
    /// The index refers a page to a slot that was stored for another page with other bytes, or
    /// that the chunk does not have.
    #[error("slot {slot} of the chunk does not hold page {page}")]
    Slot {
        /// The page.
        page: u32,
        /// The slot that its entry names.
        slot: u16,
    },
    /// The metadata is not a JSON object with the expected fields.
    #[error("metadata is not valid JSON (line {line}, column {column})")]
    Json {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
}

/// Why a snapshot could not be written. The output path is unchanged in this case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The output exists and may not be replaced.
    #[error("{path} exists and is not replaced")]
    Exists {
        /// The output path.
        path: PathBuf,
    },
    /// The output path is a folder, a link or a device.
    #[error("{path} is not a regular file; it is not replaced")]
    NotAFile {
        /// The output path.
        path: PathBuf,
    },
    /// The output could not be created, written, synced or renamed.
    #[error("cannot {operation} {path}")]
    Output {
        /// The operation.
        operation: &'static str,
        /// The output path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The memory to be stored could not be read.
    #[error("cannot read {len} bytes of guest memory at source offset {source_offset}")]
    Memory {
        /// Where in the source space, in bytes.
        source_offset: u64,
        /// How much.
        len: u64,
        /// The memory's own error.
        source: io::Error,
    },
    /// The memory that was read is not to be stored: see [`crate::Contents::read_once`].
    #[error("the memory that was read is not that of one point in time")]
    Inconsistent {
        /// The reason.
        source: io::Error,
    },
    /// The memory to be stored comes from a snapshot that could not be read.
    #[error("cannot read the memory at source offset {source_offset}")]
    Snapshot {
        /// Where in the source space, in bytes.
        source_offset: u64,
        /// The error of the snapshot.
        source: ReadError,
    },
    /// A value given by the caller is outside the format's limits.
    #[error("{what} is {found}, allowed are {min} to {max}")]
    Limit {
        /// Which value.
        what: &'static str,
        /// Least value allowed.
        min: u64,
        /// Greatest value allowed.
        max: u64,
        /// The value given.
        found: u64,
    },
    /// The memory regions overlap, leave a gap in source space or are not whole pages.
    #[error("memory region {index} at gpa {gpa:#x}: {problem}")]
    Regions {
        /// Position in the list.
        index: usize,
        /// Its guest-physical address.
        gpa: u64,
        /// Its error.
        problem: &'static str,
    },
    /// The parent of a layer could not be read.
    #[error("cannot read the parent")]
    Parent(#[source] ReadError),
    /// The snapshot to be copied could not be read.
    #[error("cannot read the snapshot")]
    Original(#[source] ReadError),
    /// The file cannot be sealed.
    #[error("cannot seal the snapshot")]
    Key(#[from] KeyError),
    /// A layer is sealed exactly if its parent is.
    #[error("{}", other_seal(*parent_is_sealed))]
    ParentSeal {
        /// Whether the parent is sealed. The layer is not, or the other way round.
        parent_is_sealed: bool,
    },
    /// The parent that a copy of a sealed layer is to have is not a copy of the layer's parent.
    #[error(
        "snapshot {found} is not a copy of the layer's parent {expected}: it has other chunks, or another file key"
    )]
    OtherParent {
        /// The id of the layer's parent.
        expected: Uuid,
        /// The id of what was given in its place.
        found: Uuid,
    },
    /// A codec failed.
    #[error("{codec} could not compress a chunk")]
    Codec {
        /// Name of the codec.
        codec: &'static str,
        /// The codec's error.
        source: io::Error,
    },
    /// The codec was left out of this build.
    #[error("codec {codec} is not in this build (cargo feature)")]
    CodecNotBuilt {
        /// Name of the codec.
        codec: &'static str,
    },
    /// The metadata could not be written as JSON.
    #[error("metadata cannot be written as JSON")]
    Metadata(#[source] serde_json::Error),
    /// The caller's progress callback asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl WriteError {
    /// An error of the memory to be stored. For a snapshot's memory it is the snapshot's own error.
    pub(crate) fn memory(source_offset: u64, len: u64, source: io::Error) -> Self {
        match source.downcast::<ReadError>() {
            Ok(source) => Self::Snapshot { source_offset, source },
            Err(source) => Self::Memory { source_offset, len, source },
        }
    }
}
