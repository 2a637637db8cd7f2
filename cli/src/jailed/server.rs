//! The jail of processes that serve guests of other processes: `serve` and `keep`.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use jail::{Access, Files, Identity, Limits, Role, Root, Rules};
use snapfmt::Snapshot;

use super::{ADVICE, IdentityArgs, Mode, PREPARE, enter, read_again, wait_for};
use crate::exit::WrongOptions;
use crate::interrupt::Interrupt;
use crate::leftovers;

/// The option.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ServerJailArgs {
    /// Take from each thread the system calls, files and capabilities that it does not need, before a client is served:
    /// see docs/jail.md. `strict`: the process also has its own mounts, network, IPC and host name, and an empty root
    /// folder. `off`: take nothing away.
    #[arg(
        long,
        value_name = "off|default|strict",
        default_value = "default",
        hide_possible_values = true
    )]
    jail: Mode,
}

/// The options of a server that may also change its user.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ServeJailArgs {
    #[command(flatten)]
    server: ServerJailArgs,

    #[command(flatten)]
    identity: IdentityArgs,
}

/// What the threads of this process lose.
struct Plan {
    network: Option<OwnedFd>,
    identity: Identity,
    rules: Rules,
}

static PLAN: OnceLock<Plan> = OnceLock::new();

fn limits() -> Limits<'static> {
    let Some(plan) = PLAN.get() else { return Limits::default() };
    Limits { files: Some(&plan.rules), network: plan.network.as_ref(), identity: plan.identity }
}

impl ServerJailArgs {
    /// Leaves the namespaces of the host, if the jail is strict. For this the process must have only one thread.
    ///
    /// # Errors
    /// There are other threads, the kernel refuses it, or clients of other users could not be told apart.
    pub(crate) fn separate(&self, is_only_thread: bool) -> Result<()> {
        self.separate_as(Identity::default(), is_only_thread)
    }

    fn separate_as(&self, identity: Identity, is_only_thread: bool) -> Result<()> {
        if self.jail == Mode::Strict && jail::needs_user_namespace()? {
            check_own_user()?;
        }
        self.jail.separate(identity, is_only_thread)
    }

    /// Jails this thread, which serves guests of other processes from `snapshot` if there is one, the threads that it
    /// starts from now on, and the one that waits for signals. All that they need is open, and the names of their sockets
    /// are registered.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn close(&self, snapshot: Option<&Snapshot>, interrupt: &Interrupt) -> Result<()> {
        self.close_as(Identity::default(), snapshot, interrupt)
    }

    fn close_as(
        &self,
        identity: Identity,
        snapshot: Option<&Snapshot>,
        interrupt: &Interrupt,
    ) -> Result<()> {
        if self.jail == Mode::Off {
            return Ok(());
        }
        pager::uffd::keep_device_open();
        let strict = self.jail == Mode::Strict;
        let mut files = server_files(snapshot)?;
        let mut network = None;
        if strict {
            files.change_root();
            jail::lower_limits()?;
            network = Some(jail::empty_network()?);
        }
        let rules = files.rules(Role::Server).context(PREPARE)?;
        // A process is one server.
        let _ = PLAN.set(Plan { network, identity, rules });
        if strict {
            Root::Empty.enter(&files).context("--jail default keeps the root folder")?;
        }
        drop(files);
        // The thread that waits for signals kills guests, too, when it ends the process.
        let signals = interrupt.jail(|| enter(Role::Server, limits()));
        jail::enter(Role::Server, limits()).context(ADVICE)?;
        wait_for(&signals)
    }
}

impl ServeJailArgs {
    /// Whether more than the default is asked for.
    pub(crate) fn is_special(&self) -> bool {
        self.server.jail == Mode::Strict || self.identity.get() != Identity::default()
    }

    /// The user that serves.
    pub(crate) fn user(&self) -> u32 {
        self.identity.get().uid.unwrap_or_else(|| rustix::process::geteuid().as_raw())
    }

    /// Checks the options, and leaves the namespaces of the host if the jail is strict. For this the process must have
    /// only one thread. `serves_others`: clients of other users are served.
    ///
    /// # Errors
    /// The options contradict each other, or as [`ServerJailArgs::separate`].
    pub(crate) fn separate(&self, serves_others: bool, is_only_thread: bool) -> Result<()> {
        if self.server.jail == Mode::Off && self.is_special() {
            let text = "--uid and --gid are parts of the jail: leave --jail off out";
            return Err(WrongOptions(text.into()).into());
        }
        self.identity.check()?;
        if self.server.jail == Mode::Strict && serves_others && jail::needs_user_namespace()? {
            return Err(WrongOptions(OTHER_USERS.into()).into());
        }
        self.server.separate_as(self.identity.get(), is_only_thread)
    }

    /// As [`ServerJailArgs::close`].
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn close(&self, snapshot: &Snapshot, interrupt: &Interrupt) -> Result<()> {
        self.server.close_as(self.identity.get(), Some(snapshot), interrupt)
    }
}

const OTHER_USERS: &str = "--jail strict of this user needs a user namespace, in which other users have no numbers, so that \
     --allow-uid, --allow-gid and --socket-owner have no effect: start the server as root, or with --jail default";

/// Refuses the user whose number all others would have.
fn check_own_user() -> Result<()> {
    let others = std::fs::read_to_string("/proc/sys/kernel/overflowuid");
    let others = others.context("cannot read /proc/sys/kernel/overflowuid")?;
    let own = rustix::process::geteuid().as_raw();
    match others.trim().parse() == Ok(own) {
        true => Err(WrongOptions(format!(
            "--jail strict of this user needs a user namespace, in which all other users would have its number, {own}: \
             start the server as another user, or with --jail default"
        ))
        .into()),
        false => Ok(()),
    }
}

/// What a server still names.
fn server_files(snapshot: Option<&Snapshot>) -> Result<Files> {
    let mut files = read_again(snapshot)?;
    // The threads of its guests, whose CPUs it follows.
    files.allow("/proc".as_ref(), Access::Read).context(PREPARE)?;
    for folder in leftovers::folders() {
        files.allow(&folder, Access::Remove).context(PREPARE)?;
    }
    Ok(files)
}
