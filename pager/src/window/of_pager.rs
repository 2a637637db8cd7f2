//! The window of memory that a pager serves: its userfaultfds also report the writes.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::core::{Core, Protect};
use super::{Memory, ReadMemory, Window, WindowError, WindowOptions};
use crate::install::page_state::PageState;
use crate::pager::Pager;
use crate::pager_state::PagerState;
use crate::region::{PAGE_BYTES, Region};
use crate::uffd::Errno;

/// Pages that are looked at while a slice lock is held.
const LOCKED_PAGES: u64 = 4096;

/// The window of a pager, if it has one.
#[derive(Debug, Default)]
pub(crate) struct WindowSlot {
    /// A copy of whether there is one, for threads that hold a slice lock. It changes while all of these are held.
    present: AtomicBool,
    state: Mutex<SlotState>,
    closed: Condvar,
}

#[derive(Debug, Default)]
struct SlotState {
    core: Option<Arc<Core>>,
    /// The pager has let the memory go, or is about to.
    released: bool,
}

impl WindowSlot {
    fn lock(&self) -> MutexGuard<'_, SlotState> {
        // The data is consistent whenever the lock is released.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The window, in a thread that holds a slice lock or answers a write fault.
    pub(crate) fn get(&self) -> Option<Arc<Core>> {
        match self.present.load(Ordering::SeqCst) {
            false => None,
            true => self.lock().core.clone(),
        }
    }

    /// Lets no window be opened from now on, after the one that is open was closed.
    pub(crate) fn refuse(&self) {
        let state = self.lock();
        let open = |state: &mut SlotState| state.core.is_some();
        let mut state = self.closed.wait_while(state, open).unwrap_or_else(PoisonError::into_inner);
        state.released = true;
    }
}

impl Protect for PagerState {
    fn protect(&self, host_addr: u64, len: u64, on: bool) -> Result<(), Errno> {
        let Some(place) = self.layout.at_host(host_addr) else { return Ok(()) };
        let slice = self.layout.extent(place.extent).slice;
        self.slices[slice].filler.uffd.write_protect(host_addr, len, on)
    }

    fn is_present(&self, page: u64) -> bool {
        let present = self.states.of(page) == PageState::Present;
        // What was done before the state was set is seen after this.
        fence(Ordering::Acquire);
        present
    }
}

impl PagerState {
    fn set_window(&self, core: Option<Arc<Core>>) {
        let _locks: Vec<_> = self.slices.iter().map(|slice| slice.lock.for_background()).collect();
        self.window.present.store(core.is_some(), Ordering::SeqCst);
        self.window.lock().core = core;
    }

    /// Makes all memory writable and forgets the window.
    pub(super) fn close_window(&self, core: &Arc<Core>) {
        let is_this = self.window.lock().core.as_ref().is_some_and(|open| Arc::ptr_eq(open, core));
        core.close(self);
        if is_this {
            self.set_window(None);
            self.window.closed.notify_all();
        }
    }

    /// Ends the window, because the pager, or a thread of it, ends.
    pub(crate) fn end_window(&self, reason: &str) {
        if let Some(core) = self.window.get() {
            core.fail(reason.to_owned());
            self.close_window(&core);
        }
    }

    /// Lets a write continue that waits at `host_addr`.
    ///
    /// # Errors
    /// `EAGAIN`: an event is queued. The caller reads it and calls again.
    pub(crate) fn answer_write(&self, host_addr: u64) -> Result<(), Errno> {
        match self.window.get() {
            Some(core) => core.answer(self, host_addr),
            // It has waited until after the end of a window.
            None => {
                let page_bytes = self.layout.page_bytes();
                self.protect(host_addr - host_addr % page_bytes, page_bytes, false)
            }
        }
    }
}

impl Pager {
    /// Protects all memory that was installed from writes, while threads use it: see [`Window`]. `read` reads a page
    /// that is in memory.
    ///
    /// # Errors
    /// [`WindowError`]. Then nothing is protected. [`WindowError::Released`]: the population is complete.
    pub fn window(&self, read: ReadMemory, options: WindowOptions) -> Result<Window, WindowError> {
        let shared = &self.shared;
        let foreign = shared._regions.iter().any(Region::is_foreign);
        if foreign || shared.backed || shared.layout.page_bytes() != PAGE_BYTES as u64 {
            return Err(WindowError::Unsupported);
        }
        let core = Core::new(shared.layout.clone(), read, options.staging_bytes)
            .map_err(|error| WindowError::System { what: "memory for the page states", error })?;
        let core = Arc::new(core);
        {
            let mut state = shared.window.lock();
            if state.released {
                return Err(WindowError::Released);
            }
            if state.core.is_some() {
                return Err(WindowError::Busy);
            }
            state.core = Some(Arc::clone(&core));
        }
        // From here on, dropping the window makes all memory writable.
        let window = Window { core: Arc::clone(&core), memory: Memory::Paged(Arc::clone(shared)) };
        shared.set_window(Some(Arc::clone(&core)));
        for extent in shared.layout.extents() {
            let (host_addr, len) = (extent.host.start, extent.host.end - extent.host.start);
            let uffd = &shared.slices[extent.slice].filler.uffd;
            uffd.register_protection(host_addr, len, true)
                .map_err(|errno| WindowError::Register { host_addr, errno })?;
        }
        core.arm(&**shared)?;
        Ok(window)
    }
}

/// The pages that were not missing at the cut, as ranges of source offsets.
pub(super) fn own_pages(shared: &PagerState, core: &Core) -> Vec<Range<u64>> {
    let PagerState { layout, states, slices, .. } = shared;
    let page_bytes = layout.page_bytes();
    let mut own: Vec<Range<u64>> = Vec::new();
    for (first_page, source) in layout.by_source() {
        let Some(place) = layout.at_page(first_page) else { continue };
        let slice = &slices[layout.extent(place.extent).slice];
        let pages = (source.end - source.start) / page_bytes;
        for from in (0..pages).step_by(LOCKED_PAGES as usize) {
            let _lock = slice.lock.for_background();
            for at in from..(from + LOCKED_PAGES).min(pages) {
                let page = first_page + at;
                if !core.is_own(page, states.of(page)) {
                    continue;
                }
                let offset = source.start + at * page_bytes;
                match own.last_mut() {
                    Some(last) if last.end == offset => last.end += page_bytes,
                    _ => own.push(offset..offset + page_bytes),
                }
            }
        }
    }
    own
}

/// What a change of a page's state means for the window. The caller holds the slice lock, and sets the state after it.
pub(crate) fn page_moved(core: &Core, page: u64, from: PageState, to: PageState) {
    let was_missing = from == PageState::Missing;
    match to {
        PageState::Removed => core.removed(page, was_missing),
        PageState::Present | PageState::Poisoned => core.installed(page, was_missing),
        PageState::Missing => {}
    }
    fence(Ordering::Release);
}
