//! `snap fork`: starts guests that continue from where a running guest is now.

mod children;
mod folder;
mod guest_pages;

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail};
use pager::SnapshotSource;
use pager::serve::{ServeOptions, Server, Socket};
use serde::Serialize;
use snapfmt::{Codec, ReadError, Snapshot};
use snapvm::snapshot_name;

use crate::api::client::{self, Kind};
use crate::api::private_socket;
use crate::descriptors::allow_many_descriptors;
use crate::exit::Interrupted;
use crate::input;
use crate::interrupt::Interrupt;
use crate::jailed::PartialJailArgs;
use crate::keys::KeyArgs;
use crate::millis::ms;
use crate::session::Session;
use crate::stdout::{print_json, print_line};
use crate::storage::Storage;
use children::{Children, Wanted};
use folder::Folder;
use guest_pages::GuestPages;

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

    #[command(flatten)]
    keys: KeyArgs,

    /// Print what was done as JSON, when the children have been started.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    jail: PartialJailArgs,

    /// Options of `snap restore` for each child; `{}` is its number. Each child has a jail of its own.
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
    /// Until all memory of the guest was copied, and the last child was started.
    copied_ms: f64,
    /// Their process ids.
    children: Vec<u32>,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    args.keys.check_children_can_read()?;
    allow_many_descriptors();
    let folder = Folder::new()?;
    let file = folder.join("cut.snap");
    let Cut { pause_ms, snapshot, deferred } = cut(args, &file, session)?;
    let snapshot = Arc::new(snapshot);
    let mut copying = deferred.then(|| GuestPages::start(&args.vm, &snapshot)).transpose()?;
    let mut options = ServeOptions::default();
    options.share = Some(snapshot_name(&snapshot));
    let path = folder.join("pages.sock");
    let socket = private_socket(&path, || Socket::bind(&path))?;
    let source = match &copying {
        Some(copying) => copying.as_source(),
        None => Arc::new(SnapshotSource::new(snapshot)),
    };
    let server = Server::at(socket, source, options, |_| {})?;
    let cut_ms = ms(session.started.elapsed());

    // Before the first child, which waits for it only for a limited time.
    let serving = Serving::start(server, &args.jail, &session.interrupt)?;
    let keys = args.keys.options();
    let wanted =
        Wanted { count: args.count, log: args.log.as_deref(), keys: &keys, options: &args.options };
    let mut children = Children::start(&wanted, &file, &path, session)?;
    let total_ms = ms(session.started.elapsed());
    // From then on the children do not need the guest, and it takes other requests.
    copying.iter_mut().try_for_each(|copying| copying.wait(session))?;
    let copied_ms = ms(session.started.elapsed());
    let started = Started { cut_ms, pause_ms, total_ms, copied_ms, children: children.ids() };
    match (args.json, session.quiet) {
        (true, _) => print_json(&started)?,
        (false, true) => {}
        (false, false) => print_line(format_args!(
            "{}: {} {}, {:.1} ms, paused {:.1} ms",
            args.vm.display(),
            args.count,
            if args.count == 1 { "child" } else { "children" },
            started.total_ms,
            started.pause_ms
        ))?,
    }
    let failed = children.wait(serving.ended.as_fd())?;
    // Without a server they would wait for their pages.
    drop(children);
    serving.end()?;
    if session.interrupt.requested() {
        return Err(Interrupted.into());
    }
    let Some(failed) = failed else { bail!("the server of the children has ended") };
    match failed.first() {
        None => Ok(()),
        Some((number, status)) => {
            bail!("{} of {} children failed; child {number}: {status}", failed.len(), args.count)
        }
    }
}

/// The guest at one point in time.
struct Cut {
    pause_ms: f64,
    snapshot: Snapshot,
    /// The guest adds its memory to the file.
    deferred: bool,
}

/// Snapshots the guest to `file`. A layer is enough if it opens here, as it then does for the children. It does not if
/// the snapshot that the guest was restored from is in a bucket, was replaced, or was found by an option of the guest.
fn cut(args: &Args, file: &Path, session: &Session) -> Result<Cut> {
    let files = client::guest_files(&args.vm)?;
    files.check_key(&args.vm, &args.keys)?;
    if files.sealed && !args.keys.is_given() {
        // The children could not read the cut.
        let of_guest = format!("the files of the guest at {}", args.vm.display());
        return Err(anyhow::Error::new(ReadError::KeyNeeded).context(of_guest));
    }
    let parent = files.restored_from;
    let has_parent = parent.as_ref().is_some_and(|file| file.is_file());
    let mut ways = vec![Way::Whole { diff: false }];
    if has_parent {
        ways.insert(0, Way::Whole { diff: true });
    }
    if !args.pause && (has_parent || parent.is_none()) {
        ways.insert(0, Way::Deferred);
    }
    let last = ways.len() - 1;
    for way in &ways[..last] {
        let made = way.cut(args, file, session);
        if made.is_ok() || session.interrupt.requested() {
            return made;
        }
        match std::fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", file.display()));
            }
            _ => {}
        }
    }
    ways[last].cut(args, file, session)
}

/// How a cut is made.
enum Way {
    /// Memory is added to the file while children use it.
    Deferred,
    Whole {
        diff: bool,
    },
}

impl Way {
    fn cut(&self, args: &Args, file: &Path, session: &Session) -> Result<Cut> {
        let storage = Storage { codec: Codec::Lz4, no_dedupe: true, ..Storage::default() };
        let summary = match *self {
            Way::Deferred => {
                // A child often needs the pages around one that it needs.
                let storage = Storage { chunk_pages: 16, ..storage };
                client::create_deferred(&args.vm, file, &storage, session)?
            }
            Way::Whole { diff } => {
                let kind = Kind { diff, live: !args.pause, stop: false };
                client::create(&args.vm, file, kind, &storage, session)?
            }
        };
        let deferred = matches!(self, Way::Deferred);
        let snapshot = input::open(file, &args.keys.clone().into());
        if snapshot.is_err() && deferred {
            // Until the copy has ended, the guest takes no other snapshot. If it does not answer, the next request fails.
            let _ = client::cancel_pages(&args.vm, &summary.id);
        }
        Ok(Cut { pause_ms: summary.pause_ms, snapshot: snapshot?, deferred })
    }
}

/// The thread that serves the children's pages. It ends when this is dropped and no child needs it any more.
struct Serving {
    stop: PipeWriter,
    /// Hung up when the thread has ended.
    ended: PipeReader,
    thread: JoinHandle<io::Result<()>>,
}

impl Serving {
    /// The thread is jailed, and so are those that it starts. This one is not: it starts the children.
    fn start(server: Server, jail: &PartialJailArgs, interrupt: &Interrupt) -> Result<Self> {
        let (stopped, stop) = io::pipe().context("cannot create a pipe")?;
        let (ended, ending) = io::pipe().context("cannot create a pipe")?;
        let (entered, jailed) = mpsc::channel();
        let (jail, interrupt) = (jail.clone(), interrupt.clone());
        let serve = move || {
            let _ending = ending;
            let result = jail.close_server(&interrupt);
            let may_serve = result.is_ok();
            let _ = entered.send(result);
            if may_serve { server.run(stopped.as_fd()) } else { Ok(()) }
        };
        let thread = thread::Builder::new().name("pages".into()).spawn(serve);
        let thread = thread.context("the thread that serves the children cannot be started")?;
        jailed.recv().context("the thread that serves the children has ended")??;
        Ok(Self { stop, ended, thread })
    }

    /// After the children have ended.
    fn end(self) -> Result<()> {
        drop(self.stop);
        match self.thread.join() {
            Ok(served) => served.context("cannot serve the children"),
            // A panic in the thread has been printed already.
            Err(_) => bail!("the thread that serves the children panicked"),
        }
    }
}
