//! What a fault is answered with: loaded pages, zeros or poison.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::failure::FailureCause;
use crate::inbox::Inbox;
use crate::install::{Fill, InstallError, Target};
use crate::layout::Place;
use crate::placement::NOWHERE;
use crate::purpose::Purpose;
use crate::run::{self, Placed, Run};
use crate::slice::Shared;
use crate::source::{Load, LoadedPages};

/// A fault on a zero page fills the zero pages of the aligned block of this size around it.
///
/// A message costs 7 us and more, and then `UFFDIO_ZEROPAGE` of one page 0.63 us, of 16 pages 0.12 us a
/// page, of 512 pages 0.09 us a page (`benches/fault.rs`): with 16 the messages are already cheap, and
/// more would only fill page tables that the guest may never use. Zero pages, not copies of zeros: a
/// copy costs 1.1 us a page and memory for each, and saves 1 to 2 us only of pages that are then written.
pub(crate) const ZERO_FILL_BYTES: u64 = 64 << 10;

/// Prepares installs for one slice's thread; owns what that needs, so that it allocates nothing.
#[derive(Debug)]
pub(crate) struct Desk {
    slice: usize,
    runs: Vec<Run>,
    /// When all was installed that came with the last fault, if who waited was woken after that: it may run at once, in the
    /// place of this thread.
    installed_at: Option<Instant>,
}

/// Why a fault could not be answered.
#[derive(Debug)]
pub(crate) enum Trouble {
    ProcessGone,
    Failed(FailureCause),
}

impl From<InstallError> for Trouble {
    fn from(error: InstallError) -> Trouble {
        match error {
            InstallError::ProcessGone => Trouble::ProcessGone,
            InstallError::Refused { ioctl, host_addr, errno } => {
                Trouble::Failed(FailureCause::Install { ioctl, host_addr, errno })
            }
        }
    }
}

impl Desk {
    pub(crate) fn new(slice: usize) -> Desk {
        Desk { slice, runs: Vec::with_capacity(512), installed_at: None }
    }

    /// When the last install had come to its end.
    pub(crate) fn installed_at(&mut self) -> Instant {
        self.installed_at.take().unwrap_or_else(Instant::now)
    }

    /// Installs what was loaded for the page at `fault`. Answers whether that page is dealt with.
    pub(crate) fn install(
        &mut self,
        shared: &Shared,
        fault: Place,
        load: Load<'_>,
        inbox: &mut Inbox,
    ) -> Result<bool, Trouble> {
        match load {
            Load::Zero { range } => {
                let target = zero_target(shared, fault, range)?;
                let purpose = Purpose::Load { fault_page: fault.page, zero: true };
                Ok(shared.install_own(self.slice, target, Fill::Zero, purpose, inbox)?)
            }
            Load::Pages(loaded) => self.install_pages(shared, fault, loaded, inbox),
            Load::InFile { .. } if shared.backed => Ok(shared.try_again(self.slice, fault)?),
            Load::InFile { .. } => Err(unusable("the memory is not a mapping of a file")),
        }
    }

    /// Answers a fault on a page that is not to be loaded (again): zeros, if it is not there.
    pub(crate) fn answer(
        &self,
        shared: &Shared,
        fault: Place,
        inbox: &mut Inbox,
    ) -> Result<bool, Trouble> {
        let purpose = Purpose::Answer { fault_page: fault.page };
        Ok(shared.install_own(self.slice, one_page(shared, fault), Fill::Zero, purpose, inbox)?)
    }

    /// Makes accesses to the page fail.
    pub(crate) fn poison(
        &self,
        shared: &Shared,
        fault: Place,
        inbox: &mut Inbox,
    ) -> Result<bool, Trouble> {
        let purpose = Purpose::Poison { fault_page: fault.page };
        Ok(shared.install_own(self.slice, one_page(shared, fault), Fill::Poison, purpose, inbox)?)
    }

    fn install_pages(
        &mut self,
        shared: &Shared,
        fault: Place,
        loaded: LoadedPages<'_>,
        inbox: &mut Inbox,
    ) -> Result<bool, Trouble> {
        self.lay_out(shared, Some(fault), loaded)?;
        let page_bytes = shared.layout.page_bytes() as usize;
        let mut answered = false;
        // On one CPU, who is woken takes it at once, in the middle of this work and with the gate held: then all the
        // rest would wait, and the next page that it touches is probably among that.
        let quiet = shared.slices[self.slice].bound_to.load(Ordering::Relaxed) != NOWHERE
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
            let purpose = Purpose::Load { fault_page: fault.page, zero: false };
            let slice = shared.layout.extent(run.extent).slice;
            let fill = match quiet && slice == self.slice {
                true => Fill::CopyQuietly(bytes),
                false => Fill::Copy(bytes),
            };
            let installed = if slice == self.slice {
                shared.install_own(slice, target, fill, purpose, inbox)
            } else {
                shared.install_elsewhere(slice, target, fill, purpose).map(|()| false)
            };
            match installed {
                Ok(with_fault) => answered |= with_fault,
                // Pages around the fault are a bonus: one that is refused stays missing, and has its say
                // when somebody waits for it.
                Err(InstallError::Refused { .. }) if index > 0 => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Others that wait for pages of this load have messages of their own, and are woken when those are answered.
        if quiet && answered {
            self.installed_at = Some(Instant::now());
            shared.wake(self.slice, fault)?;
        }
        Ok(answered)
    }

    /// Installs, wherever it belongs, what was loaded for a page that nobody waits for (`None`: for no page in
    /// particular). `next_step` is called before each step with its length in bytes, to change it; its `None` ends
    /// the work.
    pub(crate) fn populate(
        &mut self,
        shared: &Shared,
        asked: Option<Place>,
        purpose: Purpose,
        loaded: LoadedPages<'_>,
        mut next_step: impl FnMut(&mut usize) -> Option<()>,
    ) -> Result<(), Trouble> {
        self.lay_out(shared, asked, loaded)?;
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
                shared.install_elsewhere(slice, target, fill, purpose)?;
                done += pages;
            }
        }
        Ok(())
    }

    /// Fills `runs` with what was loaded, the run with the asked page first.
    fn lay_out(
        &mut self,
        shared: &Shared,
        asked: Option<Place>,
        loaded: LoadedPages<'_>,
    ) -> Result<(), Trouble> {
        let page_bytes = shared.layout.page_bytes() as usize;
        let within = |offset: usize| {
            offset.checked_add(page_bytes).is_some_and(|end| end <= loaded.bytes.len())
        };
        if !loaded.pages.iter().all(|page| within(page.buffer_offset)) {
            return Err(unusable("a page lies beyond the loaded bytes"));
        }
        // A page that no region has (memory that is not mapped here) is left out.
        let hint = asked.map_or(0, |asked| asked.extent);
        let placed = loaded.pages.iter().filter_map(|loaded| {
            let place = shared.layout.at_source(loaded.source_offset, hint)?;
            Some(Placed { place, buffer_offset: loaded.buffer_offset })
        });
        // No page has that number.
        let asked_page = asked.map_or(u64::MAX, |asked| asked.page);
        run::coalesce(placed, page_bytes, asked_page, &mut self.runs);
        let held = self.runs.first().is_some_and(|run| run.holds(asked_page));
        if asked.is_some() && !held {
            return Err(unusable("the asked page is not among the loaded ones"));
        }
        Ok(())
    }
}

fn one_page(shared: &Shared, fault: Place) -> Target {
    Target {
        first_page: fault.page,
        pages: 1,
        host_addr: fault.host_addr,
        page_bytes: shared.layout.page_bytes() as usize,
    }
}

/// The pages to fill with zeros: whole pages of `range` in the block around the fault.
fn zero_target(
    shared: &Shared,
    fault: Place,
    range: std::ops::Range<u64>,
) -> Result<Target, Trouble> {
    let page_bytes = shared.layout.page_bytes();
    let extent = shared.layout.extent(fault.extent);
    let offset = shared.layout.source_offset(fault);
    if range.start > offset || range.end.saturating_sub(offset) < page_bytes {
        return Err(unusable("the asked page is not in the range said to be zero"));
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

fn unusable(why: &'static str) -> Trouble {
    Trouble::Failed(FailureCause::Answer(why))
}
