//! The jail of a process that runs a guest.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::mpsc::Receiver;

use anyhow::{Context, Result, bail};
use jail::{Access, Files, Identity, Limits, Role, Root, Rules};
use snapfmt::Snapshot;

use super::{ADVICE, IdentityArgs, Mode, PREPARE, enter, read_again, uses_network, wait_for};
use crate::exit::WrongOptions;
use crate::interrupt::Interrupt;
use crate::keys::KeyArgs;
use crate::leftovers;

/// The options.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct GuestJailArgs {
    /// Take from each thread the system calls, files and capabilities that it does not need, before the guest runs: see
    /// docs/jail.md. `strict`: the process also has its own mounts, network, IPC and host name, and an empty root
    /// folder. `off`: take nothing away.
    #[arg(
        long,
        value_name = "off|default|strict",
        default_value = "default",
        hide_possible_values = true
    )]
    jail: Mode,

    /// Make this folder the root before the guest runs. Paths in requests of the control socket are then in it.
    #[arg(long, value_name = "DIR")]
    chroot: Option<PathBuf>,

    #[command(flatten)]
    identity: IdentityArgs,
}

/// What the process of a guest needs after the guest has started.
#[derive(Default)]
pub(crate) struct Needs<'a> {
    /// It is restored from this.
    pub(crate) snapshot: Option<&'a Snapshot>,
    /// Other threads than the guest's talk to object storage, or run commands for keys.
    pub(crate) network: bool,
    /// A command that is run on the host, with `--on-restore`.
    pub(crate) command: bool,
    /// The file that it writes.
    pub(crate) out: Option<&'a Path>,
    /// Clients of its control socket may have files written.
    pub(crate) api: bool,
}

/// What is jailed of this process. The guest's own threads are in any jail.
pub(crate) enum Jail {
    Off,
    /// Only the vCPUs and the devices, because other threads need the network.
    Guest,
    /// All threads.
    Process(Box<Process>),
}

pub(crate) struct Process {
    /// Receives when the thread that waits for signals is jailed.
    signals: Receiver<()>,
    interrupt: Interrupt,
    files: Files,
    /// Files may be written.
    writes: bool,
    root: Root,
}

/// What the threads of this process lose, besides the files of some.
struct Plan {
    network: Option<OwnedFd>,
    identity: Identity,
    /// Of threads that name no file.
    no_files: Rules,
    /// Of threads that load pages.
    pager_files: Rules,
}

static PLAN: OnceLock<Plan> = OnceLock::new();
/// Of the other threads, from when the guest's sockets are made. `None`: the same as those of the pager.
static FILES: OnceLock<Option<Rules>> = OnceLock::new();

fn limits(files: impl FnOnce(&'static Plan) -> Option<&'static Rules>) -> Limits<'static> {
    let Some(plan) = PLAN.get() else { return Limits::default() };
    Limits { files: files(plan), network: plan.network.as_ref(), identity: plan.identity }
}

impl GuestJailArgs {
    pub(crate) const OFF: Self =
        Self { jail: Mode::Off, chroot: None, identity: IdentityArgs::NONE };

    /// Leaves the namespaces of the host, if the jail is strict. For this the process must have only one thread.
    ///
    /// # Errors
    /// There are other threads, or the kernel refuses it.
    pub(crate) fn separate(&self, is_only_thread: bool) -> Result<()> {
        self.jail.separate(self.identity.get(), is_only_thread)
    }

    /// Whether clients of the control socket may name files to be written.
    pub(crate) fn names_files(&self) -> bool {
        self.jail != Mode::Strict || self.chroot.is_some()
    }

    /// Whether more than the default is asked for.
    pub(crate) fn is_special(&self) -> bool {
        self.jail == Mode::Strict
            || self.chroot.is_some()
            || self.identity.get() != Identity::default()
    }

    /// Refuses what cannot be kept.
    fn check(&self, needs: &Needs<'_>) -> Result<()> {
        let refuse = |text: &str| Err(WrongOptions(text.into()).into());
        if self.jail == Mode::Off && self.is_special() {
            return refuse("--chroot, --uid and --gid are parts of the jail: leave --jail off out");
        }
        if needs.network && self.is_special() {
            return refuse(
                "--jail strict, --chroot, --uid and --gid are not possible with object storage, --key-command or \
                 --wrap-command: snap pull fetches the snapshot, and --key-file gives a key",
            );
        }
        if needs.command && self.is_special() {
            return refuse(
                "--jail strict, --chroot, --uid and --gid are not possible with --on-restore, whose command would run \
                 without them",
            );
        }
        if needs.out.is_some() && self.chroot.is_some() {
            return refuse(
                "--chroot: the output is written after the root has changed: leave one of them out",
            );
        }
        if let Some(folder) = self.chroot.as_ref().filter(|folder| !folder.is_dir()) {
            bail!("--chroot {}: there is no such folder", folder.display());
        }
        self.identity.check()
    }

    /// Jails the threads that start from now on to run a guest, and the one that waits for signals.
    ///
    /// # Errors
    /// The options contradict each other, or the kernel refuses it.
    pub(crate) fn begin(&self, needs: &Needs<'_>, interrupt: &Interrupt) -> Result<Jail> {
        self.check(needs)?;
        if self.jail == Mode::Off {
            return Ok(Jail::Off);
        }
        let mut files = read_again(needs.snapshot)?;
        if self.root() != Root::Host {
            files.change_root();
        }
        let strict = self.jail == Mode::Strict;
        if strict {
            jail::lower_limits()?;
        }
        let plan = Plan {
            network: strict.then(jail::empty_network).transpose()?,
            identity: self.identity.get(),
            no_files: Files::none().rules(Role::Vcpu).context(PREPARE)?,
            pager_files: files.rules(Role::Pager).context(PREPARE)?,
        };
        // A process runs one guest.
        let _ = PLAN.set(plan);
        vmm::on_thread_start(|kind| {
            let limits = limits(|plan| Some(&plan.no_files));
            match kind {
                vmm::ThreadKind::Devices => enter(Role::Devices, limits),
                _ => enter(Role::Vcpu, limits),
            }
        });
        if needs.network {
            return Ok(Jail::Guest);
        }
        pager::on_thread_start(|| enter(Role::Pager, limits(|plan| Some(&plan.pager_files))));
        // Now, because that takes a while, in which this thread opens what the guest needs. Its files come later.
        let signals = interrupt.jail(|| {
            enter(Role::Signals, limits(|_| None));
            jail::prepare(Role::Vcpu);
        });
        let mut process = Process {
            signals,
            interrupt: interrupt.clone(),
            files,
            writes: needs.api || needs.out.is_some(),
            root: self.root(),
        };
        process.allow_writes(needs, strict)?;
        Ok(Jail::Process(Box::new(process)))
    }

    fn root(&self) -> Root {
        match (self.jail, &self.chroot) {
            (Mode::Strict, None) => Root::Empty,
            (Mode::Strict, Some(folder)) => Root::FolderOnly(folder.clone()),
            (_, Some(folder)) => Root::Folder(folder.clone()),
            (_, None) => Root::Host,
        }
    }

    /// As [`GuestJailArgs::begin`], for a guest that is restored from `needs.snapshot`, with the keys of its clients.
    pub(crate) fn begin_restore(
        &self,
        needs: Needs<'_>,
        keys: &KeyArgs,
        interrupt: &Interrupt,
    ) -> Result<Jail> {
        let network = needs.snapshot.is_some_and(uses_network) || keys.run_commands();
        self.begin(&Needs { network: needs.network || network, ..needs }, interrupt)
    }
}

impl Process {
    /// Adds the folders in which files are written.
    fn allow_writes(&mut self, needs: &Needs<'_>, strict: bool) -> Result<()> {
        if let Some(out) = needs.out {
            let folder = out.parent().unwrap_or(Path::new("/"));
            self.files.allow(folder, Access::Write).context(PREPARE)?;
        }
        match &self.root {
            Root::Folder(folder) | Root::FolderOnly(folder) if needs.api => {
                self.files.allow(folder, Access::Write).context(PREPARE)?;
            }
            // Its clients may name any file.
            _ if needs.api && !strict => self.files = Files::any(),
            _ => {}
        }
        Ok(())
    }
}

impl Jail {
    /// Jails this thread, and the threads that it starts from now on. All that the guest needs is open, and the names of
    /// its sockets are registered.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn close(self) -> Result<()> {
        let Jail::Process(process) = self else { return Ok(()) };
        let Process { signals, interrupt, mut files, writes, root } = *process;
        let role = if writes { Role::Writer } else { Role::Main };
        know_files(&mut files, role)?;
        root.enter(&files).context(ADVICE)?;
        wait_for(&signals)?;
        let signals = interrupt.jail(limit_files);
        jail::enter(role, limits(|_| self::files())).context(ADVICE)?;
        wait_for(&signals)
    }
}

/// Makes the rules of the threads without rules yet. The names of the guest's sockets are registered.
fn know_files(files: &mut Files, role: Role) -> Result<()> {
    let folders = leftovers::folders();
    let as_pager = folders.is_empty() && role == Role::Main;
    for folder in folders {
        files.allow(&folder, Access::Remove).context(PREPARE)?;
    }
    if role == Role::Writer {
        // A snapshot of a guest that runs, and a reset, need them.
        pager::uffd::keep_device_open();
        pager::Pagemap::keep_open();
    }
    let rules = (!as_pager).then(|| files.rules(role)).transpose().context(PREPARE)?;
    let _ = FILES.set(rules);
    Ok(())
}

/// The rules of the threads that are not the guest's own.
fn files() -> Option<&'static Rules> {
    match FILES.get()? {
        Some(rules) => Some(rules),
        None => PLAN.get().map(|plan| &plan.pager_files),
    }
}

/// Limits the files of this thread, or ends the process.
fn limit_files() {
    if let Some(Err(error)) = files().map(Rules::apply) {
        crate::exit::end(&anyhow::Error::new(error).context(PREPARE));
    }
}
