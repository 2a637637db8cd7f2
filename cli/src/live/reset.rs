//! Puts a guest back to the snapshot that it was restored from.

use std::ops::ControlFlow;
use std::sync::mpsc::Sender;
use std::time::Instant;

use anyhow::Result;
use snapvm::{ResetError, Vm};
use vmm::Stop;

use super::checkpoint::Tracker;
use super::remote::{Answer, Done, Refused};
use super::{End, Guest, Live, Next};
use crate::exit;
use crate::millis::ms;
use crate::progress::Steps;
use crate::summary::ResetSummary;

impl Live<'_> {
    /// Resets the guest, which is then running or paused, as before.
    pub(super) fn reset(
        &self,
        guest: Guest,
        tracker: &Tracker,
        answer: &Sender<Answer>,
    ) -> Result<Next> {
        // The command is done even if the client does not wait for the answer.
        let refuse = |refused| drop(answer.send(Err(refused)));
        if self.events.status.is_saving() {
            refuse(Refused::Busy);
            return Ok(Next::Go(guest));
        }
        let paused_at = Instant::now();
        let (mut vm, was_running) = match guest.paused() {
            Ok(paused) => paused,
            Err(error) => return Ok(Next::unpaused(error, answer)),
        };
        if self.seen.is_done() {
            // The console has requested the end at the moment of the pause.
            refuse(Refused::Ended);
            return Ok(Next::End(End::Stopped(Stop::ConsolePause), Ok(Guest::Paused(vm))));
        }
        let done = self.put_back(&mut vm, tracker);
        if let Some(stop) = vm.breakdown() {
            done.err().into_iter().for_each(refuse);
            return Ok(Next::End(End::Stopped(stop), Ok(Guest::Paused(vm))));
        }
        let next = if was_running { self.resume(vm)? } else { Guest::Paused(vm) };
        let pause_ms = if was_running { ms(paused_at.elapsed()) } else { 0.0 };
        // At the end, so that the state of the guest agrees with the answer.
        let done = done.map(|summary| Done::Reset(ResetSummary { pause_ms, ..summary }));
        let _ = answer.send(done);
        Ok(Next::Go(next))
    }

    fn put_back(&self, vm: &mut Vm, tracker: &Tracker) -> Result<ResetSummary, Refused> {
        let began = Instant::now();
        let (status, interrupt) = (&self.events.status, &self.session.interrupt);
        status.resetting(true);
        let steps = Steps::begin("resetting");
        let on_progress = |progress| {
            status.progress(progress);
            steps.moved(progress);
            match interrupt.requested() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let mut stats = vm.reset(&on_progress);
        if let Err(ResetError::Busy) = stats {
            // No snapshot is being written: the memory is protected since the last checkpoint. All other checks have
            // passed, and the next checkpoint cannot be one of what has changed since the last one.
            tracker.stop();
            stats = vm.reset(&on_progress);
        }
        status.resetting(false);
        let stats = stats.map_err(refused)?;
        Ok(ResetSummary {
            snapshot: vm.memory().file().map(ToOwned::to_owned).unwrap_or_default(),
            memory_bytes: stats.memory_bytes,
            reset_ms: ms(began.elapsed()),
            pause_ms: 0.0,
        })
    }
}

fn refused(error: ResetError) -> Refused {
    let refused = match error {
        ResetError::Busy => return Refused::Busy,
        ResetError::NotRestored | ResetError::OutsideFile { .. } | ResetError::Recorded => {
            Refused::Unfit
        }
        _ => Refused::Failed,
    };
    refused(exit::describe(&error.into()))
}
