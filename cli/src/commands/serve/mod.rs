//! `snap serve`: serves memory to guests of other programs.

mod access;
mod args;
mod events;
mod folder;
mod one;
mod recording;

use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use pager::serve::{ServeOptions, Socket};
use pager::{PageSource, Populate, SnapshotSource};

pub(crate) use self::args::Args;
use self::one::{bind, options, passed, served, server};
use self::recording::Recording;
use crate::descriptors::allow_many_descriptors;
use crate::exit::Interrupted;
use crate::session::Session;
use crate::{jailed, metrics, service, stderr};

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    args.access.check(args.jail.user())?;
    // Before the guests of a dead server are taken over: each needs some.
    allow_many_descriptors();
    if args.input.file.is_dir() {
        return folder::run(args, session);
    }
    let snapshot = Arc::new(args.input.open()?);
    let needs_network = jailed::uses_network(&snapshot);
    if needs_network && args.jail.is_special() {
        return Err(args::impossible(args::NETWORK));
    }
    let mut options = options(args, &args.input.file, &snapshot)?;
    let recording = args.out.as_deref().map(|out| Recording::new(out, &snapshot)).transpose()?;
    if recording.is_some() {
        // What is loaded before it is touched is not recorded.
        (options.share, options.prefetch, options.populate) = (None, None, Populate::Off);
    }
    let socket = socket(args, &options)?;
    let listening = socket.path().display().to_string();
    let source = Arc::new(SnapshotSource::new(Arc::clone(&snapshot)));
    let source: Arc<dyn PageSource> = match &recording {
        Some(recording) => recording.of(source),
        None => source,
    };
    let metrics = args.metrics.map(metrics::listen).transpose()?;
    let manager = service::Manager::connect();
    // A recording is written into a file at the end.
    if recording.is_none() && !needs_network {
        args.jail.close(&snapshot, &session.interrupt)?;
    }
    let server = server(&args.input.file, source, socket, options, session.quiet)?;
    let metrics = metrics.map(|listener| metrics::serve(listener, server.handle())).transpose()?;
    let (stopped, stop) = std::io::pipe().context("cannot create a pipe")?;
    session.interrupt.stops(Some(Arc::new(server.handle())), stop);
    if !session.quiet {
        let figures =
            metrics.map_or(String::new(), |at| format!(", figures at http://{at}/metrics"));
        let served = served(&args.input.file, &snapshot);
        stderr::print(&format!("serving {served} at {listening}{figures}\n"));
    }
    manager.ready();
    server.run(stopped.as_fd()).context("cannot serve")?;
    if let Some(recording) = recording {
        recording.write(&snapshot, session)?;
    }
    match session.interrupt.requested() {
        true => Err(Interrupted.into()),
        false => Ok(()),
    }
}

/// The socket of --listen, or the one that was passed.
fn socket(args: &Args, options: &ServeOptions) -> Result<Socket> {
    let path = match (service::passed_socket()?, &args.listen) {
        (None, Some(path)) => path,
        (Some(listener), None) => return passed(listener, options),
        (Some(_), Some(_)) => {
            bail!("--listen: the service manager has passed a socket already (LISTEN_FDS)")
        }
        (None, None) => {
            bail!("give the socket by --listen SOCKET; none was passed by a service manager")
        }
    };
    bind(path, args, options)
}
