//! The arguments of `snap serve`.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use pager::Populate;

use super::access::Access;
use crate::bucket;
use crate::exit::WrongOptions;
use crate::input::Input;
use crate::jailed::ServeJailArgs;
use crate::metrics;
use crate::pager_args::{OnError, PrefetchArg};

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
    pub(super) input: Input,

    /// The socket, or, if FILE is a folder, the folder of the sockets. A socket of a dead server is replaced.
    /// Without this, the socket that a service manager has passed (LISTEN_FDS).
    #[arg(long, value_name = "SOCKET|FOLDER")]
    pub(super) listen: Option<PathBuf>,

    #[command(flatten)]
    pub(super) access: Access,

    /// Record which pages the guests touch, and write a copy of FILE with them as its working set when the last one has
    /// ended. Meanwhile only touched pages are loaded, one at a time, and clones that share memory are refused.
    #[arg(long, requires = "out", conflicts_with_all = ["prefetch", "populate"])]
    pub(super) record: bool,

    /// The file for --record. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap", requires = "record")]
    pub(super) out: Option<PathBuf>,

    /// Send the `snap keep` at this socket the state that lets another server take over the guests if this one dies,
    /// and take over those of a dead server.
    #[arg(long, value_name = "SOCKET")]
    pub(super) keep: Option<PathBuf>,

    /// Answer `GET /metrics` with figures for Prometheus here: a port of 127.0.0.1, or ADDRESS:PORT. Every client that
    /// can connect can read them.
    #[arg(long, value_name = "PORT", value_parser = metrics::parse_address)]
    pub(super) metrics: Option<SocketAddr>,

    /// Load pages before guests touch them. `hot`: those of the file's working set (`snap train` records one), into the
    /// memory that clones share when the first clone connects, and ahead of each other guest; `all`: then all other
    /// pages.
    #[arg(long, value_name = "off|hot|all", default_value = "hot", hide_possible_values = true)]
    pub(super) prefetch: PrefetchArg,

    /// Load pages that guests have not touched in the background. `auto`: while they wait for pages a good part of
    /// their time; `idle`: only while a guest has no faults; `full`: from the start to the end.
    #[arg(
        long,
        value_name = "off|auto|idle|full",
        default_value = "auto",
        hide_possible_values = true
    )]
    pub(super) populate: PopulateArg,

    /// What to do about a page that cannot be read or is damaged.
    #[arg(long, value_name = "POLICY", default_value = "poison")]
    pub(super) on_error: OnError,

    #[command(flatten)]
    pub(super) jail: ServeJailArgs,
}

impl Args {
    /// Checks the options of the jail, and leaves the namespaces of the host if it is strict. For this the process must
    /// have only one thread.
    ///
    /// # Errors
    /// The options contradict each other, or the kernel refuses it.
    pub(crate) fn separate(&self, is_only_thread: bool) -> Result<()> {
        if self.jail.is_special()
            && let Some(what) = self.needs_the_host()
        {
            return Err(impossible(what));
        }
        self.jail.separate(self.access.names_users(), is_only_thread)
    }

    /// What a server that has given up its rights could not do.
    fn needs_the_host(&self) -> Option<&'static str> {
        if self.input.file.is_dir() {
            Some("a folder, whose files and sockets come later: start a server for each file")
        } else if self.record {
            Some("--record, whose output is written when the guests have ended: record without it")
        } else if bucket::is_meant(&self.input.file) || self.input.parents.keys.run_commands() {
            Some(NETWORK)
        } else {
            None
        }
    }
}

/// Why a snapshot is not served in a strict jail.
pub(super) const NETWORK: &str = "object storage, --key-command or --wrap-command: snap pull fetches the snapshot, and \
     --key-file gives a key";

/// What cannot be done in a strict jail.
pub(super) fn impossible(what: &str) -> anyhow::Error {
    WrongOptions(format!("--jail strict, --uid and --gid are not possible with {what}")).into()
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum PopulateArg {
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
