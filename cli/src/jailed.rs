//! `--jail`: which threads of this process are jailed, and when. See docs/jail.md.

use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use jail::Role;
use snapfmt::Snapshot;

use crate::exit;
use crate::interrupt::Interrupt;
use crate::keys::KeyArgs;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// All system calls, with the user's rights.
    Off,
    /// Each thread has only the system calls that it needs.
    #[default]
    Default,
}

/// The option.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct JailArgs {
    /// Take from each thread the system calls that it does not need, and the capabilities, before the guest runs:
    /// see docs/jail.md. `off`: do not.
    #[arg(
        long,
        value_name = "off|default",
        default_value = "default",
        hide_possible_values = true
    )]
    jail: Mode,
}

/// What is jailed of this process. The guest's own threads are in any jail.
#[derive(Debug)]
pub(crate) enum Jail {
    Off,
    /// Only the vCPUs and the devices, because other threads need the network.
    Guest,
    /// All threads. This receives when the one that waits for signals is jailed.
    Process(Receiver<()>),
}

/// How long the thread that waits for signals may take. It waits for nothing else.
const SIGNALS_TIMEOUT: Duration = Duration::from_secs(10);

impl JailArgs {
    pub(crate) const OFF: JailArgs = JailArgs { jail: Mode::Off };

    /// Jails this thread, which serves guests of other processes from files, the threads that it starts from now on, and the
    /// one that waits for signals. All that they need is open.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn close_server(&self, interrupt: &Interrupt) -> Result<()> {
        match self.jail {
            Mode::Off => Ok(()),
            Mode::Default => {
                pager::uffd::keep_device_open();
                // The thread that waits for signals kills guests, too, when it ends the process.
                let signals = interrupt.jail(|| enter(Role::Server));
                jail::enter(Role::Server).context(ADVICE)?;
                wait_for(&signals)
            }
        }
    }

    /// What jails each thread that answers readers of a mount. The thread that waits for signals is jailed by this; the one
    /// that calls it is not: it unmounts, for which an ordinary user starts `fusermount3`.
    ///
    /// # Errors
    /// The kernel refuses it. Nothing must be mounted yet: the hook ends the process at an error.
    pub(crate) fn begin_mount(&self, interrupt: &Interrupt) -> Result<Option<fn()>> {
        if self.jail == Mode::Off {
            return Ok(None);
        }
        wait_for(&interrupt.jail(|| enter(Role::Signals)))?;
        Ok(Some(|| enter(Role::Mount)))
    }

    /// Jails the threads that start from now on to run a guest, and the one that waits for signals. `guest_only`: other
    /// threads of this process talk to object storage, or run commands for keys, so that only the guest's own are jailed.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn begin(&self, guest_only: bool, interrupt: &Interrupt) -> Result<Jail> {
        if self.jail == Mode::Off {
            return Ok(Jail::Off);
        }
        vmm::on_thread_start(|kind| match kind {
            vmm::ThreadKind::Devices => enter(Role::Devices),
            _ => enter(Role::Vcpu),
        });
        if guest_only {
            return Ok(Jail::Guest);
        }
        pager::on_thread_start(|| enter(Role::Pager));
        // Now, because that takes a while, in which this thread opens what the guest needs.
        Ok(Jail::Process(interrupt.jail(|| enter(Role::Signals))))
    }

    /// As [`JailArgs::begin`], for a guest that is restored from `snapshot`.
    pub(crate) fn begin_with(
        &self,
        snapshot: &Snapshot,
        keys: &KeyArgs,
        interrupt: &Interrupt,
    ) -> Result<Jail> {
        self.begin(uses_network(snapshot) || keys.run_commands(), interrupt)
    }
}

impl Jail {
    /// Jails this thread, and the threads that it starts from now on. All that the guest needs is open. `writes`: files may
    /// be written later.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn close(self, writes: bool) -> Result<()> {
        let Jail::Process(signals) = self else { return Ok(()) };
        let role = if writes { Role::Writer } else { Role::Main };
        jail::enter(role).context(ADVICE)?;
        wait_for(&signals)
    }
}

fn wait_for(signals: &Receiver<()>) -> Result<()> {
    let jailed = signals.recv_timeout(SIGNALS_TIMEOUT);
    jailed.context("the thread that waits for signals was not jailed")
}

/// Whether a part of it is in object storage.
pub(crate) fn uses_network(snapshot: &Snapshot) -> bool {
    snapshot.storages().any(|storage| storage.file().is_none())
}

const ADVICE: &str = "--jail off runs without it";

/// Jails this thread, or ends the process.
pub(crate) fn enter(role: Role) {
    if let Err(error) = jail::enter(role) {
        exit::end(&anyhow::Error::new(error).context(ADVICE));
    }
}
