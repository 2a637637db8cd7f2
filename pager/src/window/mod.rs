//! One point in time of memory that threads continue to write.
//!
//! All pages are protected from writes while the threads run ([`Window::open`] or [`Pager::window`](crate::Pager::window)).
//! Then they pause for a moment, and [`Window::cut`] fixes the bytes of all pages. When they run again, a write to a
//! page that is not saved yet waits until its bytes were copied. [`Window::read`] returns the bytes of the cut, each
//! page once. `docs/live-snapshots.md` has the states of a page and the proof.

mod core;
pub(crate) mod of_pager;
mod protection;
mod staging;
mod states;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use protection::Protection;

use crate::pager_state::PagerState;
use crate::uffd::{Errno, OpenError};
use core::Core;
use protection::Answering;

/// Reads memory at a source offset, in whole pages. It must not write to the memory, and not wait for a thread that
/// does.
pub type ReadMemory = Arc<dyn Fn(u64, &mut [u8]) -> io::Result<()> + Send + Sync>;

/// How a window is kept.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct WindowOptions {
    /// The most memory for copies of pages that were written before they were saved, in bytes. When it is full, writes
    /// wait for [`Window::read`].
    pub staging_bytes: usize,
}

impl Default for WindowOptions {
    /// 64 MiB of copies.
    fn default() -> WindowOptions {
        WindowOptions { staging_bytes: 64 << 20 }
    }
}

/// What a window has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WindowStats {
    /// Writes that had to wait, before and after the cut.
    pub faults: u64,
    /// Bytes that were copied before they were written.
    pub copied_bytes: u64,
    /// How often a write has waited for room for its copy.
    pub waits: u64,
}

/// Why there is no window.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// No userfaultfd with write protection: it needs Linux 6.4, and the permission to use userfaultfd.
    #[error("no write protection by userfaultfd, which needs Linux 6.4 or later")]
    Open(#[source] OpenError),
    /// The kernel refuses to register the memory for write protection.
    #[error("cannot register the memory at {host_addr:#x} for write protection")]
    Register {
        /// The address of the first byte.
        host_addr: u64,
        /// The error of the system call.
        #[source]
        errno: Errno,
    },
    /// The kernel refuses to protect the memory.
    #[error("cannot protect the memory at {host_addr:#x} from writes")]
    Protect {
        /// The address of the first byte.
        host_addr: u64,
        /// The error of the system call.
        #[source]
        errno: Errno,
    },
    /// The pages are not of 4096 bytes, or the memory belongs to another process or to a file.
    #[error("only memory of this process, in pages of 4096 bytes, can be protected")]
    Unsupported,
    /// There is a window already.
    #[error("another window of this memory is open")]
    Busy,
    /// The pager has loaded all pages and has let the memory go: [`Protection`] is for it now.
    #[error("the pager does not serve the memory any more")]
    Released,
    /// Another system call failed.
    #[error("cannot have {what}")]
    System {
        /// What was requested.
        what: &'static str,
        /// The error of the system call.
        #[source]
        error: io::Error,
    },
}

/// Memory at one point in time. Dropping it makes all memory writable again.
pub struct Window {
    core: Arc<Core>,
    memory: Memory,
}

/// The memory of a window, and who answers its write faults.
enum Memory {
    Protected { protection: Arc<Protection>, answering: Option<Answering> },
    Paged(Arc<PagerState>),
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Window {
    /// Fixes the bytes of all pages. After it, the threads may write again.
    ///
    /// The caller makes sure that no thread writes to the memory during this call, and none has asked the kernel to
    /// write to it later (a read(2) that has not returned).
    ///
    /// # Errors
    /// [`WindowError::Protect`]. Then there is no point in time, and the window is to be dropped.
    pub fn cut(&self) -> Result<(), WindowError> {
        match &self.memory {
            Memory::Protected { protection, .. } => self.core.cut(&**protection),
            Memory::Paged(shared) => {
                // An install ends before, and its page is protected, or begins after the cut.
                let _locks: Vec<_> =
                    shared.slices.iter().map(|slice| slice.lock.for_background()).collect();
                self.core.cut(&**shared)
            }
        }
    }

    /// Reads whole pages as they were at the cut. Each page can be read once, by any thread.
    ///
    /// # Errors
    /// The error of reading memory; or the page was read before, or was missing at the cut, or the window has failed.
    pub fn read(&self, buf: &mut [u8], source_offset: u64) -> io::Result<()> {
        match &self.memory {
            Memory::Protected { protection, .. } => {
                self.core.read(&**protection, buf, source_offset)
            }
            Memory::Paged(shared) => self.core.read(&**shared, buf, source_offset),
        }
    }

    /// The parts of the source, as ascending ranges of offsets, whose pages a pager had installed, or the guest had
    /// given back, at the cut. `None` without a pager: all pages are in memory, or are zero.
    pub fn own_pages(&self) -> Option<Vec<Range<u64>>> {
        match &self.memory {
            Memory::Protected { .. } => None,
            Memory::Paged(shared) => Some(of_pager::own_pages(shared, &self.core)),
        }
    }

    /// Of memory without a pager, only these parts will be read, as ranges of source offsets in any order. All other
    /// pages can be written from now on, without a copy.
    pub fn only(&self, parts: &[Range<u64>]) {
        if let Memory::Protected { protection, .. } = &self.memory {
            self.core.only(&**protection, parts);
        }
    }

    /// Whether what was read is the memory of the cut. To be called after the last read.
    ///
    /// # Errors
    /// A page could not be read, or was given back before it was saved.
    pub fn check(&self) -> io::Result<()> {
        match self.core.failure() {
            None => Ok(()),
            Some(reason) => Err(io::Error::other(reason.to_owned())),
        }
    }

    /// What it has done so far.
    pub fn stats(&self) -> WindowStats {
        self.core.stats()
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        match &mut self.memory {
            Memory::Protected { protection, answering } => {
                self.core.close(&**protection);
                // After the last page is writable.
                drop(answering.take());
                protection.free();
            }
            Memory::Paged(shared) => shared.close_window(&self.core),
        }
    }
}
