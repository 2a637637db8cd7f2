//! One-file snapshots of virtual machine memory: random access, compressed, checksummed.
//!
//! A snapshot contains a guest's memory in chunks of compressed pages, an index that finds any page
//! with one look-up, opaque machine state, and metadata in JSON. `docs/format.md` describes the bytes;
//! this crate is one implementation of it.
//!
//! # What it does
//! - Opens in constant time: the cost does not depend on the size of the guest's memory.
//! - Reads any page with one look-up and one read; a chunk's checksum is checked whenever it is
//!   read, never all up front and never skipped.
//! - Recognizes the snapshot of each chunk: if a file is overwritten with another snapshot while it is open, reading
//!   returns errors, and never a page of the other snapshot.
//! - Writes on all cores, with bounded memory, progress and cancellation; a file appears whole
//!   and synced, or not at all, even after SIGKILL.
//! - Seals files on request: AES-256-GCM with a key of the caller's ([`WriteOptions::seal`]).
//! - Treats the file as hostile: lengths are bounded before allocation, offsets checked, decoders
//!   capped. A bad file is a typed error with section, offset, expected and found.
//!
//! # What it does not do
//! - It does not use KVM or userfaultfd, and it does not interpret the state.
//! - It does not sign; without a key, checksums detect accidents, not forgery.
//!
//! # Example
//! ```
//! use std::ops::ControlFlow;
//! use snapfmt::{ChunkBuffer, Contents, MemoryRegion, Metadata, PageIndex, Snapshot, StateBlob};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // 8 MiB of guest memory, of which one page is not zero.
//! let mut memory = vec![0u8; 8 << 20];
//! memory[5 * 4096..6 * 4096].fill(7);
//!
//! let directory = tempfile::tempdir()?;
//! let path = directory.path().join("guest.snap");
//! let regions = [MemoryRegion { gpa: 0, len: 8 << 20, source_offset: 0 }];
//! let states = [StateBlob { tag: 1, version: 1, bytes: b"registers".to_vec() }];
//! let contents = Contents::new(&regions, &memory, &[0..8 << 20])
//!     .states(&states)
//!     .metadata(Metadata::default().tool("example"));
//! snapfmt::write_snapshot(&path, contents, &Default::default(), &|_| ControlFlow::Continue(()))?;
//!
//! let snapshot = Snapshot::open(&path)?;
//! assert_eq!(snapshot.header().data_pages, 1);
//! let (mut buffer, mut page) = (ChunkBuffer::new(), [0; 4096]);
//! snapshot.read_page(PageIndex(5), &mut buffer, &mut page)?;
//! assert_eq!(page, [7; 4096]);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod behind;
mod catalogue;
mod chunk;
mod codec;
mod contents;
mod copy;
mod dedupe;
mod deferred;
mod entry;
mod error;
mod file_builder;
mod guard;
mod header;
mod hot;
mod index;
mod layer;
pub mod layout;
mod load;
mod memory;
mod memory_map;
mod metadata;
mod ordered;
mod output;
mod pack;
mod page_table;
mod parent;
mod progress;
mod read_at;
mod rekey;
mod seal;
mod section;
mod snapshot;
mod storage;
mod verify;
mod verify_bytes;
mod waiting;
mod working_set;
mod writeback;
mod writer;

pub use chunk::{Chunk, ChunkBuffer, ChunkHeader};
pub use codec::{Codec, UnknownCodec};
pub use contents::{CheckRead, Contents, WriteOptions};
pub use copy::{Changes, copy_snapshot};
pub use deferred::{DeferredChunks, write_deferred};
pub use entry::{ChunkExtent, PageEntry, PageIndex};
pub use error::{ChainError, Corruption, Part, Problem, ReadError, WriteError};
pub use guard::Stamp;
pub use header::Header;
pub use hot::HotPages;
pub use load::{Loaded, OnPages};
pub use memory::SnapshotMemory;
pub use memory_map::MemoryRegion;
pub use metadata::{CodecUse, Metadata};
pub use output::{Existing, Output};
pub use parent::{Parent, ParentHint, Parents, open_file};
pub use progress::{OnProgress, Progress};
pub use read_at::{ReadAt, WhenHere};
pub use rekey::{Rekey, rekey_snapshot};
pub use seal::{KeyError, KeyProvider, KeySlot, KeySlots, Outline, SecretKey, VerifiedOutline};
pub use section::{Section, SectionKind};
pub use snapshot::{READ_AHEAD_BYTES, ReadOrder, Snapshot, StateBlob};
pub use storage::{Permanent, Storage};
pub use verify::Verified;
pub use waiting::WhenReadable;
pub use working_set::{HotRun, Phase, WorkingSet};
pub use writer::{write_layer, write_snapshot, write_with_set};
