//! Loads ahead into the shared file while clones wait for pages, once for all of them.

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, Thread};
use std::time::Duration;

use super::SharedImage;
use crate::background::populate::demand::{Demand, OVERHEAD, QuietDetector};
use crate::background::populate::plan::Plan;
use crate::background::populate::progress::LoadsAhead;
use crate::background::populate::start;
use crate::install::runs::Run;
use crate::region::PAGE_BYTES;
use crate::sched::priority::make_normal;
use crate::source::load::Load;

/// The time between two checks whether the file still exists.
const ASLEEP: Duration = Duration::from_secs(1);

/// Fills the shared file in the background: see [`Populate::Auto`](crate::Populate::Auto).
#[derive(Debug)]
pub(crate) struct ImageLoader {
    image: Weak<SharedImage>,
    own: Weak<ImageLoader>,
    demand: Demand,
    active: AtomicBool,
    thread: Mutex<State>,
}

#[derive(Debug)]
enum State {
    NotBegun,
    Loading(Thread),
    /// All pages are in the file, or no more can be added.
    Ended,
}

impl ImageLoader {
    pub(crate) fn of(image: &Arc<SharedImage>) -> Arc<ImageLoader> {
        Arc::new_cyclic(|own| ImageLoader {
            image: Arc::downgrade(image),
            own: Weak::clone(own),
            demand: Demand::new(OVERHEAD),
            active: AtomicBool::new(false),
            thread: Mutex::new(State::NotBegun),
        })
    }

    /// The body of the thread. It ends when no page is left, or the file is closed.
    fn run(&self) {
        // The thread has inherited its policy from the demand thread that created it.
        make_normal(0);
        // The source may panic.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| self.fill()));
        *self.state() = State::Ended;
    }

    fn fill(&self) -> Option<()> {
        let (source, plan) = {
            let image = self.image.upgrade()?;
            (Arc::clone(image.source()), Plan::new(image.layout()))
        };
        let mut quiet = QuietDetector::new(&self.demand);
        let mut runs: Vec<Run> = Vec::with_capacity(512);
        let mut last = None;
        while let Some(part) = plan.next(last, &self.demand.recent) {
            last = Some(part.number);
            // A part that cannot be loaded is left to faults. Zero pages stay holes.
            let Ok(mut sequence) = source.sequence(PAGE_BYTES, vec![part.source]) else {
                continue;
            };
            sequence.continues();
            loop {
                self.sleep_while_quiet(&mut quiet)?;
                let image = self.image.upgrade()?;
                match sequence.next(&|offset: u64| image.lacks(offset)) {
                    None => break,
                    Some(Ok(Load::Pages(loaded))) => image.fill(&loaded, None, &mut runs).ok()?,
                    Some(_) => {}
                }
            }
        }
        Some(())
    }

    /// `None` if the file is closed.
    fn sleep_while_quiet(&self, quiet: &mut QuietDetector) -> Option<()> {
        if self.is_active() && quiet.is_waiting(&self.demand) {
            return Some(());
        }
        self.active.store(false, Ordering::Relaxed);
        while !self.is_active() {
            self.image.upgrade()?;
            thread::park_timeout(ASLEEP);
        }
        quiet.restart(&self.demand);
        Some(())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LoadsAhead for ImageLoader {
    fn waited(&self, source_offset: u64, service: Duration) {
        self.demand.add(source_offset / PAGE_BYTES as u64, service, Duration::ZERO);
    }

    fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    fn begin(&self) {
        let mut state = self.state();
        if matches!(*state, State::Ended) {
            return;
        }
        self.active.store(true, Ordering::Relaxed);
        if let State::Loading(thread) = &*state {
            return thread.unpark();
        }
        let Some(own) = self.own.upgrade() else { return };
        // Without this thread, only faults load pages.
        if let Ok(thread) = start::spawn("populate".into(), 1, move || own.run()) {
            *state = State::Loading(thread.thread().clone());
        }
    }
}
