//! `snap reset`: puts a running guest back to the snapshot that it was restored from.

use std::path::PathBuf;

use anyhow::Result;

use crate::api::client;
use crate::session::Session;
use crate::size;
use crate::stdout::{print_json, print_line};

/// Put a guest back to the snapshot that it was restored from, in place.
///
/// The guest of `snap restore --api SOCKET` has the memory, vCPUs, devices and disk overlays of its snapshot again. Its
/// process, sockets, taps and disks stay; connections to its vsock are closed. It is paused meanwhile, and then runs or is
/// paused as before. A guest that writes to a disk without an overlay cannot be reset, and neither can one that was
/// booted.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap restore --lazy demo.snap --api vm.sock &
  snap reset --vm vm.sock")]
pub(crate) struct Args {
    /// The control socket of the guest.
    #[arg(long, value_name = "SOCKET")]
    vm: PathBuf,

    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let summary = client::reset(&args.vm, session)?;
    if args.json {
        print_json(&summary)?;
    } else if !session.quiet {
        print_line(format_args!(
            "{}: reset to {}, {} put back, {:.1} ms, paused {:.1} ms",
            args.vm.display(),
            summary.snapshot.display(),
            size::human(summary.memory_bytes),
            summary.reset_ms,
            summary.pause_ms,
        ))?;
    }
    Ok(())
}
