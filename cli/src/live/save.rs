//! Snapshots a guest that continues to run: a short pause fixes its memory, and a thread of its own writes the file.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Result;
use pager::window::WindowOptions;
use snapvm::{Armed, VmMemory, Written};
use vmm::Stop;

use super::checkpoint::{Tracked, Tracker};
use super::remote::{Answer, Done, Refused, StoreRequest};
use super::saving::{Begun, Save, Saving, Tracking, What};
use super::{End, Guest, Live, Next};
use crate::exit;
use crate::keys::KeyArgs;
use crate::restoring::snapshot_error;

impl Live<'_> {
    /// Takes the guest's point in time, and starts the thread that writes it. The guest is then as it was before.
    pub(super) fn save(
        &self,
        guest: Guest,
        mut request: StoreRequest,
        answer: &Sender<Answer>,
        tracker: &Tracker,
        saving: &mut Option<Saving>,
    ) -> Result<Next> {
        // The command is done even if the client does not wait for the answer.
        let reply = |what| drop(answer.send(what));
        if self.events.status.is_saving() {
            reply(Err(Refused::Busy));
            return Ok(Next::Go(guest));
        }
        // The key was read when the guest was started.
        request.options.seal = self.keys.provider()?;
        let started = Instant::now();
        let (armed, what) = match armed(&guest, &request, tracker, &self.keys) {
            Ok(Some(armed)) => armed,
            Ok(None) => {
                reply(Ok(Done::Plain));
                return Ok(Next::Go(guest));
            }
            Err(error) => {
                reply(Err(failed(error)));
                return Ok(Next::Go(guest));
            }
        };
        let paused_at = Instant::now();
        let (mut vm, was_running) = match guest.paused() {
            Ok(paused) => paused,
            Err(error) => return Ok(Next::unpaused(error, answer)),
        };
        let cut = vm.cut(armed).and_then(|cut| {
            let written = if request.deferred { vm.written()? } else { Written::default() };
            Ok((cut, written))
        });
        if self.seen.is_done() {
            // The console has requested the end at the moment of the pause.
            reply(Err(Refused::Ended));
            return Ok(Next::End(End::Stopped(Stop::ConsolePause), Ok(Guest::Paused(vm))));
        }
        let guest = if was_running { self.resume(vm)? } else { Guest::Paused(vm) };
        let pause = if was_running { paused_at.elapsed() } else { Duration::ZERO };
        let (cut, written) = match cut {
            Ok(cut) => cut,
            Err(error) => {
                reply(Err(failed(snapshot_error(error))));
                return Ok(Next::Go(guest));
            }
        };
        let save = Save {
            cut,
            written,
            what,
            begun: Begun::new(&self.events.status, &request, answer),
            request,
            tracking: Tracking { tracker: tracker.clone(), events: self.events.sender.clone() },
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

/// Protects the guest's memory. `None`: its memory has not changed since the last checkpoint, and no other one is wanted.
fn armed(
    guest: &Guest,
    request: &StoreRequest,
    tracker: &Tracker,
    keys: &KeyArgs,
) -> Result<Option<(Armed, What)>> {
    let mut options = WindowOptions::default();
    let mut what = if request.changes_only { What::Changes } else { What::All };
    if let Some(checkpoint) = &request.checkpoint {
        if let Some((armed, base)) = tracker.take(checkpoint.parent.as_deref(), keys)? {
            if checkpoint.if_changed && !armed.is_written() {
                tracker.keep(Tracked { armed, last: base.last }, checkpoint.track_for);
                return Ok(None);
            }
            armed.arm_again().map_err(snapshot_error)?;
            return Ok(Some((armed, What::Since(Box::new(base)))));
        }
        options.tracks = true;
        if guest.memory().snapshot().is_some() {
            what = What::Changes;
        }
    }
    tracker.stop();
    let armed = match guest {
        Guest::Running(vm) => vm.arm(options),
        Guest::Paused(vm) => vm.arm(options),
    };
    Ok(Some((armed.map_err(snapshot_error)?, what)))
}

fn failed(error: anyhow::Error) -> Refused {
    Refused::Failed(exit::describe(&error.context("no live snapshot")))
}

impl Guest {
    fn memory(&self) -> &Arc<VmMemory> {
        match self {
            Guest::Running(vm) => vm.memory(),
            Guest::Paused(vm) => vm.memory(),
        }
    }
}
