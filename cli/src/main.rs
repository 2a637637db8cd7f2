//! The program `snap`: stores a running KVM guest in one file and brings it back.
#![forbid(unsafe_code)]

mod api;
mod booted;
mod commands;
mod devices;
mod exit;
mod guest_console;
mod guest_memory;
mod interrupt;
mod live;
mod memory_hash;
mod metrics;
mod pagemap;
mod prefetch;
mod progress;
mod recording;
mod report;
mod restored;
mod size;
mod storage;
mod stored;
mod terminal;
mod usage;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use commands::Command;

/// Stores a running KVM guest in one file and brings it back in milliseconds.
#[derive(Parser)]
#[command(version, about, after_help = exit::HELP, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Say nothing but errors and what was asked for.
    #[arg(long, short, global = true)]
    quiet: bool,
}

fn main() -> ExitCode {
    // All times that `snap` reports count from here.
    let started = Instant::now();
    let cli = Cli::parse();
    match commands::run(cli.command, cli.quiet, started) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}
