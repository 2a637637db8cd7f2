//! One file a command; each has its arguments and a function that does it.

mod bench;
mod cat;
mod completions;
pub(crate) mod create;
mod demo;
mod diff;
mod export;
mod foreign;
pub(crate) mod guest;
mod import;
mod info;
mod keep;
mod map;
mod optimize;
mod pages;
pub(crate) mod restore;
mod rewrite;
mod run;
pub(crate) mod serve;
mod stdout;
mod summary;
mod train;
mod verify;

use std::fmt::Display;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Subcommand;
use snapfmt::{Parents, ReadError, Snapshot};

use crate::interrupt::Interrupt;
use crate::stdio;
use crate::waits::{self, Wait, Waiting};

#[derive(Subcommand)]
pub(crate) enum Command {
    Create(create::Args),
    Run(run::Args),
    Restore(restore::Args),
    Info(info::Args),
    Verify(verify::Args),
    Diff(diff::Args),
    Flatten(rewrite::FlattenArgs),
    Rebase(rewrite::RebaseArgs),
    Train(train::Args),
    Optimize(optimize::Args),
    Import(import::Args),
    Export(export::Args),
    Cat(cat::Args),
    Pages(pages::Args),
    Serve(serve::Args),
    Keep(keep::Args),
    Demo(demo::Args),
    Bench(bench::Args),
    Completions(completions::CompletionsArgs),
    Man(completions::ManArgs),
}

/// What every command is given.
pub(crate) struct Session {
    pub(crate) quiet: bool,
    /// When the command began.
    pub(crate) started: Instant,
    pub(crate) interrupt: Interrupt,
}

pub(crate) fn run(command: Command, session: Session) -> Result<()> {
    if session.quiet {
        waits::be_quiet();
    }
    match command {
        Command::Create(args) => create::run(&args, &session),
        Command::Run(args) => run::run(&args, &session),
        Command::Restore(args) => restore::run(&args, &session),
        Command::Info(args) => info::run(&args),
        Command::Verify(args) => verify::run(&args, &session),
        Command::Diff(args) => diff::run(&args, &session),
        Command::Flatten(args) => rewrite::flatten(&args, &session),
        Command::Rebase(args) => rewrite::rebase(&args, &session),
        Command::Train(args) => train::run(&args, &session),
        Command::Optimize(args) => optimize::run(&args, &session),
        Command::Import(args) => import::run(&args, &session),
        Command::Export(args) => export::run(&args, &session),
        Command::Cat(args) => cat::run(&args, &session),
        Command::Pages(args) => pages::run(&args, &session),
        Command::Serve(args) => serve::run(&args, &session),
        Command::Keep(args) => keep::run(&args, &session),
        Command::Demo(args) => demo::run(&args, &session),
        Command::Bench(args) => bench::run(&args, &session),
        Command::Completions(args) => completions::completions(&args),
        Command::Man(args) => completions::man(&args),
    }
}

/// Opens a snapshot, and of a layer its parents; the error names the file.
pub(crate) fn open(path: &Path, parents: &[PathBuf]) -> Result<Snapshot> {
    let _opening = reading(path);
    let folders = std::env::var_os("SNAP_PATH").unwrap_or_default();
    let parents = Parents {
        files: parents.to_vec(),
        folders: std::env::split_paths(&folders).filter(|f| *f != Path::new("")).collect(),
    };
    Snapshot::open_with(path, &parents).map_err(|error| match error {
        // Says itself which file.
        ReadError::Open { .. } => error.into(),
        _ => anyhow::Error::new(error).context(path.display().to_string()),
    })
}

/// Waits for a file that may be on a slow disk.
pub(crate) fn reading(path: &Path) -> Waiting {
    let path = path.to_owned();
    Wait::new(move || format!("{} to be read", path.display())).begin()
}

/// Refuses an output of a snapshot that is there already, or is stdout, before anything is done that would be in vain.
pub(crate) fn refuse_existing(out: &Path, force: bool) -> Result<()> {
    if stdio::is_meant(out) {
        bail!(
            "a snapshot is not written from front to back, as stdout would have it; give a file (one whose name is `-` \
             is ./-)"
        );
    }
    if !force && out.symlink_metadata().is_ok() {
        bail!("{} exists; give --force to replace it", out.display());
    }
    Ok(())
}

/// Refuses an output that is a file of one of these snapshots.
pub(crate) fn refuse_as_output<'a>(
    out: &Path,
    snapshots: impl IntoIterator<Item = &'a Snapshot>,
) -> Result<()> {
    snapshots.into_iter().try_for_each(|snapshot| Ok(snapvm::refuse_as_output(out, snapshot)?))
}

/// Refuses an output that is this input.
fn refuse_same(out: &Path, input: &Metadata) -> Result<()> {
    match out.metadata() {
        Ok(there) => refuse_same_file(&out.display(), &there, input),
        Err(_) => Ok(()),
    }
}

fn refuse_same_file(out: &dyn Display, there: &Metadata, input: &Metadata) -> Result<()> {
    if (input.dev(), input.ino()) == (there.dev(), there.ino()) {
        bail!("{out} is read, itself or as a parent; choose another output");
    }
    Ok(())
}

/// A snapshot to be read.
#[derive(Clone, Debug, clap::Args)]
struct Input {
    /// The snapshot.
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Of a layer: a file that may be its parent, or its parent's. Otherwise parents are looked
    /// for where the layer says, and in the folders of $SNAP_PATH, by name and then by id.
    #[arg(long = "parent", value_name = "FILE")]
    parents: Vec<PathBuf>,
}

impl Input {
    fn open(&self) -> Result<Snapshot> {
        open(&self.file, &self.parents)
    }

    /// Opens another snapshot, whose parents may be the same.
    fn beside(&self, path: &Path) -> Result<Snapshot> {
        open(path, &self.parents)
    }
}
