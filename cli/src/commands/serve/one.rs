//! The server of one snapshot.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use pager::serve::{KeepAt, KeeperLink, Prefetched, ServeEvent, ServeOptions, Server, Socket};
use pager::{PageSource, keep};
use snapfmt::Snapshot;
use snapvm::interchange::has_async_page_faults;
use snapvm::{remote_fault_overhead, snapshot_name, with_causes, working_set_pages};

use super::args::Args;
use super::events;
use crate::api::private_socket;
use crate::awaited_source::AwaitedSource;
use crate::input::reading;
use crate::pager_args::PrefetchArg;
use crate::size;
use crate::stderr::{self, say};
use crate::waits::{Wait, Waiting};

/// The memory of a snapshot, for messages.
pub(super) fn served(file: &Path, snapshot: &Snapshot) -> String {
    format!("{} of {}", size::human(snapshot.header().memory_bytes), file.display())
}

pub(super) fn options(args: &Args, file: &Path, snapshot: &Arc<Snapshot>) -> Result<ServeOptions> {
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
pub(super) fn server(
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

/// A new socket, or that of a dead server with the clients that wait there.
pub(super) fn bind(path: &Path, args: &Args, options: &ServeOptions) -> Result<Socket> {
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

/// The socket that a service manager has passed.
pub(super) fn passed(listener: UnixListener, options: &ServeOptions) -> Result<Socket> {
    let _answering = answering(options);
    Socket::passed_for(listener, options).context("the passed socket cannot be used")
}

/// The cost of a fault for a guest with KVM's asynchronous page faults: it halts, and "page ready" comes late.
const HALT: Duration = Duration::from_millis(8);
const ADVICE: &str = "\
this guest has KVM's asynchronous page faults switched on: each page that it waits for may cost it milliseconds, so all \
is loaded from its start on. Boot it with `no-kvmapf`, or load a vmstate of `snap export --format firecracker \
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
