//! `snap run`: boots a guest and runs it.

use anyhow::{Context, Result};

use crate::api::{ApiArgs, Facts};
use crate::config::ConfigArgs;
use crate::guest::{self, GuestArgs};
use crate::guest_console::GuestConsole;
use crate::guest_output::GuestOutput;
use crate::jailed::{GuestJailArgs, Needs};
use crate::keys::KeyArgs;
use crate::live::{self, EndArgs, Live};
use crate::session::Session;
use crate::stderr;
use crate::terminal::Keyboard;

/// Boot a guest and run it.
///
/// The guest's serial port is connected to stdin and stdout. Ctrl-C ends the run. A guest that powers off ends it
/// with exit code 0; one that resets or crashes with 5.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap run                                    the built-in demo guest, until Ctrl-C
  snap run --beats 3
  snap run --kernel vmlinuz --initrd initrd.img --memory 512M --cpus 2
  snap run --kernel vmlinux --initrd initrd.img --disk root.img --until 'login:'
  snap run --api vm.sock                      then, elsewhere: snap create demo.snap --vm vm.sock")]
pub(crate) struct Args {
    #[command(flatten)]
    guest: GuestArgs,

    #[command(flatten)]
    config: ConfigArgs,

    #[command(flatten)]
    end: EndArgs,

    #[command(flatten)]
    api: ApiArgs,

    #[command(flatten)]
    pub(crate) jail: GuestJailArgs,

    #[command(flatten)]
    keys: KeyArgs,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    // Before the guest's boot, which would be useless.
    args.keys.provider()?;
    if args.api.api.is_some() {
        args.keys.check_writes()?;
    }
    let api = args.api.bind()?;
    let (output, hold) = GuestOutput::new().context("cannot use stdout")?;
    let (console, seen) = GuestConsole::new(output, args.end.until());
    let needs = Needs { network: args.keys.run_commands(), api: api.is_some(), ..Needs::default() };
    let jail = args.jail.begin(&needs, &session.interrupt)?;
    let vm = guest::boot(&args.guest, console, false, session)?;
    jail.close()?;
    let (remote, events) = live::remote();
    let live = Live {
        session,
        seen: &seen,
        hold: Some(&hold),
        run_for: args.end.run_for,
        begins_paused: false,
        events,
        keys: args.keys.clone(),
        on_restore: None,
    };
    let facts = Facts {
        memory_bytes: args.guest.memory,
        vcpus: args.guest.cpus.into(),
        restored_from: None,
        sealed: args.keys.is_given(),
        names_files: args.jail.names_files(),
        started: session.started,
        pager: Box::new(|| None),
    };
    let serving = api.map(|api| api.serve(remote, facts)).transpose()?;
    let keyboard = Keyboard::connect(vm.handle()).context("cannot use the keyboard")?;
    let ended = live.run(vm)?;
    drop((keyboard, serving));
    let outcome = ended.outcome(&seen, session);
    if outcome.is_ok() && !session.quiet {
        let ran = humantime::format_duration(std::time::Duration::from_millis(
            ended.at.saturating_duration_since(session.started).as_millis() as u64,
        ));
        let line = format!("snap run: {} after {ran}\n", ended.describe(&seen, session));
        stderr::print(&line);
    }
    outcome
}
