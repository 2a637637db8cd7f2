//! `snap export`: a snapshot becomes the files of another program, or an ELF core.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use snapfmt::{ReadError, Snapshot, Storage};
use snapvm::interchange::{Export, ExportError, ExportFormat};

use crate::exit::WrongOptions;
use crate::input::{Input, refuse_as_output};
use crate::leftovers::staged_output;
use crate::millis::ms;
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdio::{self, NOT_ALL, Stdout};
use crate::stdout::print_line;

/// Export a snapshot: as a flat image of memory, an ELF core, or the files it was imported from.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap export guest.snap --format raw -o memory.raw                 flat and sparse
  snap export guest.snap --format elf -o guest.core                 for readelf, gdb, crash, drgn
  snap export guest.snap --format raw -o - | zstd > memory.raw.zst
  snap export guest.snap --format firecracker -o snapshot-dir       memory and vmstate
  snap export guest.snap --format cloud-hypervisor -o snapshot-dir
  snap export guest.snap --format qemu -o migration                 for -incoming file:migration")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// What to write.
    #[arg(long)]
    format: Format,

    /// The file, or for firecracker and cloud-hypervisor the folder, to write. It appears when
    /// it is complete. For raw and elf also `-`: stdout.
    #[arg(short, long, value_name = "OUT")]
    out: PathBuf,

    /// With --format firecracker: switch KVM's asynchronous page faults off in the vmstate. Guests that have them on are
    /// slow while their pages are loaded (docs/serving.md). Everything else stays as it was imported.
    #[arg(long)]
    no_async_pf: bool,

    /// Write the content of a sealed snapshot: these formats are not encrypted.
    #[arg(long)]
    decrypt: bool,

    /// Replace OUT if it exists.
    #[arg(long, short)]
    force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Guest memory as it is, regions laid end to end, zeros as holes.
    Raw,
    /// An ELF core with one segment a region, as QEMU's dump-guest-memory makes it.
    Elf,
    /// A folder with memory and vmstate.
    Firecracker,
    /// A folder with config.json, state.json and memory-ranges.
    CloudHypervisor,
    /// A mapped-ram file, for -incoming file:PATH of QEMU.
    Qemu,
}

impl From<Format> for ExportFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Elf => Self::Elf,
            Format::Firecracker => Self::Firecracker,
            Format::CloudHypervisor => Self::CloudHypervisor,
            Format::Qemu => Self::Qemu,
        }
    }
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let started = Instant::now();
    let snapshot = args.input.open()?;
    if snapshot.keys().is_some() && !args.decrypt {
        bail!(
            "{}: the snapshot is sealed, and the output is not encrypted: --decrypt writes it all the same",
            args.input.file.display()
        );
    }
    if args.no_async_pf && args.format != Format::Firecracker {
        let wrong =
            "--no-async-pf changes a Firecracker vmstate: it goes with --format firecracker";
        return Err(WrongOptions(wrong.into()).into());
    }
    let to_stdout = stdio::is_meant(&args.out);
    if to_stdout && args.format == Format::Qemu {
        bail!(
            "this format is not written from front to back, as stdout would have it; give a name with -o"
        );
    }
    if to_stdout && !matches!(args.format, Format::Raw | Format::Elf) {
        bail!("this format is a folder of files, which stdout cannot be; give its name with -o");
    }
    let named = || args.input.file.display().to_string();
    let mut export = Export::new(&snapshot, args.format.into()).with_context(named)?;
    if args.no_async_pf {
        export = export.without_async_page_faults().with_context(named)?;
    }
    if to_stdout {
        return stream(&export, &snapshot, args, session);
    }
    refuse_as_output(&args.out, [&snapshot])?;
    let out = staged_output(&args.out, export.shape(), args.force)?;
    let bar = Bar::new("exporting", session.quiet, &session.interrupt);
    export.write(&out, &|progress| bar.update(progress)).map_err(|error| named_in(error, args))?;
    out.publish()?;
    if !session.quiet {
        print_line(format_args!(
            "{}: memory {}, {:.0} ms",
            args.out.display(),
            size::human(snapshot.header().memory_bytes),
            ms(started.elapsed())
        ))?;
    }
    Ok(())
}

/// Writes the output to stdout, from front to back.
fn stream(export: &Export<'_>, snapshot: &Snapshot, args: &Args, session: &Session) -> Result<()> {
    let mut stdout = Stdout::new()?;
    for file in snapshot.storages().filter_map(Storage::file) {
        let input = file.metadata().context("cannot identify the file of an open snapshot")?;
        let there = stdout.file().metadata()?;
        if (there.dev(), there.ino()) == (input.dev(), input.ino()) {
            bail!("stdout is the input, or a parent of it; choose another output");
        }
    }
    // It waits for its reader, which `stdout` reports.
    let bar = Bar::of_other("exporting", session.quiet, &session.interrupt);
    export
        .stream(&mut stdout, &|progress| bar.update(progress))
        .map_err(|error| named_in(error, args))?;
    stdout.finish()
}

/// An error of the snapshot with the file's name. The user's Ctrl-C is no fault of the file.
fn named_in(error: ExportError, args: &Args) -> anyhow::Error {
    match error {
        ExportError::Read(error @ ReadError::Cancelled) => error.into(),
        ExportError::Read(error) => {
            anyhow::Error::new(error).context(args.input.file.display().to_string())
        }
        ExportError::Stream(error) => anyhow::Error::new(error).context(NOT_ALL),
        error => error.into(),
    }
}
