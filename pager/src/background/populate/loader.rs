//! The background thread of the population.

use std::iter;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::demand::QuietDetector;
use super::pace::Pace;
use super::plan::{Part, Plan};
use super::population::{Populate, Population};
use super::progress::lock;
use crate::background::claim::Claim;
use crate::background::ended::{Ended, pause, stopped};
use crate::background::prefetch_progress::Prefetch;
use crate::fault::resolver::{ResolveError, Resolver};
use crate::install::page_state::PageState;
use crate::install::reason::InstallReason;
use crate::layout::Place;
use crate::pager_state::PagerState;
use crate::sched::avoid_demand_cpus::AvoidDemandCpus;
use crate::sched::give_way::never_give_way;
use crate::sched::priority::make_normal;
use crate::sched::task;
use crate::source::error::SourceErrorKind;
use crate::source::load::{Load, LoadedPages, PageReader};
use crate::source::panicked::Panicked;
use crate::source::sequence::{PageSequence, Wanted};

/// During a prefetch, the time between two checks whether the pager was stopped.
const AFTER_PREFETCH: Duration = Duration::from_millis(5);
/// The time between two checks of a spare loader whether faults wait for a disk.
const SPARE_CHECK: Duration = Duration::from_millis(1);
/// The time between two checks of a page that a demand thread is loading.
const CLAIMED_PAUSE: Duration = Duration::from_micros(50);
/// The pause between two attempts while the memory map is changing.
const MAP_PAUSE: Duration = Duration::from_micros(50);
/// If the guest has caught up with a loader, this many pages are left to its faults, so that the loader is ahead again.
/// They are loaded at the end.
const LEAD_PAGES: usize = 64;

pub(super) struct Loader {
    shared: Arc<PagerState>,
    /// The reader for single pages, created when it is needed.
    reader: Option<Box<dyn PageReader>>,
    resolver: Resolver,
    pace: Pace,
    quiet: QuietDetector,
    avoid: AvoidDemandCpus,
    /// This loader works only while faults wait for a disk, also on the CPUs of the faulting threads, which are idle then.
    is_spare: bool,
}

type Sequence = Box<dyn PageSequence>;

/// All pages before this one need no load.
type NextPage = u64;

impl Loader {
    pub(super) fn new(shared: Arc<PagerState>, is_spare: bool) -> Loader {
        let pace = Pace::of(shared.population.options.mode);
        let quiet = QuietDetector::new(&shared.population.demand);
        let (resolver, avoid) = (Resolver::new(usize::MAX), AvoidDemandCpus::default());
        Loader { shared, reader: None, resolver, pace, quiet, avoid, is_spare }
    }

    /// The body of the thread.
    pub(super) fn run(mut self) {
        // The thread has inherited its policy and its CPUs from the demand thread that created it.
        make_normal(0);
        if let Some(cpus) = &self.shared.population.options.cpus {
            // A failure costs only speed.
            let _ = cpus.bind();
        }
        self.take_the_rest();
        if self.is_spare {
            // Any other thread preempts it. A demand thread may have this policy, too: see `before_load`. A failure costs
            // only speed.
            let _ = task::set_policy(0, libc::SCHED_IDLE);
        } else {
            self.avoid.begin();
        }
        self.quiet.begin();
        if let Ok(()) = self.load_all() {
            self.finish();
        }
    }

    /// On a single CPU, a spare loader becomes a usual one when most of the data were needed.
    fn take_the_rest(&mut self) {
        if self.is_spare && self.shared.population.is_rest(|| self.shared.data_bytes()) {
            self.is_spare = false;
            // Without the right to this, it loads only while faults wait for a disk.
            make_normal(0);
            // Each yield would give a whole turn to the threads that it loads for.
            never_give_way();
        }
    }

    fn load_all(&mut self) -> Result<(), Ended> {
        let shared = Arc::clone(&self.shared);
        // The prefetch goes first.
        while shared.prefetch.wait(AFTER_PREFETCH) == Prefetch::Running {
            stopped(&shared)?;
        }
        let plan = shared.population.plan.get_or_init(|| Plan::new(&shared.layout));
        let mut ahead = None;
        loop {
            self.sleep_without_disk(plan)?;
            // Parts with skipped pages come again after the last part.
            let next = ahead.take().or_else(|| self.prepared(plan, None));
            let Some((part, mut sequence)) = next else { break };
            // The storage reads the next part while this one is decoded. A spare loader has no part while it sleeps.
            ahead = if self.is_spare { None } else { self.prepared(plan, Some(part.number)) };
            let skipped = match &mut sequence {
                // If the source panics, the part is loaded page by page.
                Some(sequence) => {
                    let sequence = || self.in_sequence(&part, sequence.as_mut());
                    panic::catch_unwind(AssertUnwindSafe(sequence)).unwrap_or(Ok(false))?
                }
                None => false,
            };
            if skipped {
                plan.leave(part);
            } else {
                self.rest(&part)?;
                plan.done(&part);
            }
        }
        Ok(())
    }

    /// The next part, and a sequence of its missing pages in the order of the source.
    fn prepared(&self, plan: &Plan, last: Option<usize>) -> Option<(Part, Option<Sequence>)> {
        let shared = &self.shared;
        let part = plan.next(last, &shared.population.demand.recent)?;
        if !part.pages.clone().any(|page| shared.states.of(page) == PageState::Missing) {
            return Some((part, None));
        }
        let source = &shared.population.options.source;
        let sequence = || {
            let page_bytes = shared.layout.page_bytes() as usize;
            let mut sequence = source.sequence(page_bytes, vec![part.source.clone()]).ok()?;
            sequence.continues();
            sequence.prepare(&Claim::new(shared));
            Some(sequence)
        };
        let sequence = panic::catch_unwind(AssertUnwindSafe(sequence)).ok().flatten();
        Some((part, sequence))
    }

    /// A spare loader sleeps while faults do not wait for a disk, until all parts are taken.
    fn sleep_without_disk(&mut self, plan: &Plan) -> Result<(), Ended> {
        let shared = Arc::clone(&self.shared);
        while self.is_spare && !plan.is_taken() && !shared.population.demand.waits_for_disk() {
            self.sleep_while_quiet()?;
            thread::park_timeout(SPARE_CHECK);
            self.take_the_rest();
        }
        stopped(&shared)
    }

    /// Called before each load.
    fn before_load(&mut self) -> Result<(), Ended> {
        self.sleep_while_quiet()?;
        self.pace.before_load(&self.shared)?;
        self.take_the_rest();
        if self.is_spare {
            // A demand thread of the same policy may have to run on this CPU. Without `give_way`, which rests from yields where
            // CPUs are busy: there a spare loader has nothing to use.
            thread::yield_now();
        }
        self.avoid.step(&self.shared);
        Ok(())
    }

    /// In `Auto`, sleeps while threads do not wait for pages. The end of the loading ends a spare loader's sleep.
    fn sleep_while_quiet(&mut self) -> Result<(), Ended> {
        let progress = &self.shared.population;
        if progress.options.mode != Populate::Auto
            // Beside other loaders, a spare one does not decide that: it sleeps while they wait for a CPU.
            || (progress.is_active()
                && (self.is_spare && progress.loaders > 0
                    || self.quiet.is_waiting(&progress.demand)))
        {
            return stopped(&self.shared);
        }
        {
            let mut state = progress.lock();
            if state.population == Population::Running {
                state.population = Population::Quiet;
            }
            progress.active.store(false, Ordering::Relaxed);
        }
        let is_over = || self.is_spare && progress.plan.get().is_some_and(Plan::is_taken);
        while !progress.is_active() && !is_over() {
            stopped(&self.shared)?;
            thread::park();
        }
        self.quiet.restart(&progress.demand);
        stopped(&self.shared)
    }

    /// Loads the missing pages of a part in the order of the source. Returns whether pages were skipped.
    fn in_sequence(&mut self, part: &Part, sequence: &mut dyn PageSequence) -> Result<bool, Ended> {
        let shared = Arc::clone(&self.shared);
        let page_bytes = shared.layout.page_bytes();
        let claim = Claim::new(&shared);
        let mut skipped = false;
        loop {
            self.before_load()?;
            shared.population.caught_up.store(false, Ordering::Relaxed);
            match sequence.next(&claim) {
                None => break,
                // Zeros are left to the kernel, or to a fault. Pages that failed are tried page by page later.
                Some(Ok(Load::Zero { .. } | Load::InFile { .. }) | Err(_)) => {}
                Some(Ok(Load::Pages(loaded))) => {
                    let bytes = loaded.pages.len() as u64 * page_bytes;
                    let _ = self.install(None, loaded)?;
                    self.pace.loaded(&shared, bytes)?;
                }
            }
            let conflict = claim.end() | shared.population.caught_up.load(Ordering::Relaxed);
            if conflict && !part.again {
                sequence.skip(LEAD_PAGES);
                skipped = true;
            }
        }
        Ok(skipped)
    }

    /// Loads the pages of a part that are still missing, page by page.
    fn rest(&mut self, part: &Part) -> Result<(), Ended> {
        let mut page = part.pages.start;
        while page < part.pages.end {
            if self.shared.states.of(page) != PageState::Missing {
                page += 1;
                continue;
            }
            page = match panic::catch_unwind(AssertUnwindSafe(|| self.load_page(page))) {
                Ok(next) => next?,
                Err(_) => {
                    // The reader may be in any state after its panic: even its destructor must not run.
                    std::mem::forget(self.reader.replace(Box::new(Panicked)));
                    self.give_up(page)
                }
            };
        }
        Ok(())
    }

    /// Loads until the page is not missing any more, or known to be zero, or given up.
    fn load_page(&mut self, page: u64) -> Result<NextPage, Ended> {
        let shared = Arc::clone(&self.shared);
        let page_bytes = shared.layout.page_bytes();
        // Always found: parts consist of pages of the layout.
        let Some(place) = shared.layout.at_page(page) else { return Ok(page + 1) };
        let mut reader = match self.reader.take() {
            Some(reader) => reader,
            None => match shared.population.options.source.reader(page_bytes as usize) {
                Ok(reader) => reader,
                Err(_) => return Ok(self.give_up(page)),
            },
        };
        let next = self.load_with(reader.as_mut(), page, place);
        self.reader = Some(reader);
        next
    }

    fn load_with(
        &mut self,
        reader: &mut dyn PageReader,
        page: u64,
        place: Place,
    ) -> Result<NextPage, Ended> {
        let shared = Arc::clone(&self.shared);
        let page_bytes = shared.layout.page_bytes();
        let offset = shared.layout.source_offset(place);
        let retry = shared.population.options.retry;
        let (mut failed_loads, mut tries) = (0, 0);
        let claim = Claim::new(&shared);
        while shared.states.of(page) == PageState::Missing {
            self.before_load()?;
            if !self.claims(&claim, page, offset)? {
                break;
            }
            match reader.load(offset) {
                Ok(Load::Zero { range }) => {
                    // Left to the kernel, or to a fault.
                    let pages = range.end.saturating_sub(offset) / page_bytes;
                    let extent = shared.layout.extent(place.extent);
                    return Ok(page + pages.clamp(1, extent.end_page(page_bytes) - page));
                }
                Ok(Load::Pages(loaded)) => {
                    let bytes = loaded.pages.len() as u64 * page_bytes;
                    if self.install(Some(place), loaded)?.is_err() {
                        return Ok(self.give_up(page));
                    }
                    claim.end();
                    self.pace.loaded(&shared, bytes)?;
                    tries += 1;
                    if tries > 1 {
                        // The memory map is changing. The demand thread of the slice reads the events.
                        pause(&shared, MAP_PAUSE)?;
                    }
                }
                Err(error)
                    if error.kind() == SourceErrorKind::Transient
                        && failed_loads < retry.retries =>
                {
                    claim.end();
                    pause(&shared, retry.pause(failed_loads))?;
                    failed_loads += 1;
                }
                Ok(Load::InFile { .. }) | Err(_) => return Ok(self.give_up(page)),
            }
        }
        Ok(page + 1)
    }

    /// Claims a page that a demand thread may be loading. Returns `false` if it is not missing any more.
    fn claims(&self, claim: &Claim<'_>, page: u64, offset: u64) -> Result<bool, Ended> {
        while !claim.claim(&mut iter::once(offset)) {
            if self.shared.states.of(page) != PageState::Missing {
                return Ok(false);
            }
            // Not `before_load`: a loader that fell asleep here would not see the end of the memory, if this fault is the last.
            pause(&self.shared, CLAIMED_PAUSE)?;
        }
        Ok(true)
    }

    /// Installs what was loaded, in small steps.
    fn install(
        &mut self,
        asked: Option<Place>,
        loaded: LoadedPages<'_>,
    ) -> Result<Result<(), NotInstalled>, Ended> {
        let shared = &self.shared;
        let slice = asked.map_or(0, |asked| shared.layout.extent(asked.extent).slice);
        shared.slices[slice].counters.read(loaded.cost.bytes_read);
        let pace = &mut self.pace;
        let step = |step: &mut usize| {
            *step = pace.step(shared)?;
            Some(())
        };
        match self.resolver.install_ahead(shared, asked, InstallReason::Populate, loaded, step) {
            Ok(()) => Ok(Ok(())),
            Err(ResolveError::ProcessGone) => Err(Ended),
            Err(ResolveError::Failed(_)) => Ok(Err(NotInstalled)),
        }
    }

    fn give_up(&self, page: u64) -> NextPage {
        self.shared.population.unloadable.fetch_add(1, Ordering::Relaxed);
        page + 1
    }

    /// The last loader to end unregisters the memory, if all of it is loaded.
    fn finish(&self) {
        let progress = &self.shared.population;
        {
            let mut state = progress.lock();
            state.left -= 1;
            if state.left > 0 {
                drop(state);
                return progress.wake();
            }
        }
        // Held until the memory is let go: a reset gives pages back before this, or registers the memory again.
        let was_reset = lock(&self.shared.was_reset);
        let mut unloadable = progress.unloadable.load(Ordering::Relaxed);
        // A page that was never checked would become zeros.
        unloadable += progress.plan.get().map_or(1, Plan::pages_left);
        unloadable += self.shared.slices.iter().map(|slice| slice.counters.poisoned()).sum::<u64>();
        let population = match unloadable {
            0 if *was_reset => Population::Reset,
            0 if self.shared.release().is_ok() => Population::Complete,
            pages => Population::Incomplete { pages },
        };
        lock(&progress.state).population = population;
        drop(was_reset);
        progress.active.store(false, Ordering::Relaxed);
        progress.changed.notify_all();
        if let Some(on_complete) = &progress.options.on_complete {
            // The callback belongs to the caller. At the end of this thread its panic does no harm.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| on_complete(population)));
        }
    }
}

/// The kernel has refused the install, or the source returned something unusable.
struct NotInstalled;
