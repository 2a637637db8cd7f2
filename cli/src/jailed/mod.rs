//! `--jail`: which threads of this process are jailed, and when. See docs/jail.md.

mod guest;
mod partial;
mod server;

use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use jail::{Access, Files, Identity, Limits, Role};
use snapfmt::Snapshot;

pub(crate) use self::guest::{GuestJailArgs, Jail, Needs};
pub(crate) use self::partial::PartialJailArgs;
pub(crate) use self::server::{ServeJailArgs, ServerJailArgs};
use crate::exit::{self, HostLacks, WrongOptions};
use crate::user_id;

/// The jail of a process all of whose threads can be jailed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// All system calls, with the user's rights.
    Off,
    /// Each thread has only the system calls and the files that it needs.
    #[default]
    Default,
    /// The process also has namespaces and a root folder of its own.
    Strict,
}

impl Mode {
    /// Leaves the namespaces of the host, if it is strict. For this the process must have only one thread.
    ///
    /// # Errors
    /// There are other threads, the host lacks what it needs, or the kernel refuses it.
    fn separate(self, identity: Identity, is_only_thread: bool) -> Result<()> {
        match self {
            Mode::Strict if !is_only_thread => {
                let text = "--jail strict is not possible with --config: give all options on the command line";
                Err(WrongOptions(text.into()).into())
            }
            Mode::Strict if jail::support().landlock_abi == 0 => {
                let what = "Landlock, which --jail strict needs; --jail default runs without it";
                Err(HostLacks(what.into()).into())
            }
            Mode::Strict => {
                // In a user namespace, all capabilities seem to be there.
                identity.check().context(IDENTITY)?;
                if identity != Identity::default() && jail::needs_user_namespace()? {
                    let text = "--uid and --gid need CAP_SYS_ADMIN with --jail strict, whose user namespace has no other \
                                user without it; --jail default needs no namespaces";
                    return Err(WrongOptions(text.into()).into());
                }
                Ok(jail::separate().context("--jail default needs no namespaces")?)
            }
            Mode::Off | Mode::Default => Ok(()),
        }
    }
}

/// Another user.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct IdentityArgs {
    /// Change to this user before a guest runs, or a client is served. What was opened before stays open.
    #[arg(long, value_name = "N", value_parser = user_id::parse)]
    uid: Option<u32>,

    /// Change to this group before a guest runs, or a client is served, and leave all others.
    #[arg(long, value_name = "N", value_parser = user_id::parse)]
    gid: Option<u32>,
}

impl IdentityArgs {
    const NONE: Self = Self { uid: None, gid: None };

    fn get(&self) -> Identity {
        Identity { uid: self.uid, gid: self.gid }
    }

    /// Refuses what this process may not change to.
    fn check(&self) -> Result<()> {
        self.get().check().context(IDENTITY)
    }
}

const IDENTITY: &str = "--uid, --gid";

/// How long the thread that waits for signals may take. It waits for nothing else.
const SIGNALS_TIMEOUT: Duration = Duration::from_secs(10);

fn wait_for(signals: &Receiver<()>) -> Result<()> {
    let jailed = signals.recv_timeout(SIGNALS_TIMEOUT);
    jailed.context("the thread that waits for signals was not jailed")
}

/// Whether a part of it is in object storage.
pub(crate) fn uses_network(snapshot: &Snapshot) -> bool {
    snapshot.storages().any(|storage| storage.file().is_none())
}

/// What every process still names: the files that it reads, some of them by another handle, and its own folder of `/proc`.
fn read_again(snapshot: Option<&Snapshot>) -> Result<Files> {
    let mut files = Files::none();
    files.allow("/proc/self".as_ref(), Access::Read).context(PREPARE)?;
    for file in snapshot.into_iter().flat_map(Snapshot::storages).filter_map(|s| s.file()) {
        files.allow_again(file, Access::Read).context(PREPARE)?;
    }
    Ok(files)
}

const PREPARE: &str = "cannot prepare the jail; --jail off runs without it";
const ADVICE: &str = "--jail off runs without it";

/// Jails this thread, or ends the process.
fn enter(role: Role, limits: Limits<'_>) {
    if let Err(error) = jail::enter(role, limits) {
        exit::end(&anyhow::Error::new(error).context(ADVICE));
    }
}
