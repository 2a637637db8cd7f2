//! Where pages come from: the traits that a source implements. A source never does an ioctl and never
//! touches the paged memory; it only hands out bytes.

use std::error::Error;
use std::ops::Range;

use crate::sequence::{PageByPage, PageSequence};

/// A source of pages: addressed by `source_offset`, shared by the pager's threads.
pub trait PageSource: Send + Sync {
    /// A reader of its own for one thread, with its own buffers, answering in pages of `page_bytes`.
    ///
    /// # Errors
    /// A permanent [`SourceError`] for a page size that the source does not have.
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError>;

    /// Every offset below this can be loaded.
    fn len_bytes(&self) -> u64;

    /// Loads pages that are known beforehand, given as ranges of source offsets in the order in which they are wanted: for
    /// prefetching. A source that can bring many of them at once, in an order of its own that is not far from theirs,
    /// should say how; otherwise a reader loads them one by one.
    ///
    /// # Errors
    /// As [`PageSource::reader`].
    fn sequence(
        &self,
        page_bytes: usize,
        pages: Vec<Range<u64>>,
    ) -> Result<Box<dyn PageSequence>, SourceError> {
        Ok(Box::new(PageByPage::new(self.reader(page_bytes)?, page_bytes, pages)))
    }
}

/// Loads pages for one thread. On the fault path: it should neither allocate nor take shared locks.
pub trait PageReader: Send {
    /// Loads the page at `source_offset` (a multiple of the page size) and whatever comes with it.
    ///
    /// # Errors
    /// [`SourceError`]: a transient one is tried again, a permanent one fails the page.
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError>;
}

/// The answer to [`PageReader::load`].
#[derive(Clone, Debug)]
pub enum Load<'a> {
    /// The page is zero, and so is all of `range`.
    Zero {
        /// Source offsets known to read as zero; holds the asked page. The pager fills a bounded part
        /// of it around the faulting page.
        range: Range<u64>,
    },
    /// The page, and the others that were decoded with it.
    Pages(LoadedPages<'a>),
    /// The page is in the file now that the paged memory is a private mapping of, and its content is
    /// right: whoever waits shall try again. Only for [`crate::PagerBuilder::backed`].
    InFile {
        /// What it took, for the statistics.
        cost: LoadCost,
    },
}

impl Load<'_> {
    pub(crate) fn cost(&self) -> LoadCost {
        match self {
            Load::Zero { .. } => LoadCost::default(),
            Load::Pages(loaded) => loaded.cost,
            Load::InFile { cost } => *cost,
        }
    }
}

/// Everything that one read or one decoded chunk holds.
#[derive(Clone, Copy, Debug)]
pub struct LoadedPages<'a> {
    /// The decoded bytes.
    pub bytes: &'a [u8],
    /// Which pages of the source lie where in `bytes`; the asked page must be among them. In any order;
    /// neighbours in both the source and `bytes` that follow each other are installed by one ioctl.
    pub pages: &'a [LoadedPage],
    /// What it took, for the statistics.
    pub cost: LoadCost,
}

/// One page of [`LoadedPages`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedPage {
    /// Offset of the page in the source, a multiple of the page size.
    pub source_offset: u64,
    /// Offset of its first byte in [`LoadedPages::bytes`].
    pub buffer_offset: usize,
}

/// What a load took. Leave at its default what was not measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadCost {
    /// Nanoseconds spent reading from storage.
    pub read_ns: u64,
    /// Nanoseconds spent verifying and decoding.
    pub decode_ns: u64,
    /// Bytes read from storage.
    pub bytes_read: u64,
}

impl std::ops::AddAssign for LoadCost {
    fn add_assign(&mut self, other: LoadCost) {
        self.read_ns += other.read_ns;
        self.decode_ns += other.decode_ns;
        self.bytes_read += other.bytes_read;
    }
}

/// Why a page cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    kind: SourceErrorKind,
    message: String,
    #[source]
    cause: Option<Box<dyn Error + Send + Sync>>,
}

/// Whether trying again may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceErrorKind {
    /// It may: a time-out, a lost connection.
    Transient,
    /// It won't: a failed checksum, a file cut short.
    Permanent,
}

impl SourceError {
    /// An error that may go away by itself.
    pub fn transient(message: impl Into<String>) -> SourceError {
        SourceError { kind: SourceErrorKind::Transient, message: message.into(), cause: None }
    }

    /// An error that stays.
    pub fn permanent(message: impl Into<String>) -> SourceError {
        SourceError { kind: SourceErrorKind::Permanent, message: message.into(), cause: None }
    }

    /// With the error that led to it.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> SourceError {
        self.cause = Some(cause.into());
        self
    }

    /// Whether trying again may help.
    pub fn kind(&self) -> SourceErrorKind {
        self.kind
    }
}
