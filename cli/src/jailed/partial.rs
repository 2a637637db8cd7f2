//! The jail of processes of which some threads have none, because they start other programs: `fork` and `mount`.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use clap::ValueEnum;
use jail::{Access, Files, Limits, Role, Rules};
use snapfmt::Snapshot;

use super::{ADVICE, PREPARE, enter, read_again, wait_for};
use crate::interrupt::Interrupt;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// All system calls, with the user's rights.
    Off,
    /// Each thread has only the system calls and the files that it needs.
    #[default]
    Default,
}

/// The option.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct PartialJailArgs {
    /// Take from each thread the system calls, files and capabilities that it does not need, before a client is served:
    /// see docs/jail.md. `off`: do not.
    #[arg(
        long,
        value_name = "off|default",
        default_value = "default",
        hide_possible_values = true
    )]
    jail: Mode,
}

/// Of the threads of this process.
static RULES: OnceLock<Rules> = OnceLock::new();

fn limits() -> Limits<'static> {
    Limits { files: RULES.get(), ..Limits::default() }
}

impl PartialJailArgs {
    /// Jails this thread, which serves guests of other processes, the threads that it starts from now on, and the one that
    /// waits for signals. Their files are not limited.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn close_server(&self, interrupt: &Interrupt) -> Result<()> {
        if self.jail == Mode::Off {
            return Ok(());
        }
        pager::uffd::keep_device_open();
        let _ = RULES.set(Files::any().rules(Role::Fork).context(PREPARE)?);
        // The thread that waits for signals kills guests, too, when it ends the process.
        let signals = interrupt.jail(|| enter(Role::Fork, limits()));
        jail::enter(Role::Fork, limits()).context(ADVICE)?;
        wait_for(&signals)
    }

    /// What jails each thread that answers readers of a mount at `folder`. The thread that waits for signals is jailed by
    /// this; the one that calls it is not: it unmounts, for which an ordinary user starts `fusermount3`.
    ///
    /// # Errors
    /// The kernel refuses it. Nothing must be mounted yet: the hook ends the process at an error.
    pub(crate) fn begin_mount(
        &self,
        snapshot: &Snapshot,
        folder: &Path,
        interrupt: &Interrupt,
    ) -> Result<Option<fn()>> {
        if self.jail == Mode::Off {
            return Ok(None);
        }
        let mut files = read_again(Some(snapshot))?;
        // Files of the mount are read to load them ahead. The folder itself is hidden by the mount, and rules for what is
        // hidden do not count. If it does not exist, the mount says so.
        if let Some(parent) = folder.canonicalize().ok().as_deref().and_then(Path::parent) {
            files.allow(parent, Access::Read).context(PREPARE)?;
        }
        let _ = RULES.set(files.rules(Role::Mount).context(PREPARE)?);
        wait_for(&interrupt.jail(|| enter(Role::Signals, limits())))?;
        Ok(Some(|| enter(Role::Mount, limits())))
    }
}
