//! A thread that loads in the background.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::pace::Pace;
use super::plan::{Part, Plan};
use super::{Ended, Look, Populate, Population, lock, pause, stopped};
use crate::answer::{Desk, Trouble};
use crate::deference::make_ordinary;
use crate::handler::Panicked;
use crate::layout::Place;
use crate::loading::Claim;
use crate::page_state::PageState;
use crate::placement::Aside;
use crate::prefetch::Prefetch;
use crate::purpose::Purpose;
use crate::sequence::PageSequence;
use crate::slice::Shared;
use crate::source::{Load, LoadedPages, PageReader, SourceErrorKind};

/// While there is a prefetch, between looks whether the pager was stopped.
const AFTER_PREFETCH: Duration = Duration::from_millis(5);
/// Between two tries while the memory map is changing.
const ASIDE: Duration = Duration::from_micros(50);
/// When the guest has caught up with a loader, so many pages are left to its faults, so that the loader is in front of it
/// again. They come at the end.
const LEAD_PAGES: usize = 64;

pub(super) struct Loader {
    shared: Arc<Shared>,
    /// For single pages: made when one is wanted.
    reader: Option<Box<dyn PageReader>>,
    desk: Desk,
    pace: Pace,
    look: Look,
    aside: Aside,
}

type Sequence = Box<dyn PageSequence>;

/// A page was dealt with: all before this one need no load.
type NextPage = u64;

impl Loader {
    pub(super) fn new(shared: Arc<Shared>) -> Loader {
        let (pace, look) =
            (Pace::of(shared.population.options.mode), Look::new(&shared.population.demand));
        let (desk, aside) = (Desk::new(usize::MAX), Aside::default());
        Loader { shared, reader: None, desk, pace, look, aside }
    }

    /// The thread's body.
    pub(super) fn run(mut self) {
        // It has inherited these from the demand thread that has made it.
        make_ordinary(0);
        if let Some(cpus) = &self.shared.population.options.cpus {
            // A matter of speed only.
            let _ = cpus.bind();
        }
        self.aside.begin();
        if let Ok(()) = self.load_all() {
            self.finish();
        }
    }

    fn load_all(&mut self) -> Result<(), Ended> {
        let shared = Arc::clone(&self.shared);
        // What will probably be asked for goes first.
        while shared.prefetch.wait(AFTER_PREFETCH) == Prefetch::Running {
            stopped(&shared)?;
        }
        let plan = shared.population.plan.get_or_init(|| Plan::new(&shared.layout));
        let mut ahead = None;
        // What was left comes again after the last part.
        while let Some((part, mut sequence)) = ahead.take().or_else(|| self.prepared(plan, None)) {
            // Storage reads the next part while this one is decoded.
            ahead = self.prepared(plan, Some(part.number));
            let passed_over = match &mut sequence {
                // A source that panics is tried once more, page by page.
                Some(sequence) => {
                    let sequence = || self.in_sequence(&part, sequence.as_mut());
                    panic::catch_unwind(AssertUnwindSafe(sequence)).unwrap_or(Ok(false))?
                }
                None => false,
            };
            if passed_over {
                plan.leave(part);
            } else {
                self.rest(&part)?;
                plan.done(&part);
            }
        }
        Ok(())
    }

    /// The next part, and what is missing of it as it lies in the source.
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
            sequence.prepare(&Claim::new(shared));
            Some(sequence)
        };
        let sequence = panic::catch_unwind(AssertUnwindSafe(sequence)).ok().flatten();
        Some((part, sequence))
    }

    /// In `Auto`: sleeps while threads do not wait for pages.
    fn sleep_while_quiet(&mut self) -> Result<(), Ended> {
        let progress = &self.shared.population;
        if progress.options.mode != Populate::Auto
            || (progress.is_active() && self.look.still(&progress.demand))
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
        while !progress.is_active() {
            stopped(&self.shared)?;
            thread::park();
        }
        self.look.begin_again(&progress.demand);
        stopped(&self.shared)
    }

    /// Loads what is missing of a part as it lies in the source. Answers whether something was passed over.
    fn in_sequence(&mut self, part: &Part, sequence: &mut dyn PageSequence) -> Result<bool, Ended> {
        let shared = Arc::clone(&self.shared);
        let page_bytes = shared.layout.page_bytes();
        let claim = Claim::new(&shared);
        let mut passed_over = false;
        loop {
            self.sleep_while_quiet()?;
            self.pace.before_load(&shared)?;
            self.aside.step(&shared);
            shared.population.caught_up.store(false, Ordering::Relaxed);
            match sequence.next(&claim) {
                None => break,
                // Zeros are left to the kernel, or to a fault. What failed is tried page by page.
                Some(Ok(Load::Zero { .. } | Load::InFile { .. }) | Err(_)) => {}
                Some(Ok(Load::Pages(loaded))) => {
                    let bytes = loaded.pages.len() as u64 * page_bytes;
                    let _ = self.install(None, loaded)?;
                    self.pace.loaded(&shared, bytes)?;
                }
            }
            let met = claim.end() | shared.population.caught_up.load(Ordering::Relaxed);
            if met && !part.again {
                sequence.skip(LEAD_PAGES);
                passed_over = true;
            }
        }
        Ok(passed_over)
    }

    /// Loads page by page what is still missing of a part.
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
                    // It may be in any state: not even its destructor is run.
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
        // Parts are made of the layout's own pages.
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
        while shared.states.of(page) == PageState::Missing {
            self.sleep_while_quiet()?;
            self.pace.before_load(&shared)?;
            self.aside.step(&shared);
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
                    self.pace.loaded(&shared, bytes)?;
                    tries += 1;
                    if tries > 1 {
                        // The memory map is changing, and its demand thread sees to that.
                        pause(&shared, ASIDE)?;
                    }
                }
                Err(error)
                    if error.kind() == SourceErrorKind::Transient
                        && failed_loads < retry.retries =>
                {
                    pause(&shared, retry.pause(failed_loads))?;
                    failed_loads += 1;
                }
                Ok(Load::InFile { .. }) | Err(_) => return Ok(self.give_up(page)),
            }
        }
        Ok(page + 1)
    }

    /// Installs what was loaded, small steps at a time.
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
        match self.desk.populate(shared, asked, Purpose::Populate, loaded, step) {
            Ok(()) => Ok(Ok(())),
            Err(Trouble::ProcessGone) => Err(Ended),
            Err(Trouble::Failed(_)) => Ok(Err(NotInstalled)),
        }
    }

    fn give_up(&self, page: u64) -> NextPage {
        self.shared.population.unloadable.fetch_add(1, Ordering::Relaxed);
        page + 1
    }

    /// The last loader to end lets the memory go, if all of it is loaded.
    fn finish(&self) {
        let progress = &self.shared.population;
        {
            let mut state = progress.lock();
            state.left -= 1;
            if state.left > 0 {
                return;
            }
        }
        let mut unloadable = progress.unloadable.load(Ordering::Relaxed);
        // What was never looked at would become zeros.
        unloadable += progress.plan.get().map_or(1, Plan::pages_left);
        unloadable += self.shared.slices.iter().map(|slice| slice.counters.poisoned()).sum::<u64>();
        let population = match unloadable {
            0 if self.shared.release().is_ok() => Population::Complete,
            pages => Population::Incomplete { pages },
        };
        lock(&progress.state).population = population;
        progress.active.store(false, Ordering::Relaxed);
        progress.changed.notify_all();
        if let Some(on_complete) = &progress.options.on_complete {
            // The caller's code, at the end of this thread: nothing is left to be harmed by its panic.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| on_complete(population)));
        }
    }
}

/// The kernel, or the source's answer, does not allow it.
struct NotInstalled;
