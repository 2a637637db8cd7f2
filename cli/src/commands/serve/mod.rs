//! `snap serve`: serves memory to guests of other programs.

mod access;
mod events;
mod folder;
mod recording;

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use pager::serve::{KeepAt, KeeperLink, Prefetched, ServeEvent, ServeOptions, Server, Socket};
use pager::{PageSource, Populate, SnapshotSource, keep};
use snapfmt::Snapshot;
use snapvm::interchange::has_async_page_faults;
use snapvm::{remote_fault_overhead, snapshot_name, with_causes, working_set_pages};

use self::access::Access;
use self::recording::Recording;
use crate::api::private_socket;
use crate::awaited_source::AwaitedSource;
use crate::descriptors::allow_many_descriptors;
use crate::exit::Interrupted;
use crate::input::{Input, reading};
use crate::pager_args::{OnError, PrefetchArg};
use crate::service;
use crate::session::Session;
use crate::stderr::{self, say};
use crate::waits::{Wait, Waiting};
use crate::{metrics, size};

/// Serve a snapshot's memory to guests of Firecracker, and to clones that share it.
///
/// Listens at a unix socket that only this user can connect to (unless --allow-uid, --allow-gid, --socket-owner and
/// --socket-mode say otherwise), and loads pages when a guest touches them, for any
/// number of guests. Firecracker loads its snapshot with `mem_backend` of the type `Uffd` and this socket as
/// `backend_path`. `snap restore --lazy --share SOCKET` makes clones that share the pages that they do not write to.
/// If FILE is a folder, each NAME.snap in it is served at NAME.sock in the folder of --listen; files may be added and
/// removed meanwhile.
/// Ctrl-C: accepts no new guests, and ends when the last one has ended; again: kills guests that still need pages,
/// unless a keeper has them.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap import mem --vmstate state -o fc.snap && snap serve fc.snap --listen /run/user/1000/fc.sock
  snap serve fc.snap --listen fc.sock --record -o trained.snap && snap optimize trained.snap -o fast.snap
  snap serve /srv/snapshots --listen /run/user/1000/pages
  snap serve fc.snap --listen /srv/jailer/firecracker/a/root/mem.sock --allow-uid 123 --socket-owner 123:100")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// The socket, or, if FILE is a folder, the folder of the sockets. A socket of a dead server is replaced.
    /// Without this, the socket that a service manager has passed (LISTEN_FDS).
    #[arg(long, value_name = "SOCKET|FOLDER")]
    listen: Option<PathBuf>,

    #[command(flatten)]
    access: Access,

    /// Record which pages the guests touch, and write a copy of FILE with them as its working set when the last one has
    /// ended. Meanwhile only touched pages are loaded, one at a time, and clones that share memory are refused.
    #[arg(long, requires = "out", conflicts_with_all = ["prefetch", "populate"])]
    record: bool,

    /// The file for --record. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap", requires = "record")]
    out: Option<PathBuf>,

    /// Send the `snap keep` at this socket the state that lets another server take over the guests if this one dies,
    /// and take over those of a dead server.
    #[arg(long, value_name = "SOCKET")]
    keep: Option<PathBuf>,

    /// Answer `GET /metrics` with figures for Prometheus here: a port of 127.0.0.1, or ADDRESS:PORT. Every client that
    /// can connect can read them.
    #[arg(long, value_name = "PORT", value_parser = metrics::parse_address)]
    metrics: Option<SocketAddr>,

    /// Load pages before guests touch them. `hot`: those of the file's working set (`snap train` records one), into the
    /// memory that clones share when the first clone connects, and ahead of each other guest; `all`: then all other
    /// pages.
    #[arg(long, value_name = "off|hot|all", default_value = "hot", hide_possible_values = true)]
    prefetch: PrefetchArg,

    /// Load pages that guests have not touched in the background. `auto`: while they wait for pages a good part of
    /// their time; `idle`: only while a guest has no faults; `full`: from the start to the end.
    #[arg(
        long,
        value_name = "off|auto|idle|full",
        default_value = "auto",
        hide_possible_values = true
    )]
    populate: PopulateArg,

    /// What to do about a page that cannot be read or is damaged.
    #[arg(long, value_name = "POLICY", default_value = "poison")]
    on_error: OnError,
}

#[derive(Clone, Copy, ValueEnum)]
enum PopulateArg {
    Off,
    Auto,
    Idle,
    Full,
}

impl From<PopulateArg> for Populate {
    fn from(arg: PopulateArg) -> Populate {
        match arg {
            PopulateArg::Off => Populate::Off,
            PopulateArg::Auto => Populate::Auto,
            PopulateArg::Idle => Populate::Idle,
            PopulateArg::Full => Populate::Full,
        }
    }
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    args.access.check()?;
    if args.input.file.is_dir() {
        return folder::run(args, session);
    }
    let snapshot = Arc::new(args.input.open()?);
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
    let server = server(&args.input.file, source, socket, options, session.quiet)?;
    allow_many_descriptors();
    let metrics = args.metrics.map(|at| metrics::serve(at, server.handle())).transpose()?;
    let (stopped, stop) = std::io::pipe().context("cannot create a pipe")?;
    session.interrupt.stops(Some(Arc::new(server.handle())), stop);
    if !session.quiet {
        let figures =
            metrics.map_or(String::new(), |at| format!(", figures at http://{at}/metrics"));
        let served = served(&args.input.file, &snapshot);
        stderr::print(&format!("serving {served} at {listening}{figures}\n"));
    }
    service::ready();
    server.run(stopped.as_fd()).context("cannot serve")?;
    if let Some(recording) = recording {
        recording.write(&snapshot, session)?;
    }
    match session.interrupt.requested() {
        true => Err(Interrupted.into()),
        false => Ok(()),
    }
}

/// The memory of a snapshot, for messages.
fn served(file: &Path, snapshot: &Snapshot) -> String {
    format!("{} of {}", size::human(snapshot.header().memory_bytes), file.display())
}

fn options(args: &Args, file: &Path, snapshot: &Arc<Snapshot>) -> Result<ServeOptions> {
    let _reading_set = reading(file);
    let mut options = ServeOptions::default();
    options.on_error = args.on_error.into();
    options.share = Some(snapshot_name(snapshot));
    options.populate = args.populate.into();
    let halts = has_async_page_faults(snapshot)?;
    options.fault_overhead = halts.then_some(HALT).or_else(|| remote_fault_overhead(snapshot));
    options.prefetch = prefetched(args.prefetch, snapshot);
    let keep_at =
        |socket: &PathBuf| KeepAt { socket: socket.clone(), snapshot: snapshot_name(snapshot) };
    options.keep = args.keep.as_ref().map(keep_at);
    options.allow = args.access.allowed();
    Ok(options)
}

/// A server of one snapshot, which prints its events.
fn server(
    file: &Path,
    source: Arc<dyn PageSource>,
    socket: Socket,
    options: ServeOptions,
    quiet: bool,
) -> Result<Server> {
    let _answering = answering(&options);
    let source = Arc::new(AwaitedSource::new(source, file));
    let advised = AtomicBool::new(options.fault_overhead != Some(HALT) || quiet);
    let file = file.display().to_string();
    let server = Server::at(socket, source, options, move |event| {
        if let ServeEvent::Served { .. } = event
            && !advised.swap(true, Ordering::Relaxed)
        {
            say(ADVICE);
        }
        // If the reader of stderr does not read, guests are served anyway.
        events::message(&file, &event, quiet).iter().for_each(|line| say(line));
    })?;
    Ok(server)
}

/// The keeper may be slow.
fn answering(options: &ServeOptions) -> Option<Waiting> {
    let keeper = options.keep.as_ref()?.socket.clone();
    let keeper = move || format!("the keeper at {} to answer", keeper.display());
    Some(Wait::new(keeper).at_most(keep::ANSWER_TIMEOUT).begin())
}

/// The socket of --listen, or the one that was passed.
fn socket(args: &Args, options: &ServeOptions) -> Result<Socket> {
    let path = match (service::passed_socket()?, &args.listen) {
        (None, Some(path)) => path,
        (Some(listener), None) => {
            return Socket::passed(listener).context("the passed socket cannot be used");
        }
        (Some(_), Some(_)) => {
            bail!("--listen: the service manager has passed a socket already (LISTEN_FDS)")
        }
        (None, None) => {
            bail!("give the socket by --listen SOCKET; none was passed by a service manager")
        }
    };
    bind(path, args, options)
}

/// A new socket, or that of a dead server with the clients that wait there.
fn bind(path: &Path, args: &Args, options: &ServeOptions) -> Result<Socket> {
    let keeper = {
        let _answering = answering(options);
        KeeperLink::connect(options, path)?
    };
    let access = args.access.socket();
    private_socket(path, || match keeper {
        Some(keeper) => keeper.bind(access),
        None => Socket::bind_for(path, access),
    })
}

/// The cost of a fault for a guest with KVM's asynchronous page faults: it halts, and "page ready" comes late.
const HALT: Duration = Duration::from_millis(8);
const ADVICE: &str = "\
this guest has KVM's asynchronous page faults switched on: each page that it waits for may cost it milliseconds, so all \
is loaded from its first fault on. Boot it with `no-kvmapf`, or load a vmstate of `snap export --format firecracker \
--no-async-pf` (docs/serving.md)\n";

/// The pages to load before they are touched, if any. A damaged working set is reported once, and not used.
fn prefetched(which: PrefetchArg, snapshot: &Arc<Snapshot>) -> Option<Prefetched> {
    let hot = match which {
        PrefetchArg::Off => return None,
        PrefetchArg::Hot | PrefetchArg::All => working_set_pages(snapshot),
    };
    let mut pages = hot.unwrap_or_else(|error| {
        let line = format!("snap: the working set is not used: {}\n", with_causes(&error));
        stderr::print(&line);
        Vec::new()
    });
    if which == PrefetchArg::All {
        pages.push(0..snapshot.header().memory_bytes);
    }
    (!pages.is_empty()).then(|| Prefetched::new(move || pages.clone()))
}
