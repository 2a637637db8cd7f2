//! The window of memory that a pager serves: its userfaultfds also report the writes.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::core::{Core, Protect};
use super::error::WindowError;
use crate::install::page_state::PageState;
use crate::layout::Layout;
use crate::pager_state::PagerState;
use crate::uffd::Errno;

/// Pages that are looked at while a slice lock is held.
const LOCKED_PAGES: u64 = 4096;

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
    /// Shows a window that has the slot to the threads of the pager.
    pub(super) fn present_window(&self, core: &Arc<Core>) -> Result<(), WindowError> {
        let _locks: Vec<_> = self.slices.iter().map(|slice| slice.lock.for_background()).collect();
        self.window.present(core)
    }

    /// Makes all memory writable and forgets the window.
    pub(super) fn close_window(&self, core: &Arc<Core>) {
        core.close(self);
        let _locks: Vec<_> = self.slices.iter().map(|slice| slice.lock.for_background()).collect();
        self.window.clear(core);
    }

    /// Ends the window, and lets no other be opened, because the pager, or a thread of it, ends.
    pub(crate) fn end_window(&self, reason: &str) {
        if let Some(core) = self.window.end() {
            core.fail(reason.to_owned());
            self.close_window(&core);
        }
    }

    /// The window, if there is one, must not be saved.
    pub(crate) fn fail_window(&self, reason: String) {
        if let Some(core) = self.window.get() {
            core.fail(reason);
        }
    }

    /// Lets a write continue that waits at `host_addr`.
    ///
    /// # Errors
    /// `EAGAIN`: an event is queued. The caller reads it and calls again. Any other: the page stays protected.
    pub(crate) fn answer_write(&self, host_addr: u64) -> Result<(), Errno> {
        let answering = self.window.answering();
        match &answering.core {
            Some(core) => core.answer(self, host_addr),
            // It has waited until after the end of a window.
            None => {
                let page_bytes = self.layout.page_bytes();
                self.protect(host_addr - host_addr % page_bytes, page_bytes, false)
            }
        }
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

/// The pages among these ranges, of one extent each, that were not missing at the cut, as ranges of source offsets.
pub(super) fn own_blocks(
    shared: &PagerState,
    core: &Core,
    blocks: Vec<Range<u64>>,
) -> Vec<Range<u64>> {
    let PagerState { layout, states, slices, .. } = shared;
    let own = |pages: Range<u64>| {
        let place = layout.at_page(pages.start);
        let slice = place.map(|place| &slices[layout.extent(place.extent).slice]);
        let _lock = slice.map(|slice| slice.lock.for_background());
        let own = pages.filter(|&page| core.is_own(page, states.of(page)));
        own.map(|page| page..page + 1).collect::<Vec<_>>()
    };
    source_ranges(layout, blocks.into_iter().flat_map(own))
}

/// The source offsets of ranges of pages, of one extent each, ascending.
pub(super) fn source_ranges(
    layout: &Layout,
    pages: impl IntoIterator<Item = Range<u64>>,
) -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = pages
        .into_iter()
        .filter_map(|pages| {
            let start = layout.source_offset(layout.at_page(pages.start)?);
            Some(start..start + (pages.end - pages.start) * layout.page_bytes())
        })
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let adjacent = last.end == next.start;
        if adjacent {
            last.end = next.end;
        }
        adjacent
    });
    ranges
}
