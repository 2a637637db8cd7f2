//! The state that all threads of a pager share.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::background::loading::LoadingPages;
use crate::background::populate::progress::Progress;
use crate::background::prefetch_progress::PrefetchProgress;
use crate::failure::FailureReport;
use crate::fault::slice::Slice;
use crate::install::page_state::{PageState, PageStates};
use crate::install::register;
use crate::layout::Layout;
use crate::region::Region;
use crate::sched::watchdog::Watchdog;
use crate::uffd::Errno;
use crate::window::core::Core;
use crate::window::slot::{WindowSlot, page_moved};

/// The state that all threads of a pager share. Its fields drop in order: the userfaultfds before the mappings.
#[derive(Debug)]
pub(crate) struct PagerState {
    pub(crate) slices: Vec<Slice>,
    pub(crate) layout: Layout,
    pub(crate) states: PageStates,
    pub(crate) failures: FailureReport,
    pub(crate) stopping: AtomicBool,
    /// The memory is a private mapping of a file that the source fills.
    pub(crate) backed: bool,
    pub(crate) loading: LoadingPages,
    pub(crate) population: Progress,
    pub(crate) prefetch: PrefetchProgress,
    pub(crate) watchdog: Watchdog,
    pub(crate) window: WindowSlot,
    /// Pages may be missing that a population has loaded before: it lets no memory go. Held while memory is let go.
    pub(crate) was_reset: Mutex<bool>,
    pub(crate) _regions: Vec<Region>,
}

impl PagerState {
    /// Whether background threads load pages now.
    pub(crate) fn background(&self) -> bool {
        self.population.is_active() || self.prefetch.is_running()
    }

    /// About how many bytes are present that are not zero in the source.
    pub(crate) fn data_bytes(&self) -> u64 {
        let pages = self.slices.iter().map(|slice| slice.counters.data_pages()).sum::<u64>();
        pages * self.layout.page_bytes()
    }

    /// Whether a fault or an event is queued, or is being answered, in any slice.
    pub(crate) fn demand(&self) -> bool {
        self.slices
            .iter()
            .any(|slice| slice.answering.load(Ordering::Relaxed) || slice.filler.uffd.readable())
    }

    /// Unregisters the memory, slice by slice, after all of it is loaded. It waits while a window is open.
    pub(crate) fn release(&self) -> Result<(), Errno> {
        self.window.refuse();
        let unregistered = self.unregister();
        // A window would register a slice again that has no faults to answer any more.
        self.window.released(self.slices.iter().any(Slice::is_released));
        unregistered
    }

    fn unregister(&self) -> Result<(), Errno> {
        for (index, slice) in self.slices.iter().enumerate() {
            let _lock = slice.lock.for_background();
            for extent in self.layout.extents_of(index) {
                let len = extent.host.end - extent.host.start;
                slice.filler.uffd.unregister(extent.host.start, len)?;
            }
            slice.released.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Marks a range as given back by the guest. The caller holds the slice lock.
    pub(crate) fn removed(&self, slice: usize, range: Range<u64>) {
        let window = self.window.get();
        for pages in self.layout.pages_in(slice, range) {
            let mut left = [0; 4];
            for page in pages {
                if let Some(core) = &window {
                    page_moved(core, page, self.states.of(page), PageState::Removed);
                }
                left[self.states.set(page, PageState::Removed) as usize] += 1;
            }
            for from in [PageState::Missing, PageState::Present, PageState::Poisoned] {
                self.slices[slice].counters.moved(from, PageState::Removed, left[from as usize]);
            }
        }
    }

    /// A page was installed, or is gone: changes its state and the counters of its slice. The caller holds the slice
    /// lock, and has got the window under it.
    pub(crate) fn moved(&self, slice: usize, page: u64, to: PageState, window: Option<&Core>) {
        if let Some(core) = window {
            page_moved(core, page, self.states.of(page), to);
        }
        let from = self.states.set(page, to);
        if from != to {
            self.slices[slice].counters.moved(from, to, 1);
        }
    }
}

impl Drop for PagerState {
    fn drop(&mut self) {
        if !self._regions.iter().any(Region::is_foreign) {
            (0..self.layout.slices()).for_each(|slice| {
                register::forget(self.layout.extents_of(slice));
            });
        }
    }
}
