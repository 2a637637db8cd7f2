//! The start of a pager: checks, userfaultfds, and the threads.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Instant;

use crate::answer::Desk;
use crate::builder::PagerBuilder;
use crate::deference::Watch;
use crate::error::StartError;
use crate::failure::{FailurePolicy, FailureReport};
use crate::handler::Handler;
use crate::inbox::Inbox;
use crate::install::Filler;
use crate::layout::Layout;
use crate::loading::LoadingPages;
use crate::page_state::PageStates;
use crate::pager::Pager;
use crate::placement::{self, Cpus, Follower, Placement};
use crate::populate::{self, Populate, Progress, Waiting};
use crate::prefetch::{Prefetch, PrefetchProgress, Prefetcher};
use crate::records::{self, Records};
use crate::region::Region;
use crate::register;
use crate::slice::{Shared, Slice};
use crate::uffd::{Features, Uffd};

/// Pages given back, and memory moved by `mremap`: without the second event what moved would read as zeros.
const EVENTS: Features = Features::EVENT_REMOVE.with(Features::EVENT_REMAP);

impl PagerBuilder {
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
            elsewhere,
            fault_overhead,
            ..
        } = self;
        // What fills the file knows what is in it. By default that is no error, but a matter of course.
        let populate = match populate {
            Populate::Auto if backed => Populate::Off,
            populate if backed && (populate != Populate::Off || prefetch.is_some()) => {
                return Err(StartError::PopulateBacked);
            }
            populate => populate,
        };
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
        let options = populate::Options {
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
        let shared = Arc::new(Shared {
            loading,
            population: Progress::new(options, layout.slices()),
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
                waiting: Waiting::none(fault_overhead),
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
        if matches!(populate, Populate::Full | Populate::Idle) {
            Progress::begin(&pager.shared).map_err(system("a thread"))?;
        }
        Ok(pager)
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
