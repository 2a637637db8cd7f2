//! A guest that runs until something ends it, and how that counts.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use vmm::{PauseError, PausedVm, Stop};

use crate::commands::Session;
use crate::exit::{GuestStopped, Interrupted};
use crate::guest_console::{Seen, Until};

/// When a run ends that nobody interrupts.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct EndArgs {
    /// End when the guest has written this.
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) until: Option<String>,

    /// End after this long.
    #[arg(long = "for", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) run_for: Option<Duration>,
}

impl EndArgs {
    pub(crate) fn until(&self) -> Until {
        Until { lines: None, pattern: self.until.clone().map(String::into_bytes) }
    }
}

/// A guest that does not run any more.
pub(crate) struct Ended {
    /// Why; `None` when its time was up.
    pub(crate) stop: Option<Stop>,
    /// When.
    pub(crate) at: Instant,
    pub(crate) first_entry: Option<Instant>,
    pub(crate) first_exit: Option<Instant>,
    pub(crate) paused: Result<PausedVm, PauseError>,
}

/// Runs the guest until it stops, is stopped by its console or by an interrupt, or its time is up.
pub(crate) fn run(vm: PausedVm, run_for: Option<Duration>, session: &Session) -> Result<Ended> {
    let running = vm.resume()?;
    // Again: resuming has forgotten a pause that was asked for before it.
    session.interrupt.pauses(running.handle());
    let stop = running.wait(run_for);
    let at = Instant::now();
    let (first_entry, first_exit) = (running.first_entry(), running.first_exit());
    Ok(Ended { stop, at, first_entry, first_exit, paused: running.pause() })
}

impl Ended {
    /// Whether the command has done what it was asked for.
    pub(crate) fn outcome(&self, seen: &Seen, session: &Session) -> Result<()> {
        match &self.paused {
            // Off is how a guest ends well.
            Err(error) if error.stop == Stop::PowerOff => {}
            Err(error) => return Err(GuestStopped(error.to_string()).into()),
            Ok(_) if session.interrupt.requested() => return Err(Interrupted.into()),
            Ok(_) => {}
        }
        match seen.output_error() {
            Some(error) if error.kind() != ErrorKind::BrokenPipe => {
                return Err(anyhow!("cannot write the guest's output: {error}"));
            }
            _ => {}
        }
        match seen.beats() {
            (beats, bad @ 1..) => Err(anyhow!("{bad} of {beats} beats found wrong pages")),
            _ => Ok(()),
        }
    }

    /// Why it ended, for people.
    pub(crate) fn describe(&self, seen: &Seen, session: &Session) -> String {
        match &self.stop {
            _ if session.interrupt.requested() => "interrupted".into(),
            None => "time is up".into(),
            Some(Stop::ConsolePause) if seen.output_error().is_some() => {
                "nobody takes the output any more".into()
            }
            Some(Stop::ConsolePause) if seen.beats().1 > 0 => "done, with wrong pages".into(),
            Some(Stop::ConsolePause) => "done".into(),
            Some(stop) => stop.to_string(),
        }
    }
}
