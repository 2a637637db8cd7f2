//! Serves page faults through Linux userfaultfd: each page of the memory is loaded from a source when it is first
//! touched. This is made for virtual machines that start before their memory is loaded. It works for any memory whose
//! content is elsewhere and may never be needed.
//!
//! ```
//! use std::sync::Arc;
//! use pager::{Pager, Region, VecSource};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const LEN: usize = 1 << 20;
//! let content: Vec<u8> = (0..LEN).map(|i| (i / 4096) as u8).collect();
//! let source = Arc::new(VecSource::new(content, 65536));
//!
//! // SAFETY: a new mapping at an address of the kernel's choice.
//! let memory = unsafe {
//!     let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
//!     libc::mmap(std::ptr::null_mut(), LEN, prot, flags, -1, 0)
//! };
//! assert_ne!(memory, libc::MAP_FAILED);
//! // SAFETY: mapped until the process ends, and accessed only through a raw pointer.
//! let region = unsafe { Region::new(memory as u64, LEN as u64, 4096, 0) }?;
//! let pager = match Pager::builder(source).region(region).start() {
//!     Ok(pager) => pager,
//!     Err(error) => return Ok(eprintln!("no paging here: {error}")),
//! };
//!
//! // SAFETY: inside the mapping.
//! let byte = unsafe { memory.cast::<u8>().add(200 * 4096).read_volatile() };
//! assert_eq!(byte, 200); // The touch has loaded the page, and the 15 others of its chunk.
//!
//! let stats = pager.stop();
//! assert_eq!((stats.faults, stats.pages.present, stats.pages.missing), (1, 16, 240));
//! # Ok(())
//! # }
//! ```
//!
//! # What it does
//! - A [`PageSource`] returns the bytes at an offset, through one [`PageReader`] for each thread. It may return a whole
//!   decoded chunk, in any order; all missing pages of it are installed. Or it returns "zero".
//! - A [`Region`] is a range of memory; there may be many. The memory is cut into slices, each with its own userfaultfd
//!   and thread.
//! - A page that is present is never loaded again. A page that was given back (`MADV_DONTNEED`, a balloon) reads as
//!   zero, and never as the content of the source.
//! - It fails closed. A page that cannot be loaded raises SIGBUS (or the process ends, see [`FailurePolicy`]), and
//!   [`PagerBuilder::on_failure`] gets the reason. The page never reads as zeros and no thread hangs, even if a source
//!   panics.
//! - Starting costs the same for 64 MiB and 16 GiB. A fault allocates nothing, and takes no lock that slices share,
//!   except for chunks that have pages of several slices.
//! - Memory of another process that has sent its userfaultfd is served, too: [`PagerBuilder::foreign`].
//! - Pages that will probably be needed are installed in advance: [`PagerBuilder::prefetch`].
//! - While threads wait for pages a good part of the time, more pages are loaded in the background ([`Populate`]).
//!   Faults go first. When all pages are loaded, neither the pager nor the source is needed any more.
//! - It can be recorded which pages are touched: [`Pager::recording`].
//! - Its memory can be saved as of one point in time while threads write to it: [`window`].
//! - [`Stats`]: pages by state and by origin, and how long faults took. For each region: [`Pager::region_stats`].
//!
//! # What it does not do
//! - It does not write back: the source is never changed.
//! - It does not serve minor faults.
//! - Forked children do not have the memory: touching it ends them by SIGSEGV.
//! - It needs Linux, because only Linux has userfaultfd. Poisoning needs Linux 6.6.
//! - After [`Pager::stop`], missing pages read as zero. That is right only if the population was complete.
//!
//! # Features
//! - `snapfmt`, on by default: a source with the pages of a `.snap` file.
//! - `serve`: a server for other processes, with the handshake of Firecracker, and memory that clones share.
//! - `tracing`: a span `fault`, with spans `load` and `install` inside, at level TRACE, with the `source_offset` of the
//!   page.
//! - `vm-memory`: regions from a `GuestMemoryMmap` of the crate vm-memory, without `unsafe`.
//!
//! The protocol of a fault, the table of errnos and the exact promises: `docs/pager.md`.
#![deny(missing_docs)]

#[cfg(not(target_os = "linux"))]
compile_error!("pager serves page faults with userfaultfd, which only Linux has");

mod background;
mod builder;
mod causes;
mod error;
mod failure;
mod fault;
mod filled;
mod install;
mod layout;
mod mapped;
mod mapping;
mod pagemap;
mod pager;
mod pager_state;
mod recording;
mod region;
#[cfg(feature = "serve")]
mod remote;
mod report;
mod reset;
mod sched;
mod source;
mod start;
mod stats;
mod threads;
mod traced;
pub mod uffd;
pub mod window;

pub use background::populate::population::{Populate, Population};
pub use background::prefetch_progress::Prefetch;
pub use builder::PagerBuilder;
pub use causes::with_causes;
pub use error::StartError;
pub use failure::{Failure, FailureCause, FailurePolicy};
pub use fault::latency::{Latency, LatencyStep, Times};
pub use pagemap::{PageTableEntry, Pagemap};
pub use pager::Pager;
pub use recording::Recording;
pub use region::{PAGE_BYTES, Region, RegionError};
#[cfg(feature = "serve")]
pub use remote::{keep, serve, shared};
pub use reset::ResetError;
pub use sched::placement::Placement;
pub use source::error::{SourceError, SourceErrorKind};
pub use source::load::{Load, LoadCost, LoadedPage, LoadedPages, PageReader, WhenReady};
pub use source::page_source::PageSource;
pub use source::retry::RetryPolicy;
pub use source::sequence::{PageSequence, Wanted};
#[cfg(feature = "snapfmt")]
pub use source::snapshot_source::SnapshotSource;
pub use source::vec_source::VecSource;
pub use stats::{PageCounts, PagesByOrigin, RegionStats, Stats};
pub use threads::on_thread_start;
