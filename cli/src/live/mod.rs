//! Runs a guest until an event ends it, and judges the result.

mod adding;
mod checkpoint;
mod deferred;
mod remote;
mod reset;
mod save;
mod saving;

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use snapvm::{RunningVm, Vm, VmMemory};
use vmm::{PauseError, Stop};

use crate::exit::{self, GuestStopped, Interrupted};
use crate::guest_console::{BEAT, Seen, Until};
use crate::guest_output::Hold;
use crate::keys::KeyArgs;
use crate::on_restore::{Hook, HookError};
use crate::restoring::snapshot_error;
use crate::session::Session;
use crate::summary::Summary;
use crate::waits::{Wait, Waiting};
pub(crate) use adding::AddError;
pub(crate) use checkpoint::Checkpoint;
use checkpoint::Tracker;
use remote::Event;
pub(crate) use remote::{
    Answer, Command, Done, Events, Refused, Remote, State, StoreRequest, remote,
};
use saving::progress_of;

/// When a run ends without an interrupt.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct EndArgs {
    /// End after this many lines that begin with `beat`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) beats: Option<u64>,

    /// End when the guest has written this.
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) until: Option<String>,

    /// End after this long.
    #[arg(long = "for", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) run_for: Option<Duration>,
}

impl EndArgs {
    pub(crate) fn until(&self) -> Until {
        let lines = self.beats.map(|beats| (BEAT, beats));
        Until { lines, pattern: self.until.clone().map(String::into_bytes) }
    }
}

/// The limit of the wait for a guest that has reached its end.
const ENDING: Duration = Duration::from_secs(30);

/// Waits for something at the guest's end, which never comes if one of its pages is not loaded. A guest with all memory
/// loaded waits only for the kernel, which may be slow on a busy host: that wait has no limit.
pub(crate) fn ending(what: &'static str, memory: &VmMemory) -> Waiting {
    if !memory.is_served() {
        return Wait::new(move || what.into()).hears().begin();
    }
    let late = format!(
        "the guest is at its end, and {what} took longer than {}: a page that it waits for does not come",
        humantime::format_duration(ENDING)
    );
    Wait::new(move || of_page(what)).fails_after(ENDING, late).hears().begin()
}

fn of_page(what: &str) -> String {
    format!("{what}; a page that does not come may keep it")
}

const VCPUS_STOP: &str = "the guest's vCPUs to stop";

/// Pauses a guest that is to continue. A vCPU that waits for a page stops when the page is loaded, unless KVM lets a
/// worker of the kernel wait in its place: then the worker still waits when the guest is paused.
pub(crate) fn pause(vm: RunningVm) -> Result<Vm, PauseError> {
    let _waiting = Wait::new(|| of_page(VCPUS_STOP)).hears().begin();
    vm.pause()
}

/// A guest that is to run, and the events that end it.
pub(crate) struct Live<'a> {
    pub(crate) session: &'a Session,
    pub(crate) seen: &'a Seen,
    /// Of its output, if a reader may delay it.
    pub(crate) hold: Option<&'a Hold>,
    pub(crate) run_for: Option<Duration>,
    /// Whether it waits until a client resumes it.
    pub(crate) begins_paused: bool,
    pub(crate) events: Events,
    /// The keys of the files that are written.
    pub(crate) keys: KeyArgs,
    /// The command that is run when the guest runs for the first time.
    pub(crate) on_restore: Option<Hook>,
}

/// A guest that does not run any more.
pub(crate) struct Ended {
    pub(crate) end: End,
    /// When.
    pub(crate) at: Instant,
    pub(crate) first_entry: Option<Instant>,
    pub(crate) first_exit: Option<Instant>,
    pub(crate) paused: Result<Vm, PauseError>,
}

/// Why it does not.
pub(crate) enum End {
    Stopped(Stop),
    TimeIsUp,
    /// A client has requested a snapshot and its end.
    Stored,
    /// The command of `--on-restore` was not successful.
    Hook(HookError),
}

/// The guest in one of its two forms.
enum Guest {
    Running(RunningVm),
    Paused(Vm),
}

impl Guest {
    /// The guest, paused, and whether it ran before.
    fn paused(self) -> Result<(Vm, bool), PauseError> {
        match self {
            Guest::Paused(vm) => Ok((vm, false)),
            Guest::Running(vm) => Ok((pause(vm)?, true)),
        }
    }
}

/// What follows after an event.
enum Next {
    Go(Guest),
    /// It has ended, or could not be paused because it had.
    End(End, Result<Guest, PauseError>),
}

impl Next {
    /// What follows when a command could not pause the guest. Its client gets the reason.
    fn unpaused(error: PauseError, answer: &Sender<Answer>) -> Next {
        // The client may have left.
        let _ = answer.send(Err(Refused::Failed(error.to_string())));
        Next::End(End::Stopped(error.stop.clone()), Err(error))
    }
}

impl Live<'_> {
    /// Runs the guest until it stops, is stopped by its console, a client or an interrupt, or its time is up.
    pub(crate) fn run(mut self, vm: Vm) -> Result<Ended> {
        let (events, hold) = (self.events.sender.clone(), self.hold.cloned());
        vm.handle().on_stop(move || {
            hold.iter().for_each(Hold::hold);
            // The receiver is dropped when the run has ended.
            let _ = events.send(Event::Stopped);
        });
        let mut guest = match self.begins_paused {
            true => self.stay_paused(vm),
            false => self.resume(vm)?,
        };
        let resumed = || "a client to resume the guest, by its control socket".into();
        let mut unresumed = self.begins_paused.then(|| Wait::new(resumed).hears().begin());
        let mut deadline = None;
        let mut saving = None;
        let tracker = Tracker::default();
        let (end, guest) = loop {
            if let Guest::Running(_) = guest {
                unresumed = None;
                if let Some(hook) = self.on_restore.take() {
                    let events = self.events.sender.clone();
                    // The receiver is dropped when the run has ended.
                    hook.run(move |error| drop(events.send(Event::HookFailed(error))))?;
                }
            }
            if let (None, Guest::Running(_)) = (deadline, &guest) {
                deadline = self.run_for.and_then(|time| Instant::now().checked_add(time));
            }
            let wake = deadline.into_iter().chain(tracker.until()).min();
            let event = match wake {
                None => self.events.received.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(wake) => self
                    .events
                    .received
                    .recv_timeout(wake.saturating_duration_since(Instant::now())),
            };
            let next = match event {
                Ok(Event::Stopped) => match self.why_stopped(&guest) {
                    Some(stop) => break (End::Stopped(stop), Ok(guest)),
                    None => Next::Go(guest),
                },
                Ok(Event::Checkpointed) => Next::Go(guest),
                Ok(Event::HookFailed(error)) => break (End::Hook(error), Ok(guest)),
                Ok(Event::Command(Command::Store(request), answer)) if request.live => {
                    self.save(guest, request, &answer, &tracker, &mut saving)?
                }
                Ok(Event::Command(Command::Store(_), answer)) if self.events.status.is_saving() => {
                    let _ = answer.send(Err(Refused::Busy));
                    Next::Go(guest)
                }
                Ok(Event::Command(Command::Reset, answer)) => {
                    self.reset(guest, &tracker, &answer)?
                }
                Ok(Event::Command(command, answer)) => self.handle(guest, command, &answer)?,
                Err(RecvTimeoutError::Timeout) if wake != deadline => {
                    tracker.stop();
                    Next::Go(guest)
                }
                // It cannot be disconnected, because this thread has a sender.
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    break (End::TimeIsUp, Ok(guest));
                }
            };
            match next {
                Next::Go(next) => guest = next,
                Next::End(end, guest) => break (end, guest),
            }
        };
        drop(unresumed);
        let at = Instant::now();
        self.events.status.set(State::Ended);
        let (mut first_entry, mut first_exit) = (None, None);
        let paused = guest.and_then(|guest| match guest {
            Guest::Paused(vm) => Ok(vm),
            Guest::Running(vm) => {
                (first_entry, first_exit) = (vm.first_entry(), vm.first_exit());
                let _ending = ending(VCPUS_STOP, vm.memory());
                vm.pause()
            }
        });
        if let Ok(vm) = &paused {
            (first_entry, first_exit) = (vm.first_entry(), vm.first_exit());
        }
        // The file is that of an earlier point in time, and may still become complete.
        drop(saving);
        tracker.stop();
        Ok(Ended { end, at, first_entry, first_exit, paused })
    }

    fn stay_paused(&self, vm: Vm) -> Guest {
        self.events.status.set(State::Paused);
        // An interrupt may have come before.
        self.session.interrupt.pauses(vm.handle());
        Guest::Paused(vm)
    }

    fn resume(&self, vm: Vm) -> Result<Guest> {
        self.hold.into_iter().for_each(Hold::release);
        let running = vm.resume()?;
        self.events.status.set(State::Running);
        // Again: resuming has cleared a pause that was requested before.
        self.session.interrupt.pauses(running.handle());
        Ok(Guest::Running(running))
    }

    /// Why the guest does not continue, if it does not.
    fn why_stopped(&self, guest: &Guest) -> Option<Stop> {
        match guest {
            Guest::Running(vm) => vm.wait(Some(Duration::ZERO)),
            Guest::Paused(vm) => vm.breakdown().or_else(|| {
                let interrupted = self.session.interrupt.requested();
                interrupted.then_some(Stop::PauseRequested)
            }),
        }
    }

    fn handle(&self, guest: Guest, command: Command, answer: &Sender<Answer>) -> Result<Next> {
        // The command is done even if the client does not wait for the answer.
        let reply = |what| drop(answer.send(what));
        if let (Command::Resume, Guest::Running(_)) = (&command, &guest) {
            reply(Ok(Done::Plain));
            return Ok(Next::Go(guest));
        }
        let (mut vm, was_running) = match guest.paused() {
            Ok(paused) => paused,
            Err(error) => return Ok(Next::unpaused(error, answer)),
        };
        self.events.status.set(State::Paused);
        let paused_at = Instant::now();
        let (done, go_on, stop) = match command {
            // A reset is handled before.
            Command::Pause | Command::Reset => (Ok(Done::Plain), false, false),
            Command::Resume => (Ok(Done::Plain), true, false),
            Command::Store(request) => {
                self.events.status.storing(Some(Arc::clone(&request.cancelled)));
                let stored = self.store(&mut vm, &request, paused_at);
                self.events.status.storing(None);
                let stop = stored.is_ok() && request.stop;
                let done = stored.map(Done::Stored);
                (done.map_err(|error| Refused::Failed(exit::describe(&error))), was_running, stop)
            }
        };
        let next = if stop {
            Next::End(End::Stored, Ok(Guest::Paused(vm)))
        } else if self.seen.is_done() {
            // The console has requested the end at the moment of the pause.
            Next::End(End::Stopped(Stop::ConsolePause), Ok(Guest::Paused(vm)))
        } else if go_on {
            Next::Go(self.resume(vm)?)
        } else {
            Next::Go(Guest::Paused(vm))
        };
        // At the end, so that the state of the guest agrees with the answer.
        reply(done);
        Ok(next)
    }

    fn store(&self, vm: &mut Vm, request: &StoreRequest, paused_at: Instant) -> Result<Summary> {
        let out = &request.out;
        let (status, interrupt) = (&self.events.status, &self.session.interrupt);
        let progress = progress_of(request, status, interrupt);
        let options = request.options.clone().seal(self.keys.provider()?);
        let written = match request.changes_only {
            false => vm.snapshot(out, &options, &progress),
            true => vm.snapshot_layer(out, &options, &progress),
        };
        let header = written.map_err(snapshot_error)?;
        Ok(Summary::new(out, &header, paused_at, paused_at, paused_at))
    }
}

impl Ended {
    /// Whether the command was successful.
    pub(crate) fn outcome(&self, seen: &Seen, session: &Session) -> Result<()> {
        match &self.paused {
            // A power off is a regular end.
            Err(error) if error.stop == Stop::PowerOff => {}
            Err(error) => return Err(GuestStopped(error.to_string()).into()),
            // While it was paused.
            Ok(_) if let Some(stop) = self.breakdown() => {
                return Err(GuestStopped(stop.to_string()).into());
            }
            Ok(_) if session.interrupt.requested() => return Err(Interrupted.into()),
            Ok(_) => {}
        }
        if let End::Hook(error) = &self.end {
            return Err(anyhow!(pager::with_causes(error)));
        }
        match seen.output_error() {
            Some(error) if error.kind() != ErrorKind::BrokenPipe => {
                let error = match error.raw_os_error() {
                    Some(number) => std::io::Error::from_raw_os_error(number),
                    None => std::io::Error::new(error.kind(), error.to_string()),
                };
                return Err(error).context("cannot write the guest's output");
            }
            _ => {}
        }
        match seen.beats() {
            (beats, bad @ 1..) => Err(anyhow!("{bad} of {beats} beats found wrong pages")),
            _ => Ok(()),
        }
    }

    fn breakdown(&self) -> Option<&Stop> {
        match &self.end {
            End::Stopped(stop) if !stop.is_resumable() && *stop != Stop::PowerOff => Some(stop),
            _ => None,
        }
    }

    /// Why it ended, as text.
    pub(crate) fn describe(&self, seen: &Seen, session: &Session) -> String {
        match &self.end {
            _ if session.interrupt.requested() => "interrupted".into(),
            End::TimeIsUp => "time is up".into(),
            End::Stored => "snapshotted and stopped".into(),
            End::Hook(_) => "the command of --on-restore failed".into(),
            End::Stopped(Stop::ConsolePause) if seen.output_error().is_some() => {
                "the reader of the output has closed it".into()
            }
            End::Stopped(Stop::ConsolePause) if seen.beats().1 > 0 => {
                "done, with wrong pages".into()
            }
            End::Stopped(Stop::ConsolePause) => "done".into(),
            End::Stopped(stop) => stop.to_string(),
        }
    }
}
