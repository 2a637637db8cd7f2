//! Serves each snapshot of a folder at a socket of its own, while files come and go.

use std::collections::BTreeMap;
use std::io::PipeWriter;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pager::SnapshotSource;
use pager::serve::{Server, ServerHandle};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::args::Args;
use super::one::{bind, options, served, server};
use crate::exit::Interrupted;
use crate::input::open;
use crate::interrupt::Guests;
use crate::service;
use crate::session::Session;
use crate::stderr::say;

/// How often the folder is read.
const INTERVAL: Duration = Duration::from_secs(1);

/// The device and the inode of a file.
type Identity = (u64, u64);

/// The server of one snapshot.
struct Running {
    identity: Identity,
    /// Dropping it stops the server.
    stop: Option<PipeWriter>,
    thread: JoinHandle<()>,
    guests: ServerHandle,
}

/// The guests of all servers.
#[derive(Default)]
struct All(Mutex<Vec<ServerHandle>>);

impl Guests for All {
    fn count(&self) -> usize {
        self.servers().iter().map(Guests::count).sum()
    }

    fn kill(&self) {
        self.servers().iter().for_each(Guests::kill);
    }
}

impl All {
    fn servers(&self) -> Vec<ServerHandle> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The servers of a folder.
struct Folder<'a> {
    args: &'a Args,
    quiet: bool,
    sockets: &'a Path,
    running: BTreeMap<PathBuf, Running>,
    /// Servers of files that are gone. They end with their last guest.
    ending: Vec<Running>,
    /// The last reports about files that are not served.
    reports: BTreeMap<PathBuf, String>,
    all: Arc<All>,
}

pub(super) fn run(args: &Args, session: &Session) -> Result<()> {
    let Some(sockets) = args.listen.as_deref().filter(|sockets| sockets.is_dir()) else {
        bail!("{} is a folder: --listen must be a folder, too", args.input.file.display());
    };
    if args.record {
        bail!("--record takes one snapshot, and {} is a folder", args.input.file.display());
    }
    if args.metrics.is_some() {
        bail!(
            "--metrics takes the figures of one snapshot, and {} is a folder",
            args.input.file.display()
        );
    }
    let (stopped, stop) = std::io::pipe().context("cannot create a pipe")?;
    let all = Arc::new(All::default());
    let guests: Arc<dyn Guests> = Arc::<All>::clone(&all);
    session.interrupt.stops(Some(guests), stop);
    let mut folder = Folder {
        args,
        quiet: session.quiet,
        sockets,
        running: BTreeMap::new(),
        ending: Vec::new(),
        reports: BTreeMap::new(),
        all,
    };
    folder.update()?;
    if !session.quiet {
        let files = folder.running.len();
        let (from, to) = (args.input.file.display(), sockets.display());
        say(&format!("serving {files} snapshots of {from} in {to}\n"));
    }
    service::Manager::connect().ready();
    let interval = Timespec::try_from(INTERVAL).ok();
    while !session.interrupt.requested() {
        let mut fds = [PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut fds, interval.as_ref()) {
            Ok(0) => {
                // A folder that cannot be read now is read again; its servers continue.
                if let Err(error) = folder.update() {
                    folder.report(&args.input.file, &error);
                }
            }
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot serve"),
        }
    }
    folder.end();
    match session.interrupt.requested() {
        true => Err(Interrupted.into()),
        false => Ok(()),
    }
}

impl Folder<'_> {
    /// Starts servers of new files, and stops those of files that are gone or were replaced.
    fn update(&mut self) -> Result<()> {
        let mut files = snapshots(&self.args.input.file)?;
        let stay =
            |file: &PathBuf, running: &mut Running| files.get(file) == Some(&running.identity);
        let gone: Vec<_> =
            self.running.extract_if(.., |file, running| !stay(file, running)).collect();
        for (file, mut server) in gone {
            server.stop = None;
            self.ending.push(server);
            // Its socket gets free in a moment: the next time a file of this name is served.
            files.remove(&file);
        }
        self.ending.retain(|server| !server.thread.is_finished());
        self.reports.retain(|file, _| files.contains_key(file));
        for (file, identity) in files {
            if self.running.contains_key(&file) {
                continue;
            }
            match self.start(&file, identity) {
                Ok(server) => {
                    self.reports.remove(&file);
                    self.running.insert(file, server);
                }
                Err(error) => self.report(&file, &error),
            }
        }
        let servers = self.running.values().chain(&self.ending);
        let handles = servers.map(|server| server.guests.clone()).collect();
        *self.all.0.lock().unwrap_or_else(PoisonError::into_inner) = handles;
        Ok(())
    }

    fn start(&self, file: &Path, identity: Identity) -> Result<Running> {
        let snapshot = Arc::new(open(file, &self.args.input.parents)?);
        let options = options(self.args, file, &snapshot)?;
        let mut name = file.file_stem().context("it has no name")?.to_owned();
        name.push(".sock");
        let path = self.sockets.join(name);
        let socket = bind(&path, self.args, &options)?;
        let source = Arc::new(SnapshotSource::new(Arc::clone(&snapshot)));
        let (stopped, stop) = std::io::pipe().context("cannot create a pipe")?;
        let own = file.to_owned();
        let (give, take) = mpsc::channel::<Server>();
        let serve = move || {
            // Without a server, it was not made.
            let Ok(server) = take.recv() else { return };
            if let Err(error) = server.run(stopped.as_fd()) {
                say(&format!("snap: {} is not served any more: {error}\n", own.display()));
            }
        };
        // Before the server is made: from then on it serves the guests of a dead one, and has to be waited for.
        let thread = thread::Builder::new().name("server".into()).spawn(serve);
        let thread = thread.context("cannot start a thread")?;
        let server = server(file, source, socket, options, self.quiet)?;
        let guests = server.handle();
        // The thread receives until this sender is dropped.
        let _ = give.send(server);
        if !self.quiet {
            say(&format!("serving {} at {}\n", served(file, &snapshot), path.display()));
        }
        Ok(Running { identity, stop: Some(stop), thread, guests })
    }

    /// Reports why a file is not served, once.
    fn report(&mut self, file: &Path, error: &anyhow::Error) {
        let line = format!("snap: {} is not served: {error:#}\n", file.display());
        if self.reports.get(file) != Some(&line) {
            say(&line);
            self.reports.insert(file.to_owned(), line);
        }
    }

    /// Accepts no more guests, and waits for the last one to end.
    fn end(mut self) {
        self.running.values_mut().for_each(|server| server.stop = None);
        for server in self.running.into_values().chain(self.ending) {
            // A panic was printed by its thread.
            let _ = server.thread.join();
        }
    }
}

/// The files NAME.snap of a folder.
fn snapshots(folder: &Path) -> Result<BTreeMap<PathBuf, Identity>> {
    let failed = || format!("cannot read the folder {}", folder.display());
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        if path.extension().is_none_or(|extension| extension != "snap") {
            continue;
        }
        // A file that is gone by now is not served.
        if let Ok(found) = path.metadata()
            && found.is_file()
        {
            files.insert(path, (found.dev(), found.ino()));
        }
    }
    Ok(files)
}
