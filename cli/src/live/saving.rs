//! Snapshots a guest that runs on: a short pause fixes its memory, and a thread of its own writes the file.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pager::window::WindowOptions;
use snapvm::{Cut, SnapshotError};

use super::remote::{Answer, Refused, Status, StoreRequest};
use super::{End, Guest, Live, Next, is_busy, pause};
use crate::exit;
use crate::interrupt::Interrupt;
use crate::millis::ms;
use crate::progress::Steps;
use crate::restoring::snapshot_error;
use crate::summary::{LiveFigures, Summary};
use crate::waits::Wait;
use vmm::Stop;

/// The thread that writes the file of a guest that runs on. Dropping it waits for the file.
pub(super) struct Saving(Option<JoinHandle<()>>);

impl Saving {
    pub(super) fn is_finished(&self) -> bool {
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

/// A file to be written, of a guest at one point in time.
struct Save {
    cut: Cut,
    request: StoreRequest,
    answer: Sender<Answer>,
    status: Arc<Status>,
    interrupt: Interrupt,
    started: Instant,
    pause: Duration,
    arm: Duration,
}

impl Live<'_> {
    /// Takes the guest's point in time, and starts the thread that writes it. The guest is then as it was before.
    pub(super) fn save(
        &self,
        guest: Guest,
        request: StoreRequest,
        answer: &Sender<Answer>,
        saving: &mut Option<Saving>,
    ) -> Result<Next> {
        // The command is done even if the client does not wait for the answer.
        let refuse = |refused| drop(answer.send(Err(refused)));
        if is_busy(saving) {
            refuse(Refused::Busy);
            return Ok(Next::Go(guest));
        }
        let failed = |error: SnapshotError| {
            Refused::Failed(exit::describe(&snapshot_error(error).context("no live snapshot")))
        };
        let started = Instant::now();
        let options = WindowOptions::default();
        let armed = match &guest {
            Guest::Running(vm) => vm.arm(options),
            Guest::Paused(vm) => vm.arm(options),
        };
        let armed = match armed {
            Ok(armed) => armed,
            Err(error) => {
                refuse(failed(error));
                return Ok(Next::Go(guest));
            }
        };
        let paused_at = Instant::now();
        let (mut vm, was_running) = match guest {
            Guest::Paused(vm) => (vm, false),
            Guest::Running(vm) => match pause(vm) {
                Ok(vm) => (vm, true),
                Err(error) => {
                    refuse(Refused::Failed(error.to_string()));
                    return Ok(Next::End(End::Stopped(error.stop.clone()), Err(error)));
                }
            },
        };
        let cut = vm.cut(armed);
        if self.seen.is_done() {
            // The console has requested the end at the moment of the pause.
            refuse(Refused::Ended);
            return Ok(Next::End(End::Stopped(Stop::ConsolePause), Ok(Guest::Paused(vm))));
        }
        let guest = if was_running { self.resume(vm)? } else { Guest::Paused(vm) };
        let pause = if was_running { paused_at.elapsed() } else { Duration::ZERO };
        let cut = match cut {
            Ok(cut) => cut,
            Err(error) => {
                refuse(failed(error));
                return Ok(Next::Go(guest));
            }
        };
        let save = Save {
            cut,
            request,
            answer: answer.clone(),
            status: Arc::clone(&self.events.status),
            interrupt: self.session.interrupt.clone(),
            started,
            pause,
            arm: paused_at - started,
        };
        self.events.status.saving(Some(Arc::clone(&save.request.cancelled)));
        let spawned = snapvm::room::check(snapvm::room::THREAD_BYTES).and_then(|()| {
            std::thread::Builder::new().name("save".into()).spawn(move || save.run())
        });
        match spawned.context("there is no thread to write the snapshot") {
            Ok(thread) => *saving = Some(Saving(Some(thread))),
            Err(error) => {
                self.events.status.saving(None);
                refuse(Refused::Failed(exit::describe(&error)));
            }
        }
        Ok(Next::Go(guest))
    }
}

impl Save {
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
        let steps = Steps::begin("storing");
        let progress = |progress| {
            status.progress(progress);
            steps.moved(progress);
            let cancelled = request.cancelled.load(Ordering::SeqCst);
            match cancelled || interrupt.requested() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
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
