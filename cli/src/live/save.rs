//! Snapshots a guest that continues to run: a short pause fixes its memory, and a thread of its own writes the file.

use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Result;
use pager::window::WindowOptions;
use snapvm::SnapshotError;
use vmm::Stop;

use super::remote::{Answer, Refused, StoreRequest};
use super::saving::{Begun, Save, Saving};
use super::{End, Guest, Live, Next, pause};
use crate::exit;
use crate::restoring::snapshot_error;

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
        if self.events.status.is_saving() {
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
            begun: Begun::new(&self.events.status, &request, answer),
            request,
            interrupt: self.session.interrupt.clone(),
            started,
            pause,
            arm: paused_at - started,
        };
        // The thread of the last one, if there is one, has nothing left to do.
        *saving = save.start();
        Ok(Next::Go(guest))
    }
}
