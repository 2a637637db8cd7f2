//! A running pager.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::background::populate::population::Population;
use crate::background::prefetch_progress::Prefetch;
use crate::builder::PagerBuilder;
use crate::failure::Failure;
use crate::fault::slice::Slice;
use crate::install::page_state::PageState;
use crate::pager_state::PagerState;
use crate::recording::Recording;
use crate::source::page_source::PageSource;
use crate::stats::{RegionStats, Stats};

/// A running pager. The documentation of the crate has an example.
#[derive(Debug)]
pub struct Pager {
    pub(crate) shared: Arc<PagerState>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    /// The thread of the prefetch.
    pub(crate) workers: Vec<JoinHandle<()>>,
    /// Dropping it stops the threads, which poll the other end.
    pub(crate) stop: Option<io::PipeWriter>,
}

impl Pager {
    /// Options for a pager that loads pages from `source`.
    pub fn builder(source: Arc<dyn PageSource>) -> PagerBuilder {
        PagerBuilder::new(source)
    }

    /// Options for a pager that records which pages of the memory of `recording` are touched. It is
    /// [`PagerBuilder::backed`], with the same limits for memory that is given back, prefetch and population. This
    /// requires Linux 5.19.
    pub fn recording(recording: &Recording) -> PagerBuilder {
        let mut builder = Pager::builder(recording.source());
        builder.fault_around_off = true;
        builder.regions(recording.regions().iter().cloned()).backed()
    }

    /// The statistics so far.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// The statistics of each region, sorted by address. Reads the state of each page: 1 ms for each 4 GiB.
    pub fn region_stats(&self) -> Vec<RegionStats> {
        self.shared.region_stats()
    }

    /// The number of page-fault messages answered so far. This is cheaper than [`Pager::stats`].
    pub fn faults(&self) -> u64 {
        self.shared.slices.iter().map(|slice| slice.counters.faults()).sum()
    }

    /// The parts of the source, as ascending ranges of offsets in bytes, whose pages are not missing any more: they
    /// were installed, removed or poisoned. All other memory was never touched and is as in the source.
    ///
    /// The result includes every page that a thread has accessed before the call. While other threads touch memory, it
    /// is soon out of date. After the population is [`Population::Complete`], it is the whole source, because the pager
    /// does not see any more which pages are touched.
    pub fn touched(&self) -> Vec<Range<u64>> {
        let PagerState { layout, states, slices, .. } = &*self.shared;
        // A page is usable a moment before its state says so, while the slice lock is held. After each lock was taken
        // once, the states of all pages that were usable before are set.
        slices.iter().for_each(|slice| drop(slice.lock.for_background()));
        let mut touched: Vec<Range<u64>> = Vec::new();
        let released = slices.iter().any(Slice::is_released);
        for (first_page, source) in layout.by_source() {
            for (page, offset) in (first_page..).zip(source.step_by(layout.page_bytes() as usize)) {
                if states.of(page) == PageState::Missing && !released {
                    continue;
                }
                let end = offset + layout.page_bytes();
                match touched.last_mut() {
                    Some(last) if last.end == offset => last.end = end,
                    _ => touched.push(offset..end),
                }
            }
        }
        touched
    }

    /// The progress of the background population.
    pub fn population(&self) -> Population {
        self.shared.population.state()
    }

    /// Waits until the background population has ended, or for `timeout`. Returns its progress. After it is
    /// [`Population::Complete`], the source is not read any more, and the pager may be stopped while the guest runs.
    pub fn wait_complete(&self, timeout: Duration) -> Population {
        self.shared.population.wait(timeout)
    }

    /// Waits until the prefetch has ended, or for `timeout`. Returns its progress.
    pub fn wait_prefetched(&self, timeout: Duration) -> Prefetch {
        self.shared.prefetch.wait(timeout)
    }

    /// The first failure, if there was one.
    pub fn failure(&self) -> Option<&Failure> {
        self.shared.failures.first()
    }

    /// Stops the pager and returns the final statistics. All threads have ended when this returns. A thread that is
    /// loading a page ends after that.
    ///
    /// **Call this only when nothing can touch a missing page any more**: the vCPUs have ended, or
    /// `stats().pages.missing` is 0, or the population is [`Population::Complete`]. It closes the userfaultfds. From
    /// then on, pages that were never loaded read as ZEROS. Dropping the pager is the same as stopping it.
    pub fn stop(mut self) -> Stats {
        self.end();
        self.shared.stats()
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &PagerState {
        &self.shared
    }

    fn end(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Its writes would wait for threads that end.
        self.shared.end_window("the pager was stopped");
        // First, because demand threads with lowered priority might not get CPU time to end.
        self.shared.watchdog.stop(self.shared.slices.iter().map(|slice| &slice.priority));
        drop(self.stop.take());
        self.workers.iter().for_each(|worker| worker.thread().unpark());
        self.shared.population.stop();
        for thread in self.threads.drain(..).chain(self.workers.drain(..)) {
            // The thread catches and reports its panics.
            let _ = thread.join();
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.end();
    }
}
