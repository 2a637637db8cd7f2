//! Installs pages in slices, under the slice lock, and keeps their states.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use crate::fault::inbox::Inbox;
use crate::install::counters::{Counters, Origin};
use crate::install::kernel::{self, Drained, Fill, InstallError, InstallObserver, PageOps, Target};
use crate::install::page_state::PageState;
use crate::install::reason::InstallReason;
use crate::layout::Place;
use crate::pager_state::PagerState;
use crate::uffd::Errno;

/// The number of pages that `poison_missing` poisons each time it takes the lock.
const POISON_PAGES: usize = 4096;

impl PagerState {
    /// Installs pages of the calling thread's own slice. Returns whether the page of the fault is dealt with.
    pub(crate) fn install_own(
        &self,
        slice: usize,
        target: Target,
        fill: Fill<'_>,
        reason: InstallReason,
        inbox: &mut Inbox,
    ) -> Result<bool, InstallError> {
        let own = &self.slices[slice];
        let _lock = own.lock.for_demand();
        if own.is_released() {
            // After a wake, the faulting thread finds the page or the kernel's zeros. It may have faulted just after
            // the kernel woke the waiting threads and just before it unregistered the memory; then no one else wakes
            // it.
            kernel::wake(&own.filler, target.host_addr, target.pages * target.page_bytes)?;
            return Ok(true);
        }
        let mut observer = SliceObserver::new(self, slice, reason, Some(inbox));
        kernel::install(&own.filler, target, fill, &mut observer)?;
        Ok(observer.answered)
    }

    /// Lets the threads that wait for a page try again: they find it in the file. The page stays `Missing`, because the
    /// pager does not see what happens to it there.
    pub(crate) fn try_again(&self, slice: usize, fault: Place) -> Result<bool, InstallError> {
        self.wake(slice, fault)?;
        self.slices[slice].counters.installed(Origin::File, 1);
        Ok(true)
    }

    /// Wakes the threads that wait for a page.
    pub(crate) fn wake(&self, slice: usize, fault: Place) -> Result<(), InstallError> {
        let page_bytes = self.layout.page_bytes() as usize;
        kernel::wake(&self.slices[slice].filler, fault.host_addr, page_bytes)
    }

    /// Installs pages of another thread's slice. It leaves pages out rather than wait for a change of the memory map; a
    /// demand thread does not wait for the lock either.
    pub(crate) fn install_elsewhere(
        &self,
        slice: usize,
        target: Target,
        fill: Fill<'_>,
        reason: InstallReason,
    ) -> Result<(), InstallError> {
        let other = &self.slices[slice];
        let lock = match reason {
            InstallReason::Populate | InstallReason::Prefetch => Some(other.lock.for_background()),
            _ => other.lock.try_lock(),
        };
        if lock.is_none() || other.is_released() {
            return Ok(());
        }
        let mut observer = SliceObserver::new(self, slice, reason, None);
        let Fill::Copy(bytes) = fill else {
            return kernel::install(&other.filler, target, fill, &mut observer);
        };
        let fill = Fill::CopyWithoutWaking(bytes);
        let installed = kernel::install(&other.filler, target, fill, &mut observer);
        // A woken thread may preempt this one, and its next fault needs the lock. So the wake comes after the lock.
        drop(lock);
        let woken = kernel::wake(&other.filler, target.host_addr, bytes.len());
        installed.and(woken)
    }

    /// Fills a page with zeros that is not in memory, unless its state is `Missing`: then it has the content of the
    /// source. Returns whether the page is in memory now; otherwise it is missing, or the memory map is changing. The
    /// caller holds the slice lock.
    pub(crate) fn fill_absent(&self, slice: usize, target: Target) -> Result<bool, InstallError> {
        let reason = InstallReason::FillZero { fault_page: target.first_page };
        let mut observer = SliceObserver::new(self, slice, reason, None);
        kernel::install(&self.slices[slice].filler, target, Fill::Zero, &mut observer)?;
        Ok(observer.answered)
    }

    /// Poisons all missing pages of a slice whose faults can no longer be served, which wakes the waiting threads.
    /// Returns whether all of them could be poisoned.
    pub(crate) fn poison_missing(&self, slice: usize, inbox: &mut Inbox) -> bool {
        let page_bytes = self.layout.page_bytes();
        let own = &self.slices[slice];
        self.layout.extents_of(slice).iter().all(|extent| {
            let pages = (extent.host.end - extent.host.start) / page_bytes;
            // In parts, because other threads need the lock, too.
            (0..pages).step_by(POISON_PAGES).all(|at| {
                let target = Target {
                    first_page: extent.first_page + at,
                    pages: (pages - at).min(POISON_PAGES as u64) as usize,
                    host_addr: extent.host.start + at * page_bytes,
                    page_bytes: page_bytes as usize,
                };
                let _lock = own.lock.for_demand();
                let reason = InstallReason::PoisonMissing;
                let mut observer = SliceObserver::new(self, slice, reason, Some(inbox));
                let done = kernel::install(&own.filler, target, Fill::Poison, &mut observer);
                // This also wakes threads whose page is present and whose message will not be read any more.
                let _ =
                    kernel::wake(&own.filler, target.host_addr, target.pages * target.page_bytes);
                let left = (target.first_page..target.first_page + target.pages as u64)
                    .any(|page| self.states.of(page) == PageState::Missing);
                own.is_released() || (done.is_ok() && !left)
            })
        })
    }

    /// Poisons the page of a fault in memory that was registered and then moved. Returns whether that was possible.
    pub(crate) fn poison_outside(&self, slice: usize, address: u64, inbox: &mut Inbox) -> bool {
        let page_bytes = self.layout.page_bytes();
        let host_addr = address - address % page_bytes;
        let own = &self.slices[slice];
        let mut drains = 0;
        while !self.stopping.load(Ordering::Relaxed) {
            let _lock = own.lock.for_demand();
            match own.filler.poison(host_addr, page_bytes as usize) {
                Ok(_) => return true,
                Err(Errno(libc::EAGAIN)) => match inbox.receive(self, slice) {
                    Ok(_) => wait_for_others(&mut drains),
                    Err(_) => return false,
                },
                Err(Errno(libc::EEXIST)) => {
                    return kernel::wake(&own.filler, host_addr, page_bytes as usize).is_ok();
                }
                Err(_) => return false,
            }
        }
        true
    }
}

/// Keeps the page states of one slice during an install. The slice lock is held as long as it exists.
struct SliceObserver<'a> {
    shared: &'a PagerState,
    slice: usize,
    reason: InstallReason,
    /// Takes the messages that arrive during the install. `None` in a thread that does not own the slice.
    inbox: Option<&'a mut Inbox>,
    answered: bool,
    drains: u32,
}

impl<'a> SliceObserver<'a> {
    fn new(
        shared: &'a PagerState,
        slice: usize,
        reason: InstallReason,
        inbox: Option<&'a mut Inbox>,
    ) -> Self {
        SliceObserver { shared, slice, reason, inbox, answered: false, drains: 0 }
    }

    fn counters(&self) -> &Counters {
        &self.shared.slices[self.slice].counters
    }
}

impl InstallObserver for SliceObserver<'_> {
    fn wants(&self, page: u64) -> bool {
        self.reason.wants(self.shared.states.of(page))
    }

    fn filled(&mut self, first_page: u64, pages: usize) {
        let fault_page = self.reason.fault_page();
        let filled = first_page..first_page + pages as u64;
        let with_fault = fault_page.is_some_and(|page| filled.contains(&page));
        let pages_count = pages as u64;
        let counters = self.counters();
        match self.reason {
            InstallReason::Poison { .. } | InstallReason::PoisonMissing => {}
            InstallReason::Populate => counters.installed(Origin::Populated, pages_count),
            InstallReason::Prefetch => counters.installed(Origin::Prefetched, pages_count),
            InstallReason::Load { zero: false, .. } => {
                counters.installed(Origin::Demand, u64::from(with_fault));
                if pages_count > u64::from(with_fault) {
                    counters.installed(Origin::FaultAround, pages_count - u64::from(with_fault));
                }
            }
            InstallReason::Load { zero: true, .. } | InstallReason::FillZero { .. } => {
                counters.installed(Origin::Zero, pages_count);
            }
        }
        let window = self.shared.window.get();
        for page in first_page..first_page + pages_count {
            self.shared.moved(self.slice, page, self.reason.filled(), window.as_deref());
        }
        self.answered |= with_fault;
    }

    fn existing(&mut self, page: u64) {
        let was = self.shared.states.of(page);
        match was.found() {
            now if now == was => self.counters().spurious(),
            now => {
                self.counters().installed(Origin::Existing, 1);
                self.shared.moved(self.slice, page, now, self.shared.window.get().as_deref());
            }
        }
        self.answered |= Some(page) == self.reason.fault_page();
    }

    fn gone(&mut self, page: u64) {
        let window = self.shared.window.get();
        self.shared.moved(self.slice, page, PageState::Removed, window.as_deref());
        self.answered |= Some(page) == self.reason.fault_page();
    }

    fn drain_events(&mut self) -> Drained {
        let Some(inbox) = &mut self.inbox else {
            return Drained::GiveUp;
        };
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Drained::GiveUp;
        }
        match inbox.receive(self.shared, self.slice) {
            // The event was already read. The change ends when the thread that makes it has run.
            Ok(0) => wait_for_others(&mut self.drains),
            Ok(_) => {}
            Err(error) => {
                inbox.broken = Some(error);
                return Drained::GiveUp;
            }
        }
        Drained::Retry
    }
}

/// Lets another thread run: first by a yield, and after 64 of them by a sleep.
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
    use crate::{Pager, Region, VecSource};

    /// When memory is unregistered, the kernel wakes the waiting threads before it unregisters: a thread can fault in
    /// between. The chaos test found one that waited forever. Here the slice is marked as released while the memory is
    /// still registered, so that the thread faults again after each wake.
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
            assert!(begun.elapsed() < Duration::from_secs(60), "it waits forever");
            thread::yield_now();
        }
        shared.release().expect("it can be taken out");
        assert_eq!(toucher.join().expect("no panic"), 0);
        pager.stop();
    }
}
