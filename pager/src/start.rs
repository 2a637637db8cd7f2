//! Starts a pager: checks the options, opens the userfaultfds, and starts the threads.

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::background::loading::LoadingPages;
use crate::background::page_list::{PageList, Ready};
use crate::background::populate::demand::{self, WaitBucket};
use crate::background::populate::population::Populate;
use crate::background::populate::progress::{Options, Progress};
use crate::background::populate::start;
use crate::background::prefetch::Prefetcher;
use crate::background::prefetch_progress::{Prefetch, PrefetchProgress};
use crate::builder::PagerBuilder;
use crate::error::StartError;
use crate::failure::{FailurePolicy, FailureReport};
use crate::fault::handler::Handler;
use crate::fault::inbox::Inbox;
use crate::fault::resolver::Resolver;
use crate::fault::slice::Slice;
use crate::install::kernel::Filler;
use crate::install::page_state::PageStates;
use crate::install::records::{self, Records};
use crate::install::register;
use crate::layout::Layout;
use crate::pager::Pager;
use crate::pager_state::PagerState;
use crate::region::{PAGE_BYTES, Region};
use crate::sched::cpus::{self, Cpus};
use crate::sched::placement::{Follower, Placement};
use crate::sched::run_delay::RunDelay;
use crate::sched::watchdog::Watchdog;
use crate::source::load::PageReader;
use crate::source::page_source::PageSource;
use crate::source::retry::RetryPolicy;
use crate::threads;
use crate::uffd::{Features, ForeignUffd, Uffd};
use crate::window::slot::WindowSlot;

/// Pages that are given back, and memory that `mremap` moves. Without the second event, moved memory would read as
/// zeros.
const EVENTS: Features = Features::EVENT_REMOVE.with(Features::EVENT_REMAP);

impl PagerBuilder {
    /// Registers the memory and starts the threads. The cost does not depend on the size of the memory.
    ///
    /// # Errors
    /// [`StartError`]. Then nothing is registered, and missing pages read as zero: do not run a guest on the memory.
    pub fn start(self) -> Result<Pager, StartError> {
        let PagerBuilder { source, regions, slices, placement, retry, on_error, .. } = self;
        let PagerBuilder { on_failure, foreign, backed, records, fault_around_off, .. } = self;
        let PagerBuilder { populate_rate, populate_threads, on_complete, prefetch, .. } = self;
        let PagerBuilder { prefetch_when, elsewhere, fault_overhead, populate, .. } = self;
        let PagerBuilder { userfaultfd, .. } = self;
        let populate = mode(populate, backed, prefetch.is_some())?;
        check(&regions, source.len_bytes())?;
        if regions.iter().any(|region| region.is_foreign() != foreign.is_some()) {
            return Err(StartError::Foreign);
        }
        // A given userfaultfd is the only one, and each slice has its own.
        let given = foreign.is_some() || userfaultfd.is_some();
        let layout = Layout::cut(&regions, if given { 1 } else { slices });
        let (stop_reader, stop) = io::pipe().map_err(system("a pipe"))?;
        let pages = layout.pages() as usize;
        let (states, journal, resumed) = match records {
            Some(Records { states, journal, resumed }) => (states, Some(journal), resumed),
            None => {
                let states = PageStates::all_missing(pages);
                (states.map_err(system("memory for the page states"))?, None, false)
            }
        };
        if states.pages() != pages {
            return Err(StartError::Records { pages, found: states.pages() });
        }
        let (foreign, process) = foreign.unzip();
        let opening = Opening { on_error, placement, fault_around_off, regions: regions.len() };
        let (readers, slices) = opening.slices(&layout, source.as_ref(), foreign, userfaultfd)?;
        let options = Options {
            mode: populate,
            bytes_per_second: populate_rate,
            loaders: populate_threads,
            on_complete,
            overhead: fault_overhead,
            source: Arc::clone(&source),
            retry,
            cpus: Cpus::of_this_thread().ok(),
            elsewhere,
        };
        let loading = LoadingPages::none(pages).map_err(system("memory for marks of pages"))?;
        let shared = Arc::new(PagerState {
            loading,
            population: Progress::new(options, layout.slices()),
            prefetch: PrefetchProgress::new(prefetch.is_some()),
            slices,
            layout,
            states,
            failures: FailureReport::new(on_error, process, on_failure),
            stopping: AtomicBool::new(false),
            backed,
            watchdog: Watchdog::default(),
            window: WindowSlot::default(),
            was_reset: Mutex::default(),
            _regions: regions,
        });
        let unserved = match &journal {
            Some(journal) if resumed => records::resume(&shared, journal)
                .map_err(|errno| system("the threads that wait")(errno.into()))?,
            _ => None,
        };
        // From here on, dropping `pager` ends the threads that were started.
        let mut pager =
            Pager { shared, threads: Vec::new(), workers: Vec::new(), stop: Some(stop) };
        let stop = Arc::new(stop_reader);
        let demand = DemandOptions { placement, retry, fault_overhead, stop };
        // Only memory of another process, with its single slice, has records.
        let inboxes = std::iter::once(Inbox::new(journal, unserved));
        let inboxes = inboxes.chain(std::iter::repeat_with(|| Inbox::new(None, None)));
        for (slice, (reader, inbox)) in readers.into_iter().zip(inboxes).enumerate() {
            start_demand_thread(&mut pager, slice, reader, inbox, &demand)?;
        }
        if let Some(list) = prefetch {
            start_prefetch(&mut pager, source, list, prefetch_when);
        }
        let begins = match populate {
            Populate::Full | Populate::Idle => true,
            // A single fault begins the loading: the time until the first one is used, too.
            Populate::Auto => {
                fault_overhead >= demand::BEGIN && pager.shared.population.has_loaders()
            }
            Populate::Off => false,
        };
        match begins.then(|| start::loaders(&pager.shared)) {
            // Without threads for that, only faults load pages.
            Some(Err(error)) if populate != Populate::Auto => {
                return Err(system("a thread")(error));
            }
            _ => {}
        }
        Ok(pager)
    }
}

/// How slices are opened.
struct Opening {
    on_error: FailurePolicy,
    placement: Placement,
    fault_around_off: bool,
    /// The number of regions.
    regions: usize,
}

impl Opening {
    /// Opens and registers the userfaultfd of each slice, unless it is `foreign`, and makes a reader for it.
    #[allow(clippy::type_complexity)]
    fn slices(
        &self,
        layout: &Layout,
        source: &dyn PageSource,
        foreign: Option<ForeignUffd>,
        mut own: Option<Uffd>,
    ) -> Result<(Vec<Box<dyn PageReader>>, Vec<Slice>), StartError> {
        let page_bytes = layout.page_bytes() as usize;
        let zeros = || vec![0; page_bytes].into_boxed_slice();
        let mut optional = Features::NONE;
        if self.on_error == FailurePolicy::Poison {
            optional = optional.with(Features::POISON);
        }
        if self.placement == Placement::Follow {
            optional = optional.with(Features::THREAD_ID);
        }
        let mut readers = Vec::with_capacity(layout.slices());
        let mut slices = Vec::with_capacity(layout.slices());
        if let Some(uffd) = foreign {
            readers.push(source.reader(page_bytes).map_err(StartError::Source)?);
            // Only hugetlbfs has other page sizes, and it has no zero page.
            let zeros = (page_bytes > PAGE_BYTES).then(zeros);
            let filler = Filler { uffd: uffd.into_uffd(), zeros };
            slices.push(Slice::new(filler, layout.pages(), self.regions));
        }
        for index in slices.len()..layout.slices() {
            readers.push(source.reader(page_bytes).map_err(StartError::Source)?);
            let uffd = match own.take() {
                Some(uffd) => uffd.with_required(EVENTS),
                None => Uffd::open(EVENTS, optional),
            };
            let uffd = uffd.map_err(StartError::Open)?;
            let poisons = uffd.features().contains(Features::POISON);
            if self.on_error == FailurePolicy::Poison && !poisons {
                return Err(StartError::PoisonUnavailable);
            }
            let extents = layout.extents_of(index);
            let zeropage = register::all(&uffd, extents, self.fault_around_off)?;
            let zeros = (!zeropage).then(zeros);
            let bytes = extents.iter().map(|extent| extent.host.end - extent.host.start);
            let pages = bytes.sum::<u64>() / page_bytes as u64;
            slices.push(Slice::new(Filler { uffd, zeros }, pages, self.regions));
        }
        Ok((readers, slices))
    }
}

/// The options that all demand threads share.
struct DemandOptions {
    placement: Placement,
    retry: RetryPolicy,
    fault_overhead: Duration,
    stop: Arc<io::PipeReader>,
}

fn start_demand_thread(
    pager: &mut Pager,
    slice: usize,
    reader: Box<dyn PageReader>,
    inbox: Inbox,
    options: &DemandOptions,
) -> Result<(), StartError> {
    let handler = Handler {
        shared: Arc::clone(&pager.shared),
        slice,
        reader,
        retry: options.retry,
        stop: Arc::clone(&options.stop),
        follower: Follower::new(options.placement),
        last_now: Instant::now(),
        wait_bucket: WaitBucket::none(options.fault_overhead),
        run_delay: RunDelay::default(),
        delay: Duration::ZERO,
        inbox,
        resolver: Resolver::new(slice),
    };
    let thread = threads::spawn(format!("pager{slice}"), move || handler.run())
        .map_err(system("a thread"))?;
    pager.threads.push(thread);
    Ok(())
}

/// The prefetch is a hint: if its thread cannot be started, only faults load pages.
fn start_prefetch(
    pager: &mut Pager,
    source: Arc<dyn PageSource>,
    list: PageList,
    ready: Option<Ready>,
) {
    let shared = Arc::clone(&pager.shared);
    let prefetcher = Prefetcher { shared, source, list, ready, started_on: cpus::this_cpu() };
    match threads::spawn("prefetch", move || prefetcher.run()) {
        Ok(thread) => pager.workers.push(thread),
        Err(_) => pager.shared.prefetch.ended(Prefetch::GivenUp),
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> StartError {
    move |error| StartError::System { what, error }
}

/// The mode of the population. Memory that is a mapping of a file is populated by its source, not by the pager.
fn mode(populate: Populate, backed: bool, prefetches: bool) -> Result<Populate, StartError> {
    match populate {
        Populate::Auto if backed => Ok(Populate::Off),
        populate if backed && (populate != Populate::Off || prefetches) => {
            Err(StartError::PopulateBacked)
        }
        populate => Ok(populate),
    }
}

/// Checks that the regions fit together and into the source.
fn check(regions: &[Region], source_bytes: u64) -> Result<(), StartError> {
    let page_bytes = regions.first().ok_or(StartError::NoRegion)?.page_bytes();
    for region in regions {
        if region.page_bytes() != page_bytes {
            return Err(StartError::PageSizes { one: page_bytes, other: region.page_bytes() });
        }
        // This sum does not overflow: see `Region::new`.
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
    overlap("the source", Region::source_offset)
}
