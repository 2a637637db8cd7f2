//! A running pager, and its end.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::builder::PagerBuilder;
use crate::failure::Failure;
use crate::page_state::PageState;
use crate::populate::Population;
use crate::prefetch::Prefetch;
use crate::recording::Recording;
use crate::slice::{Shared, Slice};
use crate::source::PageSource;
use crate::stats::{RegionStats, Stats};

/// A running fault service. See the crate's documentation for an example.
#[derive(Debug)]
pub struct Pager {
    pub(crate) shared: Arc<Shared>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    /// That of the prefetch.
    pub(crate) workers: Vec<JoinHandle<()>>,
    /// Dropped to stop the threads: they poll the other end.
    pub(crate) stop: Option<io::PipeWriter>,
}

impl Pager {
    /// A pager that takes pages from `source`, to be given regions and started.
    pub fn builder(source: Arc<dyn PageSource>) -> PagerBuilder {
        PagerBuilder::new(source)
    }

    /// A pager that records which pages of the recording's memory are touched, to be started. It is
    /// [`PagerBuilder::backed`], with what that means for memory that is given back, prefetch and population. Wants Linux 5.19.
    pub fn recording(recording: &Recording) -> PagerBuilder {
        let mut builder = Pager::builder(recording.source());
        builder.one_by_one = true;
        builder.regions(recording.regions().iter().cloned()).backed()
    }

    /// What it has done so far.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// The same for each region, by address. Looks at the state of each page: a millisecond for each 4 GiB.
    pub fn region_stats(&self) -> Vec<RegionStats> {
        self.shared.region_stats()
    }

    /// Page-fault messages answered so far: cheaper than [`Pager::stats`], for those who look often.
    pub fn faults(&self) -> u64 {
        self.shared.slices.iter().map(|slice| slice.counters.faults()).sum()
    }

    /// The parts of the source, by offset and ascending, whose pages are not missing any more: they
    /// were installed, removed or poisoned. All other memory was never touched and is as in the source.
    ///
    /// It holds every page that a thread has got past before the call. While other threads go on
    /// touching memory it is soon out of date. After a population that is [`Population::Complete`] it is all
    /// of the source: nobody sees any more what is touched.
    pub fn touched(&self) -> Vec<Range<u64>> {
        let Shared { layout, states, slices, .. } = &*self.shared;
        // A page is usable a moment before its state says so. Both happen under the gate of its slice:
        // once each gate was free, the states of all pages that were usable before are set.
        slices.iter().for_each(|slice| drop(slice.gate.background()));
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

    /// How far the background population has come.
    pub fn population(&self) -> Population {
        self.shared.population.state()
    }

    /// Waits until the background population has ended, or for `timeout`, and answers how far it has come.
    /// Once it is [`Population::Complete`] the pager may be stopped while the guest goes on, and the source is
    /// not read any more.
    pub fn wait_complete(&self, timeout: Duration) -> Population {
        self.shared.population.wait(timeout)
    }

    /// Waits until the prefetch has ended, or for `timeout`, and answers how far it has come.
    pub fn wait_prefetched(&self, timeout: Duration) -> Prefetch {
        self.shared.prefetch.wait(timeout)
    }

    /// The first failure, if there was one.
    pub fn failure(&self) -> Option<&Failure> {
        self.shared.failures.first()
    }

    /// Ends the service and answers the final figures. The threads have ended when it returns; one that
    /// is in the middle of loading a page ends after it.
    ///
    /// **Call it only when nothing can touch a missing page any more**: vCPUs have ended, or
    /// `stats().pages.missing` is 0, or the population is [`Population::Complete`]. It closes the userfaultfds, and from then on the kernel gives
    /// ZEROS for pages that were never loaded. Dropping the pager is the same as stopping it.
    pub fn stop(mut self) -> Stats {
        self.end();
        self.shared.stats()
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    fn end(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // First: demand threads that stand back might be kept from ending.
        self.shared.watch.stop(&self.shared.slices);
        drop(self.stop.take());
        self.workers.iter().for_each(|worker| worker.thread().unpark());
        self.shared.population.stop();
        for thread in self.threads.drain(..).chain(self.workers.drain(..)) {
            // Its panics are caught and reported inside.
            let _ = thread.join();
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.end();
    }
}
