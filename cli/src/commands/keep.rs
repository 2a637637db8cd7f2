//! `snap keep`: holds the state that lets another page server take over guests.

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
use crate::jailed::ServerJailArgs;
use crate::service;
use crate::session::Session;
use crate::stderr::say;

/// Keep guests alive whose page server dies, until another one takes them over.
///
/// `snap serve --keep SOCKET` sends this process duplicates of the descriptors of its guests. When a server dies for
/// any reason, its guests wait at their next missing page, and new ones at its socket, of which this process has a
/// duplicate. The next `snap serve --keep SOCKET` of the same snapshot
/// takes them over, and they do not notice. Ctrl-C: ends, and kills the guests that have no server.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap keep --listen keep.sock &
  while ! snap serve demo.snap --listen pages.sock --keep keep.sock; do sleep 0.1; done")]
pub(crate) struct Args {
    /// The socket, for servers of this user only. A socket of a dead keeper is replaced.
    #[arg(long, value_name = "SOCKET")]
    listen: PathBuf,

    /// How long guests wait for a server. After that their missing pages fail, by the --on-error of the dead server; a
    /// later server loads those that have not failed yet.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    patience: Duration,

    #[command(flatten)]
    pub(crate) jail: ServerJailArgs,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let mut options = KeepOptions::default();
    options.takeover_timeout = args.patience;
    let quiet = session.quiet;
    let bind = || {
        Keeper::bind(&args.listen, options, move |event| {
            // If the reader of stderr does not read, guests are served anyway.
            message(&event, quiet).iter().for_each(|line| say(line));
        })
    };
    let keeper = private_socket(&args.listen, bind)?;
    allow_many_descriptors();
    let (stopped, stop) = std::io::pipe().context("cannot create a pipe")?;
    session.interrupt.stops(None, stop);
    let manager = service::Manager::connect();
    args.jail.close(None, &session.interrupt)?;
    if !quiet {
        let line = format!("keeping at {}\n", args.listen.display());
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    manager.ready();
    let killed = keeper.run(stopped.as_fd()).context("cannot keep")?;
    if killed > 0 {
        let line = format!("snap: {killed} guests without a server were killed\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    Err(Interrupted.into())
}

/// The message of an event. With --quiet only events that harm guests have one.
fn message(event: &KeepEvent<'_>, quiet: bool) -> Option<String> {
    Some(match event {
        KeepEvent::GivenUp { guests, killed } => {
            let mut text =
                format!("snap: no server has taken over: missing pages of {guests} guests fail");
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
            format!("server {server}: has ended, {guests} guests wait\n")
        }
        KeepEvent::TakenOver { server, guests } => {
            format!("server {server}: has taken over {guests} guests\n")
        }
        _ => return None,
    })
}
