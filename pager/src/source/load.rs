//! What a source returns for a page.

use std::ops::Range;

use super::error::SourceError;

/// Loads pages for one thread. It is on the path of a fault: it should neither allocate nor take shared locks.
pub trait PageReader: Send {
    /// Loads the page at `source_offset` (in bytes, a multiple of the page size) and the pages that come with it.
    ///
    /// # Errors
    /// [`SourceError`]. The pager retries after a transient error, and fails the page after a permanent one.
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError>;

    /// Whether [`PageReader::load`] of this page would wait for another host. Then the pager calls
    /// [`PageReader::when_ready`], and answers other faults before it loads the page. This is called for each fault: it
    /// must not wait, and should cost nothing where the answer is always `false`, which is the default.
    fn would_wait(&mut self, _source_offset: u64) -> bool {
        false
    }

    /// Starts to fetch what [`PageReader::load`] of this page would wait for, and returns without waiting. `ready` is
    /// called when the page, or a part of what it needs, can be loaded without waiting, or with the error of the load.
    /// It may be called on any thread, also before this returns. If it is dropped, the page fails. The default calls it
    /// immediately.
    fn when_ready(&mut self, _source_offset: u64, ready: WhenReady) {
        ready(Ok(()));
    }
}

/// Called when a page can be loaded: see [`PageReader::when_ready`].
pub type WhenReady = Box<dyn FnOnce(Result<(), SourceError>) + Send>;

/// The result of [`PageReader::load`].
#[derive(Clone, Debug)]
pub enum Load<'a> {
    /// The page is zero, and so is all of `range`.
    Zero {
        /// Source offsets that read as zero. They include the requested page. The pager fills a bounded part of them
        /// around the faulting page.
        range: Range<u64>,
    },
    /// The page, and the others that were decoded with it.
    Pages(LoadedPages<'a>),
    /// The page is now in the file of which the paged memory is a private mapping, with the right content. The
    /// faulting thread tries again. Only for [`crate::PagerBuilder::backed`].
    InFile {
        /// The cost of the load, for the statistics.
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

/// All pages of one read or one decoded chunk.
#[derive(Clone, Copy, Debug)]
pub struct LoadedPages<'a> {
    /// The decoded bytes.
    pub bytes: &'a [u8],
    /// Which page of the source is where in `bytes`, in any order. The requested page must be among them. One ioctl
    /// installs pages that follow each other both in the source and in `bytes`.
    pub pages: &'a [LoadedPage],
    /// The cost of the load, for the statistics.
    pub cost: LoadCost,
}

/// One page of [`LoadedPages`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedPage {
    /// Offset of the page in the source in bytes, a multiple of the page size.
    pub source_offset: u64,
    /// Offset of its first byte in [`LoadedPages::bytes`].
    pub buffer_offset: usize,
}

/// The cost of a load. A source leaves what it does not measure at its default.
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
