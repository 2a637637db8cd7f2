//! The program `snap`: snapshots a running KVM guest into one file and restores it.
#![forbid(unsafe_code)]

mod activity;
mod api;
mod awaited_source;
mod bucket;
mod checkpoints;
mod commands;
mod config;
mod core_dumps;
mod descriptors;
mod devices;
mod exit;
mod foreign_text;
mod guest;
mod guest_console;
mod guest_output;
mod http;
mod input;
mod interrupt;
mod jailed;
mod keys;
mod leftovers;
mod live;
mod memory_hash;
mod metrics;
mod millis;
mod on_restore;
mod pager_args;
mod path_text;
mod private_keys;
mod progress;
mod recorded_source;
mod report;
mod restored_run;
mod restoring;
mod service;
mod session;
mod size;
mod snap_path;
mod stderr;
mod stdio;
mod stdout;
mod storage;
mod summary;
mod terminal;
mod trust;
mod usage;
mod user_id;
mod waits;
mod working_set_file;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{CommandFactory, FromArgMatches, Parser};

use commands::Command;
use interrupt::Interrupt;
use session::Session;

/// Snapshots a running KVM guest into one file and restores it in milliseconds.
#[derive(Parser)]
#[command(name = "snap", version, about, after_help = exit::HELP, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Print only errors and the requested output.
    #[arg(long, short, global = true)]
    quiet: bool,
}

fn main() -> ExitCode {
    // All times that `snap` reports count from here.
    let started = Instant::now();
    match begin(started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}

fn begin(started: Instant) -> Result<()> {
    let args: Vec<_> = std::env::args_os().collect();
    // The file of `--config` may come late, and the thread that handles signals reports that.
    let early = config::is_named(&args).then(Interrupt::install).transpose()?;
    core_dumps::leave_memory_out()?;
    let cli = command_line(&args)?;
    // Only without other threads, which would stay where they are.
    cli.command.separate(early.is_none())?;
    let interrupt = early.map_or_else(Interrupt::install, Ok)?;
    let session = Session { quiet: cli.quiet, started, interrupt };
    commands::run(cli.command, Cli::command, session)
}

/// The command line, with the options that `--config` adds. A wrong one ends the process, with exit code 2.
fn command_line(args: &[OsString]) -> Result<Cli> {
    let mut command = Cli::command();
    let expanded = config::expand(&mut command, args)
        .map_err(|error| exit::WrongOptions(format!("{error:#}")))?;
    let used = expanded.as_ref().map_or(args, |expanded| &expanded.args);
    let parsed = command
        .try_get_matches_from_mut(used)
        .and_then(|matches| Cli::from_arg_matches(&matches).map_err(|e| e.format(&mut command)));
    parsed.or_else(|error| {
        if let Some(place) = expanded.and_then(|expanded| expanded.place_of(&error)) {
            stderr::print(&format!("snap: {place}:\n"));
        }
        private_keys::exit(error)
    })
}
