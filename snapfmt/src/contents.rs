//! What is written to a snapshot, and how.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use crate::codec::Codec;
use crate::memory_map::MemoryRegion;
use crate::metadata::Metadata;
use crate::output::Existing;
use crate::read_at::ReadAt;
use crate::seal::KeyProvider;
use crate::snapshot::StateBlob;

/// The content of a snapshot.
#[non_exhaustive]
pub struct Contents<'a> {
    /// The guest's memory regions, in source order.
    pub regions: &'a [MemoryRegion],
    /// The guest's memory, read by source offset. It must not change while it is written, unless it is `read_once`.
    pub memory: &'a dyn ReadAt,
    /// The parts of memory that may not be zero, as source offsets in bytes, in any order; no other memory is read. For
    /// a memfd: the ranges that SEEK_DATA finds.
    pub data: &'a [Range<u64>],
    /// States of the virtual machine, opaque. Each has another tag.
    pub states: &'a [StateBlob],
    /// The metadata of the file. The writer fills in `storage`.
    pub metadata: Metadata,
    /// See [`Contents::read_once`].
    pub read_once: Option<CheckRead<'a>>,
}

/// Called when all memory was read, before the file appears: whether the bytes that were read are those to store.
pub type CheckRead<'a> = &'a (dyn Fn() -> io::Result<()> + Sync);

impl<'a> Contents<'a> {
    /// Memory, without states and metadata.
    #[must_use]
    pub fn new(
        regions: &'a [MemoryRegion],
        memory: &'a dyn ReadAt,
        data: &'a [Range<u64>],
    ) -> Self {
        let metadata = Metadata::default();
        Self { regions, memory, data, states: &[], metadata, read_once: None }
    }

    /// Sets [`Contents::states`].
    #[must_use]
    pub fn states(mut self, states: &'a [StateBlob]) -> Self {
        self.states = states;
        self
    }

    /// Sets [`Contents::metadata`].
    #[must_use]
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = metadata;
        self
    }

    /// The memory may change after it was read, as that of a guest that runs. Then each byte of it is read at most
    /// once, except those of [`HotPages`](crate::HotPages), and `check` is called after the last read. Its error leaves no
    /// file.
    #[must_use]
    pub fn read_once(mut self, check: CheckRead<'a>) -> Self {
        self.read_once = Some(check);
        self
    }
}

/// How a snapshot is written.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WriteOptions {
    /// Codec for chunks. A chunk that the codec would hardly shrink is stored raw.
    pub codec: Codec,
    /// Level of zstd, from -7 (fast) to 22 (small).
    pub level: i32,
    /// Most pages in a chunk, 1 to 512: small chunks are read fast, large chunks compress better.
    pub chunk_pages: usize,
    /// Threads that compress; at most four for each CPU are used. The bytes of the file do not depend on this number,
    /// except its id and the checksums that begin with it.
    pub threads: NonZeroUsize,
    /// Whether pages with equal bytes are stored once.
    pub dedupe: bool,
    /// What to do with a file that is already there.
    pub existing: Existing,
    /// Who wraps the file's key: then the file is sealed, that is encrypted and authenticated. A layer must be sealed
    /// exactly if its parent is.
    pub seal: Option<Arc<dyn KeyProvider>>,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            codec: if cfg!(feature = "zstd") { Codec::Zstd } else { Codec::Lz4 },
            level: 1,
            chunk_pages: 8,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            dedupe: true,
            existing: Existing::Keep,
            seal: None,
        }
    }
}

impl WriteOptions {
    /// Sets [`WriteOptions::seal`].
    #[must_use]
    pub fn seal(mut self, seal: impl Into<Option<Arc<dyn KeyProvider>>>) -> Self {
        self.seal = seal.into();
        self
    }

    /// Sets [`WriteOptions::codec`].
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// Sets [`WriteOptions::level`].
    #[must_use]
    pub fn level(mut self, level: i32) -> Self {
        self.level = level;
        self
    }

    /// Sets [`WriteOptions::chunk_pages`].
    #[must_use]
    pub fn chunk_pages(mut self, chunk_pages: usize) -> Self {
        self.chunk_pages = chunk_pages;
        self
    }

    /// Sets [`WriteOptions::threads`].
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = threads;
        self
    }

    /// Sets [`WriteOptions::dedupe`].
    #[must_use]
    pub fn dedupe(mut self, dedupe: bool) -> Self {
        self.dedupe = dedupe;
        self
    }

    /// Sets [`WriteOptions::existing`].
    #[must_use]
    pub fn existing(mut self, existing: Existing) -> Self {
        self.existing = existing;
        self
    }
}
