//! `snap run`: boot a guest and run it.

use std::io::Write;

use anyhow::{Context, Result};

use super::Session;
use super::guest::GuestArgs;
use crate::booted::Booted;
use crate::guest_console::GuestConsole;
use crate::live::{self, EndArgs};
use crate::terminal::Keyboard;

/// Boot a guest and run it.
///
/// The guest's serial port is connected to stdin and stdout. Ctrl-C ends the run. A guest that powers off ends it
/// with exit code 0; one that halts, resets or crashes with 5.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap run                                    the built-in demo guest, until Ctrl-C
  snap run --kernel vmlinuz --initrd initrd.img --memory 512M --cpus 2
  snap run --kernel vmlinux --initrd initrd.img --disk root.img --until 'login:'")]
pub(crate) struct Args {
    #[command(flatten)]
    guest: GuestArgs,

    #[command(flatten)]
    end: EndArgs,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let (console, seen) = GuestConsole::new(std::io::stdout(), args.end.until());
    // In this order: the vCPUs are gone before the memory.
    let Booted { memory: _memory, vm, .. } = Booted::new(&args.guest, console, false, session)?;
    let keyboard = Keyboard::connect(vm.handle()).context("cannot use the keyboard")?;
    let ended = live::run(vm, args.end.run_for, session)?;
    drop(keyboard);
    let outcome = ended.outcome(&seen, session);
    if outcome.is_ok() && !session.quiet {
        let ran = humantime::format_duration(std::time::Duration::from_millis(
            ended.at.saturating_duration_since(session.started).as_millis() as u64,
        ));
        let line = format!("snap run: {} after {ran}\n", ended.describe(&seen, session));
        // A closed stderr is nobody to complain to.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    outcome
}
