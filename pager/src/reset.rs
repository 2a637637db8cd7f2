//! Puts the memory of a pager back to the content of the source, in place.

use std::io;
use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::error::StartError;
use crate::install::page_state::PageState;
use crate::install::register;
use crate::pagemap::Pagemap;
use crate::pager::Pager;
use crate::pager_state::PagerState;
use crate::region::Region;
use crate::uffd::Errno;

/// Why memory was not put back. After [`ResetError::Unsupported`] and [`ResetError::Busy`] nothing is changed. After
/// the others, some of the memory may be put back and some not, and nothing may use it any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// The memory belongs to another process, or is a mapping of a file.
    #[error("only anonymous memory of this process can be reset")]
    Unsupported,
    /// A window needs the bytes.
    #[error("a window of the memory is open")]
    Busy,
    /// The kernel does not unregister the memory.
    #[error("cannot unregister the memory at {host_addr:#x}")]
    Unregister {
        /// The address of the first byte.
        host_addr: u64,
        /// The error of the system call.
        #[source]
        errno: Errno,
    },
    /// The kernel does not take pages back.
    #[error("cannot give back the memory at {host_addr:#x}")]
    Discard {
        /// The address of the first byte.
        host_addr: u64,
        /// The error of madvise(2).
        #[source]
        error: io::Error,
    },
    /// The kernel does not register the memory again.
    #[error(transparent)]
    Register(StartError),
    /// It cannot be seen which pages are in memory.
    #[error("cannot read /proc/self/pagemap")]
    Pagemap(#[source] io::Error),
    /// Each time that the memory was registered again, the kernel had filled pages of it with zeros.
    #[error(
        "the kernel has filled the page at {host_addr:#x} with zeros, also after it was dropped {rounds} times"
    )]
    #[non_exhaustive]
    Filled {
        /// The address of one of the pages.
        host_addr: u64,
        /// How often the pages were dropped.
        rounds: usize,
    },
}

impl Pager {
    /// Whether a [`window`](crate::window) of the memory is open.
    pub fn has_window(&self) -> bool {
        self.shared.window.is_open()
    }

    /// Gives back the pages of the `written` parts of the source, as ascending ranges of offsets in whole pages. They
    /// are missing from then on, so that the next access finds the content of the source, whatever was written to them,
    /// or whether they were removed. With `None`, all pages are given back. Returns how many bytes were in memory, or
    /// had been removed.
    ///
    /// Background loading continues with the pages that it has not reached yet. A population that was complete is
    /// [`Population::Reset`](crate::Population::Reset) after this, and one in progress ends so: the memory stays registered,
    /// and pages that were given back are left to faults.
    ///
    /// The caller makes sure that no thread accesses the memory during this call. A thread may still wait for a missing
    /// page: the page has the content of the source after this, but that thread may find zeros in it. (The workers of
    /// KVM do not read the page.) If it runs a guest, the caller makes sure that `written` has every page that was written to or removed since the start of the pager or the last reset. A page
    /// that it lacks keeps its bytes.
    ///
    /// # Errors
    /// [`ResetError`]
    pub fn reset(&self, written: Option<&[Range<u64>]>) -> Result<u64, ResetError> {
        let shared = &*self.shared;
        if shared.backed || shared._regions.iter().any(Region::is_foreign) {
            return Err(ResetError::Unsupported);
        }
        if shared.window.is_open() {
            return Err(ResetError::Busy);
        }
        // The end of a population lets no memory go after this.
        let mut was_reset = shared.was_reset.lock().unwrap_or_else(PoisonError::into_inner);
        *was_reset = true;
        // Nothing is installed, and no message is read, meanwhile.
        let _locks: Vec<_> =
            shared.slices.iter().map(|slice| slice.lock.for_background()).collect();
        // Before anything is changed.
        let mut pagemap = Pagemap::open().map_err(ResetError::Pagemap)?;
        let pages = shared.to_give_back(written);
        // Without this, each call of madvise(2) would wait until a demand thread has read its event.
        for slice in 0..shared.slices.len() {
            shared.unregister_slice(slice)?;
        }
        let mut bytes = 0;
        for run in pages {
            bytes += shared.give_back(run)?;
        }
        for (index, slice) in shared.slices.iter().enumerate() {
            register::all(&slice.filler.uffd, shared.layout.extents_of(index), false)
                .map_err(ResetError::Register)?;
            slice.released.store(false, Ordering::Relaxed);
            shared.drop_filled(index, &mut pagemap)?;
        }
        // Windows can be opened again.
        shared.window.released(false);
        shared.population.reset();
        Ok(bytes)
    }
}

impl PagerState {
    /// The runs of pages, each in one extent.
    fn to_give_back(&self, written: Option<&[Range<u64>]>) -> Vec<Range<u64>> {
        let page_bytes = self.layout.page_bytes();
        let Some(written) = written else {
            let pages = self.layout.extents().iter();
            return pages.map(|extent| extent.first_page..extent.end_page(page_bytes)).collect();
        };
        let mut runs = Vec::new();
        for (first_page, source) in self.layout.by_source() {
            let page_of = |offset: u64| first_page + (offset - source.start) / page_bytes;
            let inside = written.partition_point(|part| part.end <= source.start);
            for part in written[inside..].iter().take_while(|part| part.start < source.end) {
                let (start, end) = (part.start.max(source.start), part.end.min(source.end));
                runs.push(page_of(start)..page_of(end.next_multiple_of(page_bytes)));
            }
        }
        // While the memory was not registered, the kernel has filled missing pages, which are zero in the source. They
        // are in memory without a record, and a later write to them would not be seen.
        for (index, slice) in self.slices.iter().enumerate() {
            if slice.is_released() {
                let extents = self.layout.extents_of(index).iter();
                extents.for_each(|extent| {
                    self.runs_of_missing(extent.first_page..extent.end_page(page_bytes), &mut runs);
                });
            }
        }
        runs
    }

    /// Adds the runs of missing pages.
    pub(crate) fn runs_of_missing(&self, pages: Range<u64>, runs: &mut Vec<Range<u64>>) {
        let mut at = pages.start;
        while at < pages.end {
            let missing = |page: &u64| self.states.of(*page) == PageState::Missing;
            let end = (at..pages.end).find(|page| !missing(page)).unwrap_or(pages.end);
            if at < end {
                runs.push(at..end);
            }
            at = (end..pages.end).find(missing).unwrap_or(pages.end);
        }
    }

    pub(crate) fn unregister_slice(&self, slice: usize) -> Result<(), ResetError> {
        if self.slices[slice].is_released() {
            return Ok(());
        }
        for extent in self.layout.extents_of(slice) {
            let (host_addr, len) = (extent.host.start, extent.host.end - extent.host.start);
            let unregistered = self.slices[slice].filler.uffd.unregister(host_addr, len);
            unregistered.map_err(|errno| ResetError::Unregister { host_addr, errno })?;
        }
        Ok(())
    }

    /// Returns how many bytes of a run, which is in one extent, were not missing.
    pub(crate) fn give_back(&self, pages: Range<u64>) -> Result<u64, ResetError> {
        let page_bytes = self.layout.page_bytes();
        let Some(place) = self.layout.at_page(pages.start) else { return Ok(0) };
        let extent = self.layout.extent(place.extent);
        let end = place.host_addr + (pages.end - pages.start) * page_bytes;
        let range = place.host_addr..end;
        register::discard(extent, range)
            .map_err(|error| ResetError::Discard { host_addr: place.host_addr, error })?;
        let mut left = [0; 4];
        for page in pages {
            // Most states are not written to, because that takes memory.
            if self.states.of(page) != PageState::Missing {
                left[self.states.set(page, PageState::Missing) as usize] += 1;
            }
        }
        let counters = &self.slices[extent.slice].counters;
        for from in [PageState::Present, PageState::Removed, PageState::Poisoned] {
            counters.moved(from, PageState::Missing, left[from as usize]);
        }
        Ok(left.iter().sum::<u64>() * page_bytes)
    }
}
