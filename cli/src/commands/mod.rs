//! One file for each command, with its arguments and its function.

mod bench;
#[cfg(feature = "objects")]
mod cache;
mod cat;
mod checkpoint;
mod completions;
mod create;
#[cfg(feature = "objects")]
mod create_in_bucket;
mod demo;
mod diff;
mod doctor;
mod export;
mod fork;
mod hash;
mod import;
mod info;
mod keep;
mod map;
mod mount;
mod optimize;
mod pages;
#[cfg(feature = "objects")]
mod push;
mod rekey;
mod reset;
mod restore;
mod rewrite;
mod run;
mod serve;
mod summary;
mod train;
mod verify;

pub(crate) use rewrite::Parts;

use crate::session::Session;
use crate::waits;
use anyhow::Result;
use clap::Subcommand;

#[derive(Subcommand)]
pub(crate) enum Command {
    Create(create::Args),
    Run(run::Args),
    Restore(restore::Args),
    Checkpoint(checkpoint::Args),
    Reset(reset::Args),
    Fork(fork::Args),
    Info(info::Args),
    Verify(verify::Args),
    Hash(hash::Args),
    Diff(diff::Args),
    Flatten(rewrite::FlattenArgs),
    Rebase(rewrite::RebaseArgs),
    Rekey(rekey::Args),
    Train(train::Args),
    Optimize(optimize::Args),
    Import(import::Args),
    Export(export::Args),
    Cat(cat::Args),
    Pages(pages::Args),
    #[cfg(feature = "objects")]
    Push(push::PushArgs),
    #[cfg(feature = "objects")]
    Pull(push::PullArgs),
    #[cfg(feature = "objects")]
    Cache(cache::Args),
    Serve(serve::Args),
    Keep(keep::Args),
    Mount(mount::Args),
    Demo(demo::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
    Completions(completions::CompletionsArgs),
    Man(completions::ManArgs),
}

impl Command {
    /// Leaves the namespaces of the host, if that is asked for and the other options allow it. It needs to be the only
    /// thread of the process.
    pub(crate) fn separate(&self, is_only_thread: bool) -> Result<()> {
        match self {
            Self::Create(args) => args.jail.separate(is_only_thread),
            Self::Run(args) => args.jail.separate(is_only_thread),
            Self::Restore(args) => args.jail.separate(is_only_thread),
            Self::Serve(args) => args.separate(is_only_thread),
            Self::Keep(args) => args.jail.separate(is_only_thread),
            _ => Ok(()),
        }
    }
}

/// `cli` returns the whole command line, for commands that describe it.
pub(crate) fn run(
    command: Command,
    cli: impl FnOnce() -> clap::Command,
    session: Session,
) -> Result<()> {
    if session.quiet {
        waits::be_quiet();
    }
    match command {
        Command::Create(args) => create::run(&args, &session),
        Command::Run(args) => run::run(&args, &session),
        Command::Restore(args) => restore::run(&args, &session),
        Command::Checkpoint(args) => checkpoint::run(&args, &session),
        Command::Reset(args) => reset::run(&args, &session),
        Command::Fork(args) => fork::run(&args, &session),
        Command::Info(args) => info::run(&args),
        Command::Verify(args) => verify::run(&args, &session),
        Command::Hash(args) => hash::run(&args, &session),
        Command::Diff(args) => diff::run(&args, &session),
        Command::Flatten(args) => rewrite::flatten(&args, &session),
        Command::Rebase(args) => rewrite::rebase(&args, &session),
        Command::Rekey(args) => rekey::run(&args, &session),
        Command::Train(args) => train::run(&args, &session),
        Command::Optimize(args) => optimize::run(&args, &session),
        Command::Import(args) => import::run(&args, &session),
        Command::Export(args) => export::run(&args, &session),
        Command::Cat(args) => cat::run(&args, &session),
        Command::Pages(args) => pages::run(&args, &session),
        #[cfg(feature = "objects")]
        Command::Push(args) => push::push(&args, &session),
        #[cfg(feature = "objects")]
        Command::Pull(args) => push::pull(&args, &session),
        #[cfg(feature = "objects")]
        Command::Cache(args) => cache::run(&args, &session),
        Command::Serve(args) => serve::run(&args, &session),
        Command::Keep(args) => keep::run(&args, &session),
        Command::Mount(args) => mount::run(&args, &session),
        Command::Demo(args) => demo::run(&args, &session),
        Command::Bench(args) => bench::run(&args, &session),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::completions(&args, cli()),
        Command::Man(args) => completions::man(&args, cli()),
    }
}
