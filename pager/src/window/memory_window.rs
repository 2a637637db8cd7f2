//! The window itself: of memory that has no pager, or of a pager's.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::Core;
use super::error::WindowError;
use super::of_pager;
use super::options::{ReadMemory, WindowOptions, WindowStats};
use super::protection::{Answering, Protection};
use crate::pager_state::PagerState;

/// Memory at one point in time. Dropping it makes all memory writable again.
pub struct Window {
    pub(super) core: Arc<Core>,
    pub(super) memory: Memory,
}

/// The memory of a window, and who answers its write faults.
pub(super) enum Memory {
    Protected { protection: Arc<Protection>, answering: Option<Answering> },
    Paged(Arc<PagerState>),
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Window {
    /// Protects all memory, which takes about 20 ms for each GiB that is in use, while threads write to it. `read`
    /// reads it.
    ///
    /// # Errors
    /// [`WindowError`]. Then nothing is protected.
    pub fn open(
        protection: Arc<Protection>,
        read: ReadMemory,
        options: WindowOptions,
    ) -> Result<Window, WindowError> {
        let core = Core::new(protection.layout.clone(), read, options)
            .map_err(|error| WindowError::System { what: "memory for the page states", error })?;
        if protection.busy.swap(true, Ordering::SeqCst) {
            return Err(WindowError::Busy);
        }
        let core = Arc::new(core);
        // From here on, dropping the window makes all memory writable.
        let mut window = Window {
            core: Arc::clone(&core),
            memory: Memory::Protected { protection: Arc::clone(&protection), answering: None },
        };
        // Before the first page is protected: its writer waits for this thread.
        let started = Answering::start(Arc::clone(&protection), Arc::clone(&core))
            .map_err(|error| WindowError::System { what: "a thread", error })?;
        if let Memory::Protected { answering, .. } = &mut window.memory {
            *answering = Some(started);
        }
        core.arm(&*protection)?;
        Ok(window)
    }

    /// Protects what was written since it was protected, while threads write to it: before a later cut of a window that
    /// tracks.
    ///
    /// # Errors
    /// As [`Window::open`]. Then the window is to be dropped.
    pub fn arm_again(&self) -> Result<(), WindowError> {
        match &self.memory {
            Memory::Protected { protection, .. } => self.core.arm_again(&**protection),
            Memory::Paged(shared) => self.core.arm_again(&**shared),
        }
    }

    /// Fixes the bytes of all pages. After it, the threads may write again.
    ///
    /// The caller makes sure that no thread writes to the memory during this call, and none has asked the kernel to
    /// write to it later (a read(2) that has not returned).
    ///
    /// # Errors
    /// [`WindowError::Protect`], or [`WindowError::Ended`]: no thread answers write faults any more. Then there is no point in time, and the window is to be dropped.
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

    /// Of a window that tracks: ends the cut, so that there can be another one. It must not be read after that. If it
    /// was `saved`, the next cut has only what changes from it on; otherwise it also has all that this one has.
    pub fn end_cut(&self, saved: bool) {
        self.core.end_cut(saved);
    }

    /// All pages of the cut that may differ from the last one that was saved, as ascending ranges of source offsets.
    /// Of memory with a pager: those that [`Window::own_pages`] has. `None`: no cut was saved yet.
    pub fn changed_pages(&self) -> Option<Vec<Range<u64>>> {
        let blocks = self.core.cut_blocks()?;
        Some(match &self.memory {
            Memory::Protected { protection, .. } => {
                of_pager::source_ranges(&protection.layout, blocks)
            }
            Memory::Paged(shared) => of_pager::own_blocks(shared, &self.core, blocks),
        })
    }

    /// Whether memory was written, or loaded by a pager, since the last cut that was saved.
    pub fn is_written(&self) -> bool {
        self.core.is_written()
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

    /// What it has done so far; of a window that tracks, since the end of the last cut.
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
