//! Starting and stopping.

use std::fmt;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::answer::Desk;
use crate::deference::Watch;
use crate::error::StartError;
use crate::failure::{Failure, FailurePolicy, FailureReport, OnFailure};
use crate::handler::{Handler, RetryPolicy};
use crate::inbox::Inbox;
use crate::install::Filler;
use crate::layout::Layout;
use crate::page_state::{PageState, PageStates};
use crate::placement::{self, Follower, Placement};
use crate::populate::{OnComplete, Populate, Population, Progress, Worker};
use crate::prefetch::{PageList, Prefetch, PrefetchProgress, Prefetcher, Ready};
use crate::recording::Recording;
use crate::records::{self, Records};
use crate::region::Region;
use crate::register;
use crate::slice::{Shared, Slice};
use crate::source::PageSource;
use crate::stats::{RegionStats, Stats};
use crate::uffd::{Features, ForeignUffd, Uffd};

/// Pages given back, and memory moved by `mremap`: without the second event what moved would read as zeros.
const EVENTS: Features = Features::EVENT_REMOVE.with(Features::EVENT_REMAP);

/// A running fault service. See the crate's documentation for an example.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Those of the population; they sleep in `park`.
    workers: Vec<JoinHandle<()>>,
    /// Dropped to stop the threads: they poll the other end.
    stop: Option<io::PipeWriter>,
}

/// How a pager is to be: see [`Pager::builder`].
#[must_use]
pub struct PagerBuilder {
    source: Arc<dyn PageSource>,
    regions: Vec<Region>,
    slices: usize,
    placement: Placement,
    retry: RetryPolicy,
    on_error: FailurePolicy,
    on_failure: Option<OnFailure>,
    foreign: Option<(ForeignUffd, OwnedFd)>,
    backed: bool,
    records: Option<Records>,
    populate: Populate,
    populate_rate: Option<NonZeroU64>,
    populate_threads: usize,
    on_complete: Option<OnComplete>,
    prefetch: Option<PageList>,
    prefetch_when: Option<Ready>,
    one_by_one: bool,
}

impl Pager {
    /// A pager that takes pages from `source`, to be given regions and started.
    pub fn builder(source: Arc<dyn PageSource>) -> PagerBuilder {
        PagerBuilder {
            source,
            regions: Vec::new(),
            slices: 1,
            placement: Placement::default(),
            retry: RetryPolicy::default(),
            on_error: FailurePolicy::default(),
            on_failure: None,
            foreign: None,
            backed: false,
            records: None,
            populate: Populate::Off,
            populate_rate: None,
            populate_threads: 1,
            on_complete: None,
            prefetch: None,
            prefetch_when: None,
            one_by_one: false,
        }
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

impl PagerBuilder {
    /// Adds a region. All regions have the same page size, and overlap neither in memory nor in the source.
    pub fn region(mut self, region: Region) -> PagerBuilder {
        self.regions.push(region);
        self
    }

    /// Adds regions: see [`PagerBuilder::region`].
    pub fn regions(mut self, regions: impl IntoIterator<Item = Region>) -> PagerBuilder {
        self.regions.extend(regions);
        self
    }

    /// Cuts the memory into this many slices (1 unless told), each with a userfaultfd and a demand thread
    /// of its own. One per vCPU is a good number. Slices are at least 2 MiB, so there may be fewer.
    pub fn slices(mut self, slices: usize) -> PagerBuilder {
        self.slices = slices.max(1);
        self
    }

    /// Where the demand threads run; [`Placement::Follow`] unless told.
    pub fn placement(mut self, placement: Placement) -> PagerBuilder {
        self.placement = placement;
        self
    }

    /// How loads that fail for a passing reason are tried again.
    pub fn retry(mut self, retry: RetryPolicy) -> PagerBuilder {
        self.retry = retry;
        self
    }

    /// What is done with a page that cannot be had; [`FailurePolicy::Poison`] unless told.
    pub fn on_error(mut self, policy: FailurePolicy) -> PagerBuilder {
        self.on_error = policy;
        self
    }

    /// Called with the first failure, once, on the thread that has it and before the page is poisoned.
    /// It should note the failure and ask the guest to stop; it must not wait for that: the guest may
    /// be waiting for this very page.
    pub fn on_failure(
        mut self,
        callback: impl Fn(&Failure) + Send + Sync + 'static,
    ) -> PagerBuilder {
        self.on_failure = Some(Box::new(callback));
        self
    }

    /// Whether pages that nobody has touched are loaded in the background; [`Populate::Off`] unless told.
    pub fn populate(mut self, populate: Populate) -> PagerBuilder {
        self.populate = populate;
        self
    }

    /// Bytes of memory that the population fills a second at most; no limit unless told.
    pub fn populate_rate(mut self, bytes_per_second: Option<NonZeroU64>) -> PagerBuilder {
        self.populate_rate = bytes_per_second;
        self
    }

    /// How many threads populate, each with a load of its own under way; 1 unless told.
    pub fn populate_threads(mut self, threads: usize) -> PagerBuilder {
        self.populate_threads = threads.max(1);
        self
    }

    /// Installs these pages (ranges of source offsets, in the order in which they will probably be needed) as soon as the
    /// pager runs, on a thread of its own, which calls `list` for them. Faults are answered before; population comes after.
    ///
    /// The list is a hint: pages that are not missing, or in no region, are passed over, and one that cannot be had is
    /// left to whoever touches it. It leads to at most 16 times its bytes, and 64 MiB, being decoded.
    pub fn prefetch(
        mut self,
        list: impl FnOnce() -> Vec<Range<u64>> + Send + 'static,
    ) -> PagerBuilder {
        self.prefetch = Some(Box::new(list));
        self
    }

    /// Called on the thread that prefetches when its first pages are loaded, before any of them is installed: it may wait
    /// until that disturbs nobody. It must not wait for ever: stopping the pager waits for it.
    pub fn prefetch_when(mut self, ready: impl FnOnce() + Send + 'static) -> PagerBuilder {
        self.prefetch_when = Some(Box::new(ready));
        self
    }

    /// Called once, when the population has ended ([`Population::Complete`] or [`Population::Incomplete`]), on
    /// its last thread. Not when the pager is stopped before.
    pub fn on_complete(
        mut self,
        callback: impl Fn(Population) + Send + Sync + 'static,
    ) -> PagerBuilder {
        self.on_complete = Some(Box::new(callback));
        self
    }

    /// Serves the memory of another process, which has registered it with `uffd` and is known by a pidfd. All
    /// regions are made by [`Region::foreign`]. There is one slice; the threads go on after that process has
    /// ended, until the pager is stopped.
    ///
    /// What leaves faults unanswered, and with [`FailurePolicy::Kill`] every failure, ends that process by SIGKILL.
    /// Poisoning needs no feature here: a process whose page cannot be poisoned is ended, too.
    pub fn foreign(mut self, uffd: ForeignUffd, process: OwnedFd) -> PagerBuilder {
        self.foreign = Some((uffd, process));
        self
    }

    /// The memory is a private mapping of a file into which the source puts the pages: it answers
    /// [`Load::InFile`](crate::Load::InFile).
    ///
    /// Giving pages back by `madvise` is a failure then: the file's content would come back. Map anonymous memory
    /// over them.
    pub fn backed(mut self) -> PagerBuilder {
        self.backed = true;
        self
    }

    /// Of a foreign process' memory: keeps account of the pages there, or goes on with what is found there.
    #[cfg(feature = "serve")]
    pub(crate) fn recorded(mut self, records: Records) -> PagerBuilder {
        self.records = Some(records);
        self
    }

    /// Registers the memory and starts the threads. The cost does not depend on the size of the memory.
    ///
    /// # Errors
    /// [`StartError`]; then nothing is registered, and missing pages read as zero: don't run a guest on it.
    pub fn start(self) -> Result<Pager, StartError> {
        let PagerBuilder { source, regions, slices, placement, retry, on_error, .. } = self;
        let PagerBuilder { on_failure, foreign, backed, records, one_by_one, .. } = self;
        let PagerBuilder {
            populate,
            populate_rate,
            populate_threads,
            on_complete,
            prefetch,
            prefetch_when,
            ..
        } = self;
        if backed && (populate != Populate::Off || prefetch.is_some()) {
            return Err(StartError::PopulateBacked);
        }
        let page_bytes = check(&regions, source.len_bytes())?;
        if regions.iter().any(|region| region.is_foreign() != foreign.is_some()) {
            return Err(StartError::Foreign);
        }
        // One userfaultfd, one slice.
        let layout = Layout::cut(&regions, if foreign.is_some() { 1 } else { slices });
        let system = |what| move |error| StartError::System { what, error };
        let (stop_reader, stop) = io::pipe().map_err(system("a pipe"))?;
        let stop_reader = Arc::new(stop_reader);
        let pages = layout.pages() as usize;
        let (states, mut journal, resumed) = match records {
            Some(Records { states, journal, resumed }) => (states, Some(journal), resumed),
            None => {
                let states = PageStates::all_missing(pages);
                (states.map_err(system("memory for the page states"))?, None, false)
            }
        };
        if states.pages() != pages {
            return Err(StartError::Records { pages, found: states.pages() });
        }

        let mut optional = Features::NONE;
        if on_error == FailurePolicy::Poison {
            optional = optional.with(Features::POISON);
        }
        if placement == Placement::Follow {
            optional = optional.with(Features::THREAD_ID);
        }
        let mut readers = Vec::with_capacity(layout.slices());
        let mut parts = Vec::with_capacity(layout.slices());
        let (foreign, process) = foreign.unzip();
        if let Some(uffd) = foreign {
            readers.push(source.reader(page_bytes).map_err(StartError::Source)?);
            // Only hugetlbfs has other pages, and no zero page.
            let zeros = (page_bytes > 4096).then(|| vec![0; page_bytes].into_boxed_slice());
            let filler = Filler { uffd: uffd.into_uffd(), zeros };
            parts.push(Slice::new(filler, layout.pages(), regions.len()));
        }
        for index in parts.len()..layout.slices() {
            readers.push(source.reader(page_bytes).map_err(StartError::Source)?);
            let uffd = Uffd::open(EVENTS, optional).map_err(StartError::Open)?;
            if on_error == FailurePolicy::Poison && !uffd.features().contains(Features::POISON) {
                return Err(StartError::PoisonUnavailable);
            }
            let zeropage = register::all(&uffd, layout.extents_of(index), one_by_one)?;
            let zeros = (!zeropage).then(|| vec![0; page_bytes].into_boxed_slice());
            let pages =
                layout.extents_of(index).iter().map(|extent| extent.host.end - extent.host.start);
            let pages = pages.sum::<u64>() / page_bytes as u64;
            parts.push(Slice::new(Filler { uffd, zeros }, pages, regions.len()));
        }
        let mut populating = Vec::new();
        if populate != Populate::Off {
            for _ in 0..populate_threads {
                populating.push(source.reader(page_bytes).map_err(StartError::Source)?);
            }
        }
        let by_source = layout
            .by_source()
            .map(|(first, source)| (first, (source.end - source.start) / page_bytes as u64));
        let population = Progress::new(
            populate,
            populate_rate,
            populating.len(),
            on_complete,
            by_source,
            page_bytes as u64,
        );
        let shared = Arc::new(Shared {
            background: populate != Populate::Off || prefetch.is_some(),
            population,
            prefetch: PrefetchProgress::new(prefetch.is_some()),
            slices: parts,
            layout,
            states,
            failures: FailureReport::new(on_error, process, on_failure),
            stopping: AtomicBool::new(false),
            backed,
            watch: Watch::default(),
            _regions: regions,
        });

        let unserved = match &journal {
            Some(journal) if resumed => records::resume(&shared, journal).map_err(|errno| {
                StartError::System { what: "the threads that wait", error: errno.into() }
            })?,
            _ => None,
        };

        // From here on, dropping `pager` ends the threads that were started.
        let mut pager =
            Pager { shared, threads: Vec::new(), workers: Vec::new(), stop: Some(stop) };
        for (slice, reader) in readers.into_iter().enumerate() {
            // Only foreign memory has records, and one slice.
            let mut inbox = Inbox::new(journal.take());
            inbox.unserved = unserved;
            let handler = Handler {
                shared: Arc::clone(&pager.shared),
                slice,
                reader,
                retry,
                stop: Arc::clone(&stop_reader),
                follower: Follower::new(placement),
                looked: Instant::now(),
                inbox,
                desk: Desk::new(slice),
            };
            let thread = thread::Builder::new()
                .name(format!("pager{slice}"))
                .spawn(move || handler.run())
                .map_err(system("a thread"))?;
            pager.threads.push(thread);
        }
        if let Some(list) = prefetch {
            let prefetcher = Prefetcher {
                shared: Arc::clone(&pager.shared),
                source,
                list,
                ready: prefetch_when,
                started_on: placement::this_cpu(),
            };
            // A hint: a guest whose pages come when it asks for them is better than none.
            match thread::Builder::new().name("prefetch".into()).spawn(move || prefetcher.run()) {
                Ok(thread) => pager.workers.push(thread),
                Err(_) => pager.shared.prefetch.ended(Prefetch::GivenUp),
            }
        }
        for (index, reader) in populating.into_iter().enumerate() {
            let worker = Worker::new(Arc::clone(&pager.shared), reader, retry);
            let thread = thread::Builder::new()
                .name(format!("populate{index}"))
                .spawn(move || worker.run())
                .map_err(system("a thread"))?;
            pager.workers.push(thread);
        }
        Ok(pager)
    }
}

impl fmt::Debug for PagerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagerBuilder")
            .field("regions", &self.regions)
            .field("slices", &self.slices)
            .field("placement", &self.placement)
            .field("retry", &self.retry)
            .field("on_error", &self.on_error)
            .finish_non_exhaustive()
    }
}

/// Whether the regions fit together and into the source. Answers their page size.
fn check(regions: &[Region], source_bytes: u64) -> Result<usize, StartError> {
    let page_bytes = regions.first().ok_or(StartError::NoRegion)?.page_bytes();
    for region in regions {
        if region.page_bytes() != page_bytes {
            return Err(StartError::PageSizes { one: page_bytes, other: region.page_bytes() });
        }
        // Sums of a region don't overflow: see `Region::new`.
        let end = region.source_offset() + region.len_bytes();
        if end > source_bytes {
            return Err(StartError::BeyondSource { end, source_bytes });
        }
    }
    let overlap = |space: &'static str, start: fn(&Region) -> u64| {
        let mut starts: Vec<(u64, u64)> =
            regions.iter().map(|region| (start(region), region.len_bytes())).collect();
        starts.sort_unstable();
        match starts.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
            Some(pair) => Err(StartError::Overlap { space, at: pair[1].0 }),
            None => Ok(()),
        }
    };
    overlap("memory", Region::host_addr)?;
    overlap("the source", Region::source_offset)?;
    Ok(page_bytes)
}
