//! Pages that the kernel has filled with zeros while their memory was not registered.
//!
//! That the caller lets no thread access the memory does not exclude it. KVM lets a worker of the kernel wait for a page
//! while the vCPU runs on, and can be paused: unregistering wakes the worker, which repeats its fault. And khugepaged
//! fills holes when it makes a huge page.

use std::ops::Range;

use crate::install::register;
use crate::layout::Extent;
use crate::pagemap::Pagemap;
use crate::pager_state::PagerState;
use crate::region::PAGE_BYTES;
use crate::reset::ResetError;

/// How often the pages are looked for. A worker that waits for a page when its memory is registered again is woken by
/// the next round, so that there may be a few.
const ROUNDS: usize = 32;

impl PagerState {
    /// Drops pages of a slice that are in memory and `Missing` in the page states, so that faults load them. The caller
    /// holds the slice lock, and has registered the memory: the kernel fills no page after that.
    pub(crate) fn drop_filled(
        &self,
        slice: usize,
        pagemap: &mut Pagemap,
    ) -> Result<(), ResetError> {
        let mut last = 0;
        for _ in 0..ROUNDS {
            let mut filled = Vec::new();
            for extent in self.layout.extents_of(slice) {
                self.find_filled(extent, pagemap, &mut filled)?;
            }
            let Some(run) = filled.last() else { return Ok(()) };
            last = run.start;
            self.unregister_slice(slice)?;
            for run in filled {
                self.give_back(run)?;
            }
            let uffd = &self.slices[slice].filler.uffd;
            register::all(uffd, self.layout.extents_of(slice), false)
                .map_err(ResetError::Register)?;
        }
        let host_addr = self.layout.at_page(last).map_or(0, |place| place.host_addr);
        Err(ResetError::Filled { host_addr, rounds: ROUNDS })
    }

    fn find_filled(
        &self,
        extent: &Extent,
        pagemap: &mut Pagemap,
        filled: &mut Vec<Range<u64>>,
    ) -> Result<(), ResetError> {
        let page_bytes = self.layout.page_bytes();
        let part_bytes = (Pagemap::MAX_PAGES * PAGE_BYTES) as u64;
        for host_addr in extent.host.clone().step_by(part_bytes as usize) {
            let len_bytes = part_bytes.min(extent.host.end - host_addr);
            let mapped = pagemap.mapped(host_addr, (len_bytes / PAGE_BYTES as u64) as usize);
            let page_of = |addr: u64| extent.first_page + (addr - extent.host.start) / page_bytes;
            for run in mapped.map_err(ResetError::Pagemap)? {
                self.runs_of_missing(page_of(run.start)..page_of(run.end - 1) + 1, filled);
            }
        }
        Ok(())
    }
}
