//! `snap keep`: hold what page servers need to go on after their death.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use pager::keep::{KeepEvent, KeepOptions, Keeper};
use snapvm::with_causes;

use crate::api::private_socket;
use crate::descriptors::allow_many_descriptors;
use crate::exit::Interrupted;
use crate::session::Session;
use crate::stderr::say;

/// Keep guests alive whose page server dies, until another one goes on with them.
///
/// `snap serve --keep SOCKET` gives this process duplicates of what it has of its guests. When a server dies, however
/// it does, its guests wait at their next missing page; the next `snap serve --keep SOCKET` of the same snapshot goes on
/// with them, and they never notice. Ctrl-C: ends, and kills the guests that have no server.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap keep --listen keep.sock &
  while ! snap serve demo.snap --listen pages.sock --keep keep.sock; do sleep 0.1; done")]
pub(crate) struct Args {
    /// The socket, for servers of this user only. One that a dead keeper has left is replaced.
    #[arg(long, value_name = "SOCKET")]
    listen: PathBuf,

    /// How long guests wait for a server. After that their missing pages fail, by the --on-error of the
    /// server that has died; a server that comes later brings those that have not failed yet.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    patience: Duration,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let mut options = KeepOptions::default();
    options.takeover_timeout = args.patience;
    let quiet = session.quiet;
    let bind = || {
        Keeper::bind(&args.listen, options, move |event| {
            // A reader of stderr that takes nothing is no reason to leave guests alone.
            told(&event, quiet).iter().for_each(|line| say(line));
        })
    };
    let keeper = private_socket(&args.listen, bind)?;
    allow_many_descriptors();
    let (stopped, stop) = std::io::pipe().context("cannot make a pipe")?;
    session.interrupt.stops(None, stop);
    if !quiet {
        let line = format!("keeping at {}\n", args.listen.display());
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    let killed = keeper.run(stopped.as_fd()).context("cannot keep")?;
    if killed > 0 {
        let line = format!("snap: {killed} guests without a server were killed\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    Err(Interrupted.into())
}

/// What is said of an event: what is bad for guests also to those who want it quiet.
fn told(event: &KeepEvent<'_>, quiet: bool) -> Option<String> {
    Some(match event {
        KeepEvent::GivenUp { guests, killed } => {
            let mut text =
                format!("snap: no server has come back: {guests} guests lack their pages");
            killed.iter().for_each(|why| text = format!("{text}; one was killed: {why}"));
            text + "\n"
        }
        KeepEvent::Refused { error } => {
            format!("snap: a server is refused: {}\n", with_causes(error))
        }
        KeepEvent::Accept { error } => format!("snap: cannot accept: {error}\n"),
        _ if quiet => return None,
        KeepEvent::Connected { server } => format!("server {server}: connected\n"),
        KeepEvent::Lost { server, guests } => {
            format!("server {server}: gone, {guests} guests wait\n")
        }
        KeepEvent::TakenOver { server, guests } => {
            format!("server {server}: goes on with {guests} guests\n")
        }
        _ => return None,
    })
}
