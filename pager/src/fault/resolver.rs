//! Answers a fault with loaded pages, zeros or poison.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::failure::FailureCause;
use crate::fault::inbox::Inbox;
use crate::install::kernel::{Fill, InstallError, Target};
use crate::install::reason::InstallReason;
use crate::install::runs::{self, Placed, Run};
use crate::layout::Place;
use crate::pager_state::PagerState;
use crate::sched::cpus::NOWHERE;
use crate::source::load::{Load, LoadedPages};

/// A fault on a zero page fills the zero pages of the aligned block of this size around it.
///
/// A message costs 7 us and more. `UFFDIO_ZEROPAGE` costs 0.63 us for one page, 0.12 us a page for 16 pages, and 0.09
/// us a page for 512 pages (`benches/fault.rs`). With 16 pages the cost of the message is already spread well; more
/// pages would fill page tables that the guest may never use. The pager does not copy zeros: a copy costs 1.1 us a page
/// and memory for each, and saves 1 to 2 us only for pages that are written later.
pub(crate) const ZERO_FILL_BYTES: u64 = 64 << 10;

/// Prepares installs for one thread. It owns the buffers for that, so that a fault allocates nothing.
#[derive(Debug)]
pub(crate) struct Resolver {
    slice: usize,
    runs: Vec<Run>,
    /// When the pages of the last fault were all installed, if the faulting thread was woken only after that. It may
    /// run immediately, in the place of this thread.
    installed_at: Option<Instant>,
}

/// Why a fault could not be answered.
#[derive(Debug)]
pub(crate) enum ResolveError {
    /// The process that owned the memory has ended.
    ProcessGone,
    Failed(FailureCause),
}

impl From<InstallError> for ResolveError {
    fn from(error: InstallError) -> ResolveError {
        match error {
            InstallError::ProcessGone => ResolveError::ProcessGone,
            InstallError::Refused { ioctl, host_addr, errno } => {
                ResolveError::Failed(FailureCause::Install { ioctl, host_addr, errno })
            }
        }
    }
}

impl Resolver {
    pub(crate) fn new(slice: usize) -> Resolver {
        Resolver { slice, runs: Vec::with_capacity(512), installed_at: None }
    }

    /// When the last install ended.
    pub(crate) fn installed_at(&mut self) -> Instant {
        self.installed_at.take().unwrap_or_else(Instant::now)
    }

    /// Installs what was loaded for the page at `fault`. Returns whether the fault is answered.
    pub(crate) fn install(
        &mut self,
        shared: &PagerState,
        fault: Place,
        load: Load<'_>,
        inbox: &mut Inbox,
    ) -> Result<bool, ResolveError> {
        match load {
            Load::Zero { range } => {
                let target = zero_target(shared, fault, range)?;
                let reason = InstallReason::Load { fault_page: fault.page, zero: true };
                Ok(shared.install_own(self.slice, target, Fill::Zero, reason, inbox)?)
            }
            Load::Pages(loaded) => self.install_pages(shared, fault, loaded, inbox),
            Load::InFile { .. } if shared.backed => Ok(shared.try_again(self.slice, fault)?),
            Load::InFile { .. } => Err(unusable("the memory is not a mapping of a file")),
        }
    }

    /// Answers a fault on a page that must not be loaded (again): with zeros, if the page is not in memory.
    pub(crate) fn fill_zero(
        &self,
        shared: &PagerState,
        fault: Place,
        inbox: &mut Inbox,
    ) -> Result<bool, ResolveError> {
        let reason = InstallReason::FillZero { fault_page: fault.page };
        Ok(shared.install_own(self.slice, one_page(shared, fault), Fill::Zero, reason, inbox)?)
    }

    /// Makes accesses to the page fail.
    pub(crate) fn poison(
        &self,
        shared: &PagerState,
        fault: Place,
        inbox: &mut Inbox,
    ) -> Result<bool, ResolveError> {
        let reason = InstallReason::Poison { fault_page: fault.page };
        Ok(shared.install_own(self.slice, one_page(shared, fault), Fill::Poison, reason, inbox)?)
    }

    fn install_pages(
        &mut self,
        shared: &PagerState,
        fault: Place,
        loaded: LoadedPages<'_>,
        inbox: &mut Inbox,
    ) -> Result<bool, ResolveError> {
        self.plan_runs(shared, Some(fault), loaded)?;
        let page_bytes = shared.layout.page_bytes() as usize;
        let mut answered = false;
        // If the faulting thread shares this CPU, it runs as soon as it is woken, in the middle of this work and while
        // this thread holds the lock. The next page that it touches is probably among the rest. So the wake comes last.
        let wake_last = shared.slices[self.slice].bound_to.load(Ordering::Relaxed) != NOWHERE
            && (self.runs.len() > 1 || shared.background());
        for (index, run) in self.runs.iter().enumerate() {
            let target = Target {
                first_page: run.first_page,
                pages: run.pages,
                host_addr: run.host_addr,
                page_bytes,
            };
            let end = run.buffer_offset + run.pages * page_bytes;
            let bytes = &loaded.bytes[run.buffer_offset..end];
            let reason = InstallReason::Load { fault_page: fault.page, zero: false };
            let slice = shared.layout.extent(run.extent).slice;
            let fill = match wake_last && slice == self.slice {
                true => Fill::CopyWithoutWaking(bytes),
                false => Fill::Copy(bytes),
            };
            let installed = if slice == self.slice {
                shared.install_own(slice, target, fill, reason, inbox)
            } else {
                shared.install_elsewhere(slice, target, fill, reason).map(|()| false)
            };
            match installed {
                Ok(with_fault) => answered |= with_fault,
                // The pages around the fault are optional. A refused one stays missing, and its error is reported
                // when a thread touches it.
                Err(InstallError::Refused { .. }) if index > 0 => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Other threads that wait for pages of this load have messages of their own, and are woken by their answers.
        if wake_last && answered {
            self.installed_at = Some(Instant::now());
            shared.wake(self.slice, fault)?;
        }
        Ok(answered)
    }

    /// Installs pages that no thread waits for, in the slices that they belong to. `asked` is the page that was
    /// requested from the source, if it was a single one. `next_step` is called before each step with its length in
    /// bytes and may change it; when it returns `None`, the work ends.
    pub(crate) fn install_ahead(
        &mut self,
        shared: &PagerState,
        asked: Option<Place>,
        reason: InstallReason,
        loaded: LoadedPages<'_>,
        mut next_step: impl FnMut(&mut usize) -> Option<()>,
    ) -> Result<(), ResolveError> {
        self.plan_runs(shared, asked, loaded)?;
        let page_bytes = shared.layout.page_bytes() as usize;
        let mut step_bytes = 0;
        for run in &self.runs {
            let slice = shared.layout.extent(run.extent).slice;
            let mut done = 0;
            while done < run.pages {
                if next_step(&mut step_bytes).is_none() {
                    return Ok(());
                }
                let pages = (step_bytes / page_bytes).clamp(1, run.pages - done);
                let target = Target {
                    first_page: run.first_page + done as u64,
                    pages,
                    host_addr: run.host_addr + (done * page_bytes) as u64,
                    page_bytes,
                };
                let from = run.buffer_offset + done * page_bytes;
                let fill = Fill::Copy(&loaded.bytes[from..from + pages * page_bytes]);
                shared.install_elsewhere(slice, target, fill, reason)?;
                done += pages;
            }
        }
        Ok(())
    }

    /// Fills `runs` with what was loaded. The run with the requested page comes first.
    fn plan_runs(
        &mut self,
        shared: &PagerState,
        asked: Option<Place>,
        loaded: LoadedPages<'_>,
    ) -> Result<(), ResolveError> {
        let page_bytes = shared.layout.page_bytes() as usize;
        let within = |offset: usize| {
            offset.checked_add(page_bytes).is_some_and(|end| end <= loaded.bytes.len())
        };
        if !loaded.pages.iter().all(|page| within(page.buffer_offset)) {
            return Err(unusable("a page lies beyond the loaded bytes"));
        }
        // A page that is in no region (its memory is not mapped here) is left out.
        let hint = asked.map_or(0, |asked| asked.extent);
        let placed = loaded.pages.iter().filter_map(|loaded| {
            let place = shared.layout.at_source(loaded.source_offset, hint)?;
            Some(Placed { place, buffer_offset: loaded.buffer_offset })
        });
        // No page has that number.
        let asked_page = asked.map_or(u64::MAX, |asked| asked.page);
        runs::coalesce(placed, page_bytes, asked_page, &mut self.runs);
        let held = self.runs.first().is_some_and(|run| run.holds(asked_page));
        if asked.is_some() && !held {
            return Err(unusable("the requested page is not among the loaded ones"));
        }
        Ok(())
    }
}

fn one_page(shared: &PagerState, fault: Place) -> Target {
    Target {
        first_page: fault.page,
        pages: 1,
        host_addr: fault.host_addr,
        page_bytes: shared.layout.page_bytes() as usize,
    }
}

/// The pages to fill with zeros: the whole pages of `range` in the aligned block around the fault.
fn zero_target(
    shared: &PagerState,
    fault: Place,
    range: std::ops::Range<u64>,
) -> Result<Target, ResolveError> {
    let page_bytes = shared.layout.page_bytes();
    let extent = shared.layout.extent(fault.extent);
    let offset = shared.layout.source_offset(fault);
    if range.start > offset || range.end.saturating_sub(offset) < page_bytes {
        return Err(unusable("the requested page is not in the zero range"));
    }
    let block = ZERO_FILL_BYTES.max(page_bytes);
    let block_start = fault.host_addr - fault.host_addr % block;
    let before = (fault.host_addr - block_start.max(extent.host.start)).min(offset - range.start);
    let after = ((block_start.saturating_add(block)).min(extent.host.end) - fault.host_addr)
        .min(range.end - offset);
    let (before, after) = (before / page_bytes, after / page_bytes);
    Ok(Target {
        first_page: fault.page - before,
        pages: (before + after) as usize,
        host_addr: fault.host_addr - before * page_bytes,
        page_bytes: page_bytes as usize,
    })
}

fn unusable(why: &'static str) -> ResolveError {
    ResolveError::Failed(FailureCause::Answer(why))
}
