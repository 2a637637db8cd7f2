//! Loading ahead into the shared file, while clones wait for pages: once, for all of them.

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, Thread};
use std::time::Duration;

use super::SharedImage;
use crate::deference::make_ordinary;
use crate::populate::{self, Demand, LoadsAhead, Look, OVERHEAD, Plan};
use crate::run::Run;
use crate::source::Load;

/// Between looks whether there still is a file to fill.
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
    /// All is in the file, or nothing more can be put into it.
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

    /// The thread's body. Ends when nothing is left to load, or there is no file any more.
    fn run(&self) {
        // It has inherited this from the demand thread that has made it.
        make_ordinary(0);
        // The source is somebody else's code.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| self.fill()));
        *self.state() = State::Ended;
    }

    fn fill(&self) -> Option<()> {
        let (source, plan) = {
            let image = self.image.upgrade()?;
            (Arc::clone(image.source()), Plan::new(image.layout()))
        };
        let mut look = Look::new(&self.demand);
        let mut runs: Vec<Run> = Vec::with_capacity(512);
        let mut last = None;
        while let Some(part) = plan.next(last, &self.demand.recent) {
            last = Some(part.number);
            // A part that cannot be had is left to those that ask for it. Zero pages stay holes.
            let Ok(mut sequence) = source.sequence(SharedImage::PAGE_BYTES, vec![part.source])
            else {
                continue;
            };
            loop {
                self.sleep_while_quiet(&mut look)?;
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

    /// Answers whether there is still a file to fill.
    fn sleep_while_quiet(&self, look: &mut Look) -> Option<()> {
        if self.is_active() && look.still(&self.demand) {
            return Some(());
        }
        self.active.store(false, Ordering::Relaxed);
        while !self.is_active() {
            self.image.upgrade()?;
            thread::park_timeout(ASLEEP);
        }
        look.begin_again(&self.demand);
        Some(())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LoadsAhead for ImageLoader {
    fn waited(&self, source_offset: u64, service: Duration) {
        self.demand.add(source_offset / SharedImage::PAGE_BYTES as u64, service);
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
        // Where there is no such thread, pages come when they are asked for.
        if let Ok(thread) = populate::spawn("populate".into(), move || own.run()) {
            *state = State::Loading(thread.thread().clone());
        }
    }
}
