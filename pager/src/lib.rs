//! Serves page faults: memory that is filled, page by page and on first touch, from any source of
//! pages, through Linux userfaultfd. Made for virtual machines that start before their memory is there;
//! good for any memory whose content is elsewhere and may never be asked for.
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
//! assert_eq!(byte, 200); // The touch brought the page, and the 15 others of its chunk.
//!
//! let stats = pager.stop();
//! assert_eq!((stats.faults, stats.pages.present, stats.pages.missing), (1, 16, 240));
//! # Ok(())
//! # }
//! ```
//!
//! # What it does
//! - A [`PageSource`] hands out bytes for an offset, one [`PageReader`] per thread. It may answer with more
//!   than was asked, a whole decoded chunk, in any order: all of it that is missing is installed. Or with "zero".
//! - A [`Region`] says which memory; there may be many. The memory is cut into slices, each with a
//!   userfaultfd and a thread of its own.
//! - A page that is present is never loaded again; a page that was given back (`MADV_DONTNEED`, a
//!   balloon) reads as zero and never as what the source once had.
//! - It fails closed. A page that cannot be had raises SIGBUS (or the process ends, see
//!   [`FailurePolicy`]), and [`PagerBuilder::on_failure`] says why. No zeros in its place, no hang, also
//!   when a source panics.
//! - Starting costs the same for 64 MiB and 16 GiB. A fault takes no allocation, and no lock that slices share
//!   (but for chunks that reach from one into the other).
//! - Memory of another process that has sent its userfaultfd is served as well: [`PagerBuilder::foreign`].
//! - Pages that will probably be needed are installed in front of who needs them: [`PagerBuilder::prefetch`].
//! - While threads wait for pages a good part of the time, more is loaded in the background ([`Populate`]), behind all
//!   faults. When all is there, neither the pager nor the source is needed any more.
//! - Which pages are touched, one by one, can be recorded: [`Pager::recording`].
//! - [`Stats`]: pages by state and by origin, and how long faults took; of each region: [`Pager::region_stats`].
//!
//! # What it does not do
//! - No writing back: what is written to the memory never reaches the source.
//! - No minor faults, no write protection.
//! - No memory of children: a forked child does not have it, and ends by SIGSEGV when it touches it.
//! - No Windows, no macOS, no BSD: userfaultfd is Linux. Poisoning wants Linux 6.6.
//! - Nothing after [`Pager::stop`]: pages that are missing then read as zero (which is right once the population is
//!   complete).
//!
//! # Features
//! - `snapfmt`, on by default: a source of the pages of a `.snap` file.
//! - `serve`: a server for other processes, which speaks Firecracker's handshake, and memory that clones share.
//! - `tracing`: spans `fault`, and within it `load` and `install`, of the level TRACE and with the page's `source_offset`.
//! - `vm-memory`: regions from a `GuestMemoryMmap` of the crate vm-memory, without `unsafe`.
//!
//! The protocol of a fault, the table of errnos and what exactly is promised: `docs/pager.md`.
#![deny(missing_docs)]

#[cfg(not(target_os = "linux"))]
compile_error!("pager serves page faults with userfaultfd, which only Linux has");

mod background;
mod builder;
mod error;
mod failure;
mod fault;
mod install;
mod layout;
mod mapping;
mod pager;
mod recording;
mod region;
#[cfg(feature = "serve")]
mod remote;
mod report;
mod sched;
mod shared_state;
mod source;
mod start;
mod stats;
mod traced;
pub mod uffd;

pub use background::populate::population::{Populate, Population};
pub use background::prefetch_progress::Prefetch;
pub use builder::PagerBuilder;
pub use error::StartError;
pub use failure::{Failure, FailureCause, FailurePolicy};
pub use fault::latency::{Latency, LatencyStep, Times};
pub use pager::Pager;
pub use recording::Recording;
pub use region::{Region, RegionError};
#[cfg(feature = "serve")]
pub use remote::{keep, serve, shared};
pub use sched::placement::Placement;
pub use source::error::{SourceError, SourceErrorKind};
pub use source::load::{Load, LoadCost, LoadedPage, LoadedPages, PageReader};
pub use source::page_source::PageSource;
pub use source::retry::RetryPolicy;
pub use source::sequence::{PageSequence, Wanted};
#[cfg(feature = "snapfmt")]
pub use source::snapshot_source::SnapshotSource;
pub use source::vec_source::VecSource;
pub use stats::{PageCounts, PagesByOrigin, RegionStats, Stats};
