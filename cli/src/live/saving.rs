//! The thread that writes the file of a guest that continues to run.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use snapfmt::Progress;
use snapvm::Cut;

use super::remote::{Answer, Refused, Status, StoreRequest};
use crate::exit;
use crate::interrupt::Interrupt;
use crate::millis::ms;
use crate::progress::Steps;
use crate::restoring::snapshot_error;
use crate::summary::{LiveFigures, Summary};
use crate::waits::Wait;

/// The thread that writes the file of a guest that runs on. Dropping it waits for the file.
pub(super) struct Saving(Option<JoinHandle<()>>);

impl Saving {
    fn is_finished(&self) -> bool {
        self.0.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

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

/// Whether a file is being written.
pub(super) fn is_busy(saving: &Option<Saving>) -> bool {
    saving.as_ref().is_some_and(|saving| !saving.is_finished())
}

/// A file to be written, of a guest at one point in time.
pub(super) struct Save {
    pub(super) cut: Cut,
    pub(super) request: StoreRequest,
    pub(super) answer: Sender<Answer>,
    pub(super) status: Arc<Status>,
    pub(super) interrupt: Interrupt,
    pub(super) started: Instant,
    pub(super) pause: Duration,
    pub(super) arm: Duration,
}

impl Save {
    /// Starts the thread that writes the file.
    pub(super) fn start(self) -> io::Result<Saving> {
        snapvm::room::check(snapvm::room::THREAD_BYTES)?;
        let thread = std::thread::Builder::new().name("save".into()).spawn(move || self.run())?;
        Ok(Saving(Some(thread)))
    }

    fn run(self) {
        let written = self.write();
        let Save { cut, answer, status, .. } = self;
        // Before the answer, so that the state of the guest agrees with it.
        drop(cut);
        status.saving(None);
        let written = written.map(Some);
        let _ = answer.send(written.map_err(|error| Refused::Failed(exit::describe(&error))));
    }

    fn write(&self) -> Result<Summary> {
        let Save { cut, request, status, interrupt, started, .. } = self;
        let progress = progress_of(request, status, interrupt);
        let (out, options) = (&request.out, &request.options);
        let written = match request.changes_only {
            false => cut.write(out, options, &progress),
            true => cut.write_layer(out, options, &progress),
        };
        let header = written.map_err(snapshot_error)?;
        let stats = cut.stats();
        let live = LiveFigures {
            arm_ms: ms(self.arm),
            faults: stats.faults,
            copied_bytes: stats.copied_bytes,
            waits: stats.waits,
        };
        let mut summary = Summary::new(out, &header, *started, *started, *started);
        summary.pause_ms = ms(self.pause);
        Ok(Summary { live: Some(live), ..summary })
    }
}
