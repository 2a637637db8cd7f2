//! `snap fork`: starts guests that continue from where a running guest is now.

use std::fs::{DirBuilder, File};
use std::io::PipeWriter;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use pager::SnapshotSource;
use pager::serve::{ServeOptions, Server, Socket};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;
use snapfmt::{Codec, Snapshot};
use snapvm::snapshot_name;

use crate::api::client::{self, Kind};
use crate::api::private_socket;
use crate::descriptors::allow_many_descriptors;
use crate::exit::Interrupted;
use crate::leftovers;
use crate::millis::ms;
use crate::session::Session;
use crate::stdout::{print_json, print_line};
use crate::storage::Storage;

/// Start guests that continue from where a running guest is now.
///
/// The guest is paused for milliseconds and then continues. Its children are processes `snap restore --lazy --share`,
/// whose memory this process serves: they share the pages that they only read. Each has a new generation id, an overlay of
/// its own for each disk that has one, and the devices that the options after `--` give it. This process ends when all
/// children have ended. Ctrl-C ends the children, too.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap fork --vm vm.sock -n 3 --log child-{}.log
  snap fork --vm vm.sock -n 3 -- --api child-{}.sock --vsock 10{},child-{}.vsock --for 10s")]
pub(crate) struct Args {
    /// The control socket of the guest.
    #[arg(long, value_name = "SOCKET")]
    vm: PathBuf,

    /// How many children.
    #[arg(short = 'n', long, value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    count: u16,

    /// Write the output of each child to a new file; `{}` is its number, from 0. Otherwise it is discarded.
    #[arg(long, value_name = "FILE")]
    log: Option<String>,

    /// Pause the guest until all of its memory is copied. A guest that shares memory itself needs this.
    #[arg(long)]
    pause: bool,

    /// Print what was done as JSON, when the children have been started.
    #[arg(long)]
    json: bool,

    /// Options of `snap restore` for each child; `{}` is its number.
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// What was done until the children were started.
#[derive(Serialize)]
struct Started {
    /// Until the children could be started.
    cut_ms: f64,
    /// How long the guest was paused.
    pause_ms: f64,
    /// Until the last child was started.
    total_ms: f64,
    /// Their process ids.
    children: Vec<u32>,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    allow_many_descriptors();
    let folder = Folder::new()?;
    let file = folder.0.join("cut.snap");
    // A layer is enough if the snapshot below it is a file here, and not an object in a bucket.
    let diff = client::restored_from(&args.vm)?.is_some_and(|file| file.is_file());
    let kind = Kind { diff, live: !args.pause, stop: false };
    // It is read once, from memory.
    let storage = Storage { codec: Codec::Lz4, no_dedupe: true, ..Storage::default() };
    let cut = client::create(&args.vm, &file, kind, &storage, session)?;
    let snapshot = Arc::new(Snapshot::open_with(&file, &Default::default())?);
    let mut options = ServeOptions::default();
    options.share = Some(snapshot_name(&snapshot));
    let path = folder.0.join("pages.sock");
    let socket = private_socket(&path, || Socket::bind(&path))?;
    let source = Arc::new(SnapshotSource::new(snapshot));
    let server = Server::at(socket, source, options, |_| {})?;
    let cut_ms = ms(session.started.elapsed());

    let (stopped, stop) = std::io::pipe().context("cannot create a pipe")?;
    let children = Children::start(args, &file, &path, session)?;
    let started = Started {
        cut_ms,
        pause_ms: cut.pause_ms,
        total_ms: ms(session.started.elapsed()),
        children: children.0.iter().map(|child| child.process.id()).collect(),
    };
    match (args.json, session.quiet) {
        (true, _) => print_json(&started)?,
        (false, true) => {}
        (false, false) => print_line(format_args!(
            "{}: {} children, {:.1} ms, paused {:.1} ms",
            args.vm.display(),
            args.count,
            started.total_ms,
            started.pause_ms
        ))?,
    }
    let ended = thread::Builder::new().name("children".into()).spawn(|| children.wait(stop))?;
    server.run(stopped.as_fd()).context("cannot serve the children")?;
    let failed = ended.join().unwrap_or_default();
    if session.interrupt.requested() {
        return Err(Interrupted.into());
    }
    match failed.first() {
        None => Ok(()),
        Some((number, status)) => {
            bail!("{} of {} children failed; child {number}: {status}", failed.len(), args.count)
        }
    }
}

/// A private folder in memory, which is removed with this process.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let path = place.join(format!("snap-fork-{}", std::process::id()));
        // Of a process of this number that was killed: a private folder of this user, or this fails.
        let _ = std::fs::remove_dir_all(&path);
        let _creating = leftovers::creating();
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        leftovers::folder(&path);
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is in memory, and private.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The processes of the children. Dropping it ends them.
struct Children(Vec<Running>);

struct Running {
    process: Child,
    /// Held for `Interrupt`, which knows it weakly.
    _pidfd: Arc<OwnedFd>,
}

impl Children {
    fn start(args: &Args, file: &Path, pages: &Path, session: &Session) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find the program itself")?;
        let mut children = Self(Vec::new());
        for number in 0..args.count {
            if session.interrupt.requested() {
                return Err(Interrupted.into());
            }
            let numbered = |text: &String| text.replace("{}", &number.to_string());
            let log = match args.log.as_ref().map(numbered) {
                None => Stdio::null(),
                Some(log) => {
                    let new = File::create_new(&log);
                    new.with_context(|| format!("cannot create {log}"))?.into()
                }
            };
            let mut command = Command::new(&program);
            command.args(["restore", "--quiet", "--lazy", "--share"]).arg(pages).arg(file);
            command.args(args.options.iter().map(numbered)).stdin(Stdio::null()).stdout(log);
            let mut process = command.spawn().context("cannot start a child")?;
            let Ok(pidfd) = pidfd_open(Pid::from_child(&process), PidfdFlags::empty()) else {
                let _ = process.kill();
                let _ = process.wait();
                bail!("cannot watch over a child (pidfd_open)");
            };
            let pidfd = Arc::new(pidfd);
            session.interrupt.reaches(&pidfd);
            children.0.push(Running { process, _pidfd: pidfd });
        }
        Ok(children)
    }

    /// Waits for all of them. Returns the number and the status of those that have failed.
    fn wait(mut self, stop: PipeWriter) -> Vec<(usize, ExitStatus)> {
        let mut failed = Vec::new();
        for (number, child) in self.0.iter_mut().enumerate() {
            if let Ok(status) = child.process.wait()
                && !status.success()
            {
                failed.push((number, status));
            }
        }
        // The server ends.
        drop(stop);
        failed
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended is not killed.
            let _ = child.process.kill();
            let _ = child.process.wait();
        }
    }
}
