//! `--jail`: which threads of this process are jailed, and when. See docs/jail.md.

mod guest;
mod server;

use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result};
use jail::{Access, Files, Limits, Role};
use snapfmt::Snapshot;

pub(crate) use self::guest::{GuestJailArgs, Jail, Needs};
pub(crate) use self::server::JailArgs;
use crate::exit;

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
