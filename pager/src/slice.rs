//! A slice of the paged memory: a userfaultfd of its own, and the rule by which its pages change.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::deference::{Standing, Watch};
use crate::failure::FailureReport;
use crate::gate::Gate;
use crate::inbox::Inbox;
use crate::install::{self, Book, Fill, Filler, InstallError, PageOps, Settled, Target};
use crate::latency::Recorder;
use crate::layout::{Layout, Place};
use crate::loading::LoadingPages;
use crate::page_state::{PageState, PageStates};
use crate::placement::NOWHERE;
use crate::populate::Progress;
use crate::prefetch::PrefetchProgress;
use crate::purpose::Purpose;
use crate::region::Region;
use crate::register;
use crate::stats::{Counters, Origin};
use crate::uffd::Errno;

/// A contiguous part of the paged memory.
#[derive(Debug)]
pub(crate) struct Slice {
    pub(crate) filler: Filler,
    pub(crate) counters: Counters,
    pub(crate) recorder: Recorder,
    pub(crate) gate: Gate,
    /// The slice's thread has messages in its hands. Others step aside while it has.
    pub(crate) answering: AtomicBool,
    /// The CPU that the slice's thread is bound to, or [`NOWHERE`].
    pub(crate) bound_to: AtomicUsize,
    pub(crate) standing: Standing,
    /// All is loaded and nothing is registered any more. Set under the gate.
    released: AtomicBool,
}

impl Slice {
    pub(crate) fn new(filler: Filler, pages: u64, regions: usize) -> Slice {
        Slice {
            filler,
            counters: Counters::of(pages),
            recorder: Recorder::new(regions),
            gate: Gate::default(),
            answering: AtomicBool::new(false),
            bound_to: AtomicUsize::new(NOWHERE),
            standing: Standing::default(),
            released: AtomicBool::new(false),
        }
    }

    pub(crate) fn is_released(&self) -> bool {
        self.released.load(Ordering::Relaxed)
    }
}

/// What all threads of a pager share. Fields are dropped in order: the userfaultfds before the mappings.
#[derive(Debug)]
pub(crate) struct Shared {
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
    pub(crate) watch: Watch,
    pub(crate) _regions: Vec<Region>,
}

impl Shared {
    /// A fault's answer: installs pages of the thread's own slice. Answers whether `fault_page` is dealt with.
    pub(crate) fn install_own(
        &self,
        slice: usize,
        target: Target,
        fill: Fill<'_>,
        purpose: Purpose,
        inbox: &mut Inbox,
    ) -> Result<bool, InstallError> {
        let own = &self.slices[slice];
        let _gate = own.gate.demand();
        if own.is_released() {
            // Who waits finds the page or the kernel's zeros. It may have queued up just after the kernel woke the waiters
            // and just before the memory was taken out, and then nobody else wakes it.
            install::wake(&own.filler, target.host_addr, target.pages * target.page_bytes)?;
            return Ok(true);
        }
        let mut book = SliceBook::new(self, slice, purpose, Some(inbox));
        install::install(&own.filler, target, fill, &mut book)?;
        Ok(book.answered)
    }

    /// Lets those who wait for a page try again: they find it in the file. The page stays *missing*, for
    /// what comes of it there, this pager never sees.
    pub(crate) fn try_again(&self, slice: usize, fault: Place) -> Result<bool, InstallError> {
        self.wake(slice, fault)?;
        self.slices[slice].counters.installed(Origin::File, 1);
        Ok(true)
    }

    /// Wakes those who wait for a page.
    pub(crate) fn wake(&self, slice: usize, fault: Place) -> Result<(), InstallError> {
        let page_bytes = self.layout.page_bytes() as usize;
        install::wake(&self.slices[slice].filler, fault.host_addr, page_bytes)
    }

    /// Installs pages of another thread's slice, as far as nothing stands in the way.
    pub(crate) fn install_elsewhere(
        &self,
        slice: usize,
        target: Target,
        fill: Fill<'_>,
        purpose: Purpose,
    ) -> Result<(), InstallError> {
        let other = &self.slices[slice];
        let gate = match purpose {
            Purpose::Populate | Purpose::Prefetch => Some(other.gate.background()),
            _ => other.gate.try_take(),
        };
        if gate.is_none() || other.is_released() {
            return Ok(());
        }
        install::install(
            &other.filler,
            target,
            fill,
            &mut SliceBook::new(self, slice, purpose, None),
        )
    }

    /// Faults of this slice can no longer be served: makes every page fail that is not there, which wakes
    /// who waits. Answers whether that was possible for all.
    pub(crate) fn poison_missing(&self, slice: usize, inbox: &mut Inbox) -> bool {
        let page_bytes = self.layout.page_bytes();
        let own = &self.slices[slice];
        self.layout.extents_of(slice).iter().all(|extent| {
            let pages = (extent.host.end - extent.host.start) / page_bytes;
            // In parts: the gate is wanted for other things, too.
            (0..pages).step_by(PART_PAGES).all(|at| {
                let target = Target {
                    first_page: extent.first_page + at,
                    pages: (pages - at).min(PART_PAGES as u64) as usize,
                    host_addr: extent.host.start + at * page_bytes,
                    page_bytes: page_bytes as usize,
                };
                let _gate = own.gate.demand();
                let mut book = SliceBook::new(self, slice, Purpose::PoisonMissing, Some(inbox));
                let done = install::install(&own.filler, target, Fill::Poison, &mut book);
                // Also those whose page is there and whose message nobody reads any more.
                let _ =
                    install::wake(&own.filler, target.host_addr, target.pages * target.page_bytes);
                let left = (target.first_page..target.first_page + target.pages as u64)
                    .any(|page| self.states.of(page) == PageState::Missing);
                own.is_released() || (done.is_ok() && !left)
            })
        })
    }

    /// A fault in memory that was registered and then moved away: it fails.
    pub(crate) fn poison_outside(&self, slice: usize, address: u64, inbox: &mut Inbox) -> bool {
        let page_bytes = self.layout.page_bytes();
        let host_addr = address - address % page_bytes;
        let own = &self.slices[slice];
        let mut settles = 0;
        while !self.stopping.load(Ordering::Relaxed) {
            let _gate = own.gate.demand();
            match own.filler.poison(host_addr, page_bytes as usize) {
                Ok(_) => return true,
                Err(Errno(libc::EAGAIN)) => match inbox.receive(self, slice) {
                    Ok(_) => wait_for_others(&mut settles),
                    Err(_) => return false,
                },
                Err(Errno(libc::EEXIST)) => {
                    return install::wake(&own.filler, host_addr, page_bytes as usize).is_ok();
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Whether threads load pages that no thread waits for.
    pub(crate) fn background(&self) -> bool {
        self.population.is_active() || self.prefetch.is_running()
    }

    /// Whether a fault or an event waits anywhere, or is being answered.
    pub(crate) fn demand(&self) -> bool {
        self.slices
            .iter()
            .any(|slice| slice.answering.load(Ordering::Relaxed) || slice.filler.uffd.readable())
    }

    /// All is loaded: takes the memory out of the userfaultfds, slice by slice.
    pub(crate) fn release(&self) -> Result<(), Errno> {
        for (index, slice) in self.slices.iter().enumerate() {
            let _gate = slice.gate.background();
            for extent in self.layout.extents_of(index) {
                let len = extent.host.end - extent.host.start;
                slice.filler.uffd.unregister(extent.host.start, len)?;
            }
            slice.released.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The guest gave the range back. The caller holds the slice's gate.
    pub(crate) fn removed(&self, slice: usize, range: Range<u64>) {
        for pages in self.layout.pages_in(slice, range) {
            let mut left = [0; 4];
            for page in pages {
                left[self.states.set(page, PageState::Removed) as usize] += 1;
            }
            for from in [PageState::Missing, PageState::Present, PageState::Poisoned] {
                self.slices[slice].counters.moved(from, PageState::Removed, left[from as usize]);
            }
        }
    }

    fn moved(&self, slice: usize, page: u64, to: PageState) {
        let from = self.states.set(page, to);
        if from != to {
            self.slices[slice].counters.moved(from, to, 1);
        }
    }
}

/// Poisoned at once under the gate.
const PART_PAGES: usize = 4096;

/// Keeps the page states of one slice while an install runs. Lives under the slice's gate.
struct SliceBook<'a> {
    shared: &'a Shared,
    slice: usize,
    purpose: Purpose,
    /// Where messages go that come up meanwhile; `None` in a thread that doesn't own the slice.
    inbox: Option<&'a mut Inbox>,
    answered: bool,
    settles: u32,
}

impl<'a> SliceBook<'a> {
    fn new(
        shared: &'a Shared,
        slice: usize,
        purpose: Purpose,
        inbox: Option<&'a mut Inbox>,
    ) -> Self {
        SliceBook { shared, slice, purpose, inbox, answered: false, settles: 0 }
    }

    fn counters(&self) -> &Counters {
        &self.shared.slices[self.slice].counters
    }
}

impl Book for SliceBook<'_> {
    fn wants(&self, page: u64) -> bool {
        self.purpose.wants(self.shared.states.of(page))
    }

    fn filled(&mut self, first_page: u64, pages: usize) {
        let fault_page = self.purpose.fault_page();
        let filled = first_page..first_page + pages as u64;
        let with_fault = fault_page.is_some_and(|page| filled.contains(&page));
        let pages_count = pages as u64;
        let counters = self.counters();
        match self.purpose {
            Purpose::Poison { .. } | Purpose::PoisonMissing => {}
            Purpose::Populate => counters.installed(Origin::Populated, pages_count),
            Purpose::Prefetch => counters.installed(Origin::Prefetched, pages_count),
            Purpose::Load { zero: false, .. } => {
                counters.installed(Origin::Demand, u64::from(with_fault));
                if pages_count > u64::from(with_fault) {
                    counters.installed(Origin::FaultAround, pages_count - u64::from(with_fault));
                }
            }
            Purpose::Load { zero: true, .. } | Purpose::Answer { .. } => {
                counters.installed(Origin::Zero, pages_count);
            }
        }
        for page in first_page..first_page + pages_count {
            self.shared.moved(self.slice, page, self.purpose.filled());
        }
        self.answered |= with_fault;
    }

    fn existing(&mut self, page: u64) {
        let was = self.shared.states.of(page);
        match was.found() {
            now if now == was => self.counters().spurious(),
            now => {
                self.counters().installed(Origin::Existing, 1);
                self.shared.moved(self.slice, page, now);
            }
        }
        self.answered |= Some(page) == self.purpose.fault_page();
    }

    fn gone(&mut self, page: u64) {
        self.shared.moved(self.slice, page, PageState::Removed);
        self.answered |= Some(page) == self.purpose.fault_page();
    }

    fn settle(&mut self) -> Settled {
        let Some(inbox) = &mut self.inbox else {
            return Settled::GiveUp;
        };
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Settled::GiveUp;
        }
        match inbox.receive(self.shared, self.slice) {
            // The change is known now, and ends when the thread that makes it has run.
            Ok(0) => wait_for_others(&mut self.settles),
            Ok(_) => {}
            Err(error) => {
                inbox.broken = Some(error);
                return Settled::GiveUp;
            }
        }
        Settled::Retry
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if !self._regions.iter().any(Region::is_foreign) {
            (0..self.layout.slices()).for_each(|slice| {
                register::forget(self.layout.extents_of(slice));
            });
        }
    }
}

/// Lets another thread run: by a yield, and when that was not enough for long, by sleeping.
fn wait_for_others(times: &mut u32) {
    *times += 1;
    if *times < 64 {
        thread::yield_now();
    } else {
        thread::sleep(Duration::from_micros(50));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;
    use crate::mapping::Mapping;
    use crate::{Pager, VecSource};

    /// The kernel wakes the waiters of memory that is unregistered before it takes the memory out: a thread can queue up in
    /// between. Chaos found one that waited for ever. Here its fault is read when all is released, and the memory is still
    /// registered: then each time it is woken it faults again.
    #[test]
    fn a_fault_that_comes_late_is_woken() {
        let memory = Arc::new(Mapping::anonymous(4 << 20).expect("memory"));
        let at = memory.at(0, 1).as_ptr() as u64;
        // SAFETY: mapped until the pager has stopped, and accessed only through a raw pointer.
        #[allow(unsafe_code)]
        let region = unsafe { Region::new(at, 4 << 20, 4096, 0) }.expect("whole pages");
        let source = Arc::new(VecSource::new(vec![7; 4 << 20], 4096));
        let pager = match Pager::builder(source).region(region).start() {
            Ok(pager) => pager,
            Err(error) => {
                assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{error}");
                let line = format!("SKIPPED a_fault_that_comes_late_is_woken: {error}\n");
                return std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes())
                    .expect("stderr");
            }
        };
        let shared = pager.shared();
        shared.slices[0].released.store(true, Ordering::Relaxed);
        let touched = Arc::clone(&memory);
        let toucher = thread::spawn(move || {
            let page = touched.at(8192, 1).as_ptr();
            // SAFETY: mapped, and accessed by volatile operations only.
            #[allow(unsafe_code)]
            unsafe {
                page.read_volatile()
            }
        });
        let begun = Instant::now();
        while pager.faults() < 3 {
            assert!(begun.elapsed() < Duration::from_secs(60), "it waits for ever");
            thread::yield_now();
        }
        shared.release().expect("it can be taken out");
        assert_eq!(toucher.join().expect("no panic"), 0);
        pager.stop();
    }
}
