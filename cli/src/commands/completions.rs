//! `snap completions` and `snap man`: completion scripts and manual pages, generated from the definition of the command
//! line.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Command, ValueEnum};
use clap_complete::Shell;

use crate::stdout::to_stdout;

/// Print the completion script of a shell.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap completions bash > ~/.local/share/bash-completion/completions/snap
  snap completions zsh > ~/.zfunc/_snap
  snap completions fish > ~/.config/fish/completions/snap.fish")]
pub(crate) struct CompletionsArgs {
    /// The shell.
    shell: KnownShell,
}

/// Shells that complete `snap`.
#[derive(Clone, Copy, ValueEnum)]
enum KnownShell {
    Bash,
    Zsh,
    Fish,
}

/// `cli`: the whole command line.
pub(crate) fn completions(args: &CompletionsArgs, mut cli: Command) -> Result<()> {
    let shell = match args.shell {
        KnownShell::Bash => Shell::Bash,
        KnownShell::Zsh => Shell::Zsh,
        KnownShell::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut cli, "snap", &mut script);
    to_stdout(|out| Ok(out.write_all(&script)?))
}

/// Write the manual pages, one for each command, into a folder.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap man ~/.local/share/man/man1 && man snap-create")]
pub(crate) struct ManArgs {
    /// The folder, which is created if it is missing. Pages of an older snap are replaced.
    #[arg(value_name = "FOLDER", required_unless_present = "out", conflicts_with = "out")]
    folder: Option<PathBuf>,

    /// The same, as in other commands.
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

/// `cli`: the whole command line.
pub(crate) fn man(args: &ManArgs, cli: Command) -> Result<()> {
    // One of the two is given.
    let folder = args.folder.as_deref().or(args.out.as_deref()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    clap_mangen::generate_to(cli, folder)
        .with_context(|| format!("cannot write manual pages into {}", folder.display()))
}
