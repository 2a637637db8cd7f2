//! The thread that writes the file of a guest that continues to run.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use snapfmt::{Header, Progress};
use snapvm::{Cut, Written};

use super::checkpoint::{Base, Tracked, Tracker};
use super::remote::{Answer, Done, Event, Refused, Status, StoreRequest};
use crate::exit;
use crate::interrupt::Interrupt;
use crate::millis::ms;
use crate::progress::Steps;
use crate::restoring::snapshot_error;
use crate::summary::{LiveFigures, Summary};
use crate::waits::Wait;

/// The thread that writes the file of a guest that runs on. Dropping it waits for the file.
pub(super) struct Saving(Option<JoinHandle<()>>);

impl Drop for Saving {
    fn drop(&mut self) {
        let what = || "the snapshot of the guest to be complete".into();
        let _waiting = Wait::new(what).hears().begin();
        if let Some(thread) = self.0.take() {
            // A panic in the thread has been printed already.
            let _ = thread.join();
        }
    }
}

/// Reports the progress of a file, and cancels it when its client or the user has requested that.
pub(super) fn progress_of<'a>(
    request: &'a StoreRequest,
    status: &'a Status,
    interrupt: &'a Interrupt,
) -> impl Fn(Progress) -> ControlFlow<()> + Sync + 'a {
    let steps = Steps::begin("storing");
    move |progress| {
        status.progress(progress);
        steps.moved(progress);
        let cancelled = request.cancelled.load(Ordering::SeqCst);
        match cancelled || interrupt.requested() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// A snapshot that was begun, and its client. However it ends, the status says so, and then the client gets an answer.
pub(super) struct Begun {
    pub(super) status: Arc<Status>,
    /// `None`: the client has it.
    answer: Option<Sender<Answer>>,
    result: Option<Answer>,
}

impl Begun {
    pub(super) fn new(
        status: &Arc<Status>,
        request: &StoreRequest,
        answer: &Sender<Answer>,
    ) -> Begun {
        status.saving(Some(Arc::clone(&request.cancelled)));
        Begun { status: Arc::clone(status), answer: Some(answer.clone()), result: None }
    }

    /// The client gets this, although the snapshot has not ended.
    pub(super) fn answer(&mut self, result: Answer) {
        if let Some(answer) = self.answer.take() {
            let _ = answer.send(result);
        }
    }

    /// It ends with this result.
    pub(super) fn end(mut self, result: Answer) {
        self.result = Some(result);
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        // Before the answer, so that the state of the guest agrees with it.
        self.status.saving(None);
        let panicked =
            || Err(Refused::Failed("the thread that writes the snapshot panicked".into()));
        // The command is done even if the client does not wait for the answer.
        let result = self.result.take().unwrap_or_else(panicked);
        self.answer(result);
    }
}

/// What is in a file of a guest.
pub(super) enum What {
    All,
    /// What has changed since the snapshot from which the guest was restored.
    Changes,
    /// What has changed since the last checkpoint.
    Since(Box<Base>),
}

/// Where memory is kept until the next checkpoint.
pub(super) struct Tracking {
    pub(super) tracker: Tracker,
    pub(super) events: Sender<Event>,
}

/// A file to be written, of a guest at one point in time.
pub(super) struct Save {
    // First, because the memory is free for another one when the client gets the answer.
    pub(super) cut: Cut,
    /// For a file whose memory is added later.
    pub(super) written: Written,
    pub(super) what: What,
    pub(super) request: StoreRequest,
    pub(super) tracking: Tracking,
    pub(super) begun: Begun,
    pub(super) interrupt: Interrupt,
    pub(super) started: Instant,
    pub(super) pause: Duration,
    pub(super) arm: Duration,
}

impl Save {
    /// Starts the thread that writes the file.
    pub(super) fn start(self) -> Option<Saving> {
        let (give, take) = channel();
        let saves = move || take.into_iter().for_each(Save::run);
        let thread = snapvm::room::check(snapvm::room::THREAD_BYTES)
            .and_then(|()| std::thread::Builder::new().name("save".into()).spawn(saves))
            .context("the thread that writes the snapshot cannot be started");
        match thread {
            Ok(thread) => {
                // The thread receives until this sender is dropped.
                let _ = give.send(self);
                Some(Saving(Some(thread)))
            }
            Err(error) => {
                self.begun.end(Err(Refused::Failed(exit::describe(&error))));
                None
            }
        }
    }

    fn run(self) {
        if self.request.deferred {
            return self.run_deferred();
        }
        let written = self.write();
        let Save { cut, what, request, tracking, begun, .. } = self;
        match request.checkpoint {
            None => drop(cut),
            Some(checkpoint) => {
                let last = match (&written, what) {
                    (Ok(summary), _) => Some(summary.id.clone()),
                    // The next one also has what this one would have had.
                    (Err(_), What::Since(base)) => Some(base.last),
                    (Err(_), _) => None,
                };
                let armed = cut.end(written.is_ok());
                if let Some(last) = last {
                    tracking.tracker.keep(Tracked { armed, last }, checkpoint.track_for);
                }
                // It waits no longer than that time. The receiver is dropped when the run has ended.
                let _ = tracking.events.send(Event::Checkpointed);
            }
        }
        begun.end(
            written.map(Done::Stored).map_err(|error| Refused::Failed(exit::describe(&error))),
        );
    }

    fn write(&self) -> Result<Summary> {
        let Save { cut, what, request, begun, interrupt, .. } = self;
        let progress = progress_of(request, &begun.status, interrupt);
        let (out, options) = (&request.out, &request.options);
        let written = match what {
            What::All => cut.write(out, options, &progress),
            What::Changes => cut.write_layer(out, options, &progress),
            What::Since(base) => {
                cut.write_changes(out, &base.parent, &base.path, options, &progress)
            }
        };
        Ok(self.summary(&written.map_err(snapshot_error)?))
    }

    pub(super) fn summary(&self, header: &Header) -> Summary {
        let (stats, started) = (self.cut.stats(), self.started);
        let live = LiveFigures {
            arm_ms: ms(self.arm),
            faults: stats.faults,
            copied_bytes: stats.copied_bytes,
            waits: stats.waits,
        };
        let mut summary = Summary::new(&self.request.out, header, started, started, started);
        summary.pause_ms = ms(self.pause);
        Summary { live: Some(live), ..summary }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::live::remote;

    fn request() -> StoreRequest {
        StoreRequest {
            out: "out.snap".into(),
            changes_only: false,
            live: true,
            checkpoint: None,
            deferred: false,
            stop: false,
            options: snapfmt::WriteOptions::default(),
            cancelled: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Otherwise each further snapshot of the guest would be refused, and the client would read that the guest has ended.
    #[test]
    fn a_panic_ends_the_snapshot_and_answers_the_client() {
        let (remote, events) = remote();
        let (sender, answer) = channel();
        let begun = Begun::new(&events.status, &request(), &sender);
        assert!(remote.saving().is_some());
        let panicked = catch_unwind(AssertUnwindSafe(move || {
            let _begun = begun;
            std::panic::resume_unwind(Box::new("in the writer"));
        }));
        assert!(panicked.is_err());
        assert!(remote.saving().is_none());
        assert!(
            matches!(answer.recv(), Ok(Err(Refused::Failed(reason))) if reason.contains("panicked"))
        );
    }

    /// A client may ask for the next snapshot as soon as it has the answer.
    #[test]
    fn the_status_changes_before_the_answer() {
        let (remote, events) = remote();
        for _ in 0..100 {
            let (sender, answer) = channel();
            let begun = Begun::new(&events.status, &request(), &sender);
            let writer = std::thread::spawn(move || begun.end(Ok(Done::Plain)));
            assert!(matches!(answer.recv(), Ok(Ok(Done::Plain))));
            assert!(remote.saving().is_none() && !events.status.is_saving());
            writer.join().expect("no panic");
        }
    }
}
