//! `snap import`: store a memory image, or a snapshot of another virtual machine monitor.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use snapfmt::WriteError;
use snapfmt::layout::PAGE_BYTES;
use snapvm::interchange::{Import, ImportError, MemoryImage, NotMemory, VMSTATE};

use super::cat::parse_address;
use super::summary::{Pages, Written};
use crate::foreign_text::one_line;
use crate::input::{self, reading, refuse_as_output, refuse_existing};
use crate::keys::KeyArgs;
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdio::Origin;
use crate::stdout::{print_json, print_line};
use crate::storage::Storage;
use crate::{stderr, stdio};

/// Import a memory image, or a snapshot of Firecracker, Cloud Hypervisor or QEMU, into one file.
///
/// Memory is compressed and zeros are not stored; the other program's state is kept
/// unchanged. `snap export` writes every byte of it out again.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap import memory.raw -o guest.snap                      a flat dump of memory
  snap import mem.file --vmstate vm.state -o guest.snap     a Firecracker snapshot
  snap import diff.mem --vmstate diff.state --base guest.snap -o later.snap     a Firecracker diff snapshot
  snap import diff.mem --vmstate diff.state --base guest.snap --layer -o later.snap     only its pages
  snap import snapshot-dir -o guest.snap                    a Cloud Hypervisor snapshot
  snap import migration -o guest.snap                       QEMU: `migrate file:migration` with mapped-ram
  snap import pc.ram -o guest.snap --region 0:3G --region 4G:1G
  zstd -dc memory.raw.zst | snap import - -o guest.snap
  snap import memory.raw -o small.snap --level 19 --chunk-pages 512")]
pub(crate) struct Args {
    /// A file of guest memory, `-` for stdin; the folder of a Cloud Hypervisor snapshot; or a file that QEMU has written
    /// by `migrate file:PATH` with the capability mapped-ram.
    #[arg(value_name = "MEMORY|FOLDER")]
    input: PathBuf,

    /// The file to write. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap")]
    out: PathBuf,

    /// The vmstate file of a Firecracker snapshot; its memory file is then MEMORY.
    #[arg(long, value_name = "FILE")]
    vmstate: Option<PathBuf>,

    /// MEMORY is of a Firecracker diff snapshot: take what it does not have, its holes, from this snapshot, and write a
    /// whole one. BASE.snap is the full snapshot, or the one of the last diff before this.
    #[arg(
        long,
        value_name = "BASE.snap",
        requires = "vmstate",
        conflicts_with = "holes_are_zeros"
    )]
    base: Option<PathBuf>,

    /// Write only the pages of the diff snapshot: OUT.snap is a layer of BASE.snap, which must stay.
    #[arg(long, requires = "base")]
    layer: bool,

    /// The holes of a Firecracker snapshot's MEMORY are zeros: it is a full one that was copied sparsely, as by
    /// `cp --sparse` or `snap export`.
    #[arg(long, requires = "vmstate")]
    holes_are_zeros: bool,

    /// Where a part of MEMORY lies in the guest, in the order of the file; once for each part. Of a file of QEMU: a part
    /// of main memory. The default: memory starts at 0 without gaps, or where Firecracker or QEMU's machine puts it.
    #[arg(long = "region", value_name = "GPA:SIZE")]
    regions: Vec<Region>,

    #[command(flatten)]
    storage: Storage,

    #[command(flatten)]
    keys: KeyArgs,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// A guest-physical range as the user gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Region(Range<u64>);

impl FromStr for Region {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (gpa, len) = text.split_once(':').context("expected GPA:SIZE, like 4G:1G")?;
        let (gpa, len) = (parse_address(gpa)?, parse_address(len)?);
        let end = gpa.checked_add(len).context("it ends above 2^64")?;
        Ok(Self(gpa..end))
    }
}

/// The summary of an import.
#[derive(Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    written: Written<'a>,
    /// `raw`, `firecracker`, `cloud-hypervisor` or `qemu`.
    source: &'static str,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let started = Instant::now();
    // Before anything is read, which would be in vain.
    args.storage.options(&args.keys)?;
    refuse_existing(&args.out, args.storage.force)?;
    let folder = !stdio::is_meant(&args.input) && args.input.is_dir();
    let imported = match &args.vmstate {
        Some(_) if folder => bail!("--vmstate goes with a memory file, not with a folder"),
        Some(vmstate) => firecracker(args, vmstate)?,
        None if folder && !args.regions.is_empty() => {
            bail!("--region goes with a memory file; a folder contains its own memory ranges")
        }
        None if folder => cloud_hypervisor(&args.input, session.quiet)?,
        None => match memory_image(args) {
            Ok(image) => in_regions(args, |ranges| Import::raw(image, ranges))?,
            Err(error) if is_of_qemu(&error) && !stdio::is_meant(&args.input) => {
                let _reading = reading(&args.input);
                in_regions(args, |ranges| Import::qemu(&args.input, ranges))?
            }
            Err(error) if is_of_qemu(&error) => {
                return Err(error.context("give its name instead of -"));
            }
            Err(error) => return Err(error),
        },
    };
    let memory = imported.memory_metadata().context("cannot look at the memory file")?;
    snapvm::refuse_same(&args.out, &memory)?;
    refuse_as_output(&args.out, imported.base())?;
    let options = args.storage.options(&args.keys)?;
    let bar = Bar::new("importing", session.quiet, &session.interrupt);
    let progress = |progress| bar.update(progress);
    let header = match (&args.base, imported.base()) {
        (Some(given), Some(base)) if args.layer => {
            // In a bucket, it is the object that the name has now.
            let path = base.paths().next().flatten().unwrap_or(given);
            let path = snapvm::path_of_parent(base.storage(), path, &args.out)?;
            let written = imported.write_layer(&args.out, path, &options, &progress);
            written.map_err(|error| in_base(error, given))?
        }
        _ => imported.write(&args.out, &options, &progress)?,
    };
    if imported.has_left_out() {
        stderr::print(LEFT_OUT);
    }
    let written = Written::new(&args.out, &header, started);
    let summary = Summary { written, source: imported.kind() };
    if args.json {
        print_json(&summary)?;
    } else if !session.quiet {
        print_line(format_args!(
            "{}: {} memory {}, non-zero {}, {}file {} (ratio {:.2}), {:.0} ms",
            summary.written.file.display(),
            summary.source,
            size::human(summary.written.memory_bytes),
            size::human(summary.written.nonzero_bytes),
            unchanged(&summary.written.pages),
            size::human(summary.written.file_bytes),
            summary.written.ratio,
            summary.written.total_ms,
        ))?;
    }
    Ok(())
}

/// The part of a layer's summary that other snapshots have not.
fn unchanged(pages: &Pages) -> String {
    match pages.parent * PAGE_BYTES as u64 {
        0 => String::new(),
        bytes => format!("unchanged {}, ", size::human(bytes)),
    }
}

/// Of the file of a guest that ran while QEMU wrote it.
const LEFT_OUT: &str = "snap: pages that became zero after QEMU had written them are not kept; QEMU does not read them\n";

fn is_of_qemu(error: &anyhow::Error) -> bool {
    let found = error.downcast_ref();
    matches!(found, Some(ImportError::NotMemory { found: NotMemory::QemuMigration, .. }))
}

fn firecracker(args: &Args, vmstate: &Path) -> Result<Import> {
    let state = {
        let _reading = reading(vmstate);
        VMSTATE.read(vmstate)?
    };
    let image = memory_image(args)?;
    let imported = in_regions(args, |ranges| Import::firecracker(image, state, ranges));
    imported.map_err(|error| match error.downcast_ref() {
        Some(ImportError::NoVmstate) => error.context(format!("{} (--region)", vmstate.display())),
        Some(ImportError::Holes { .. }) => anyhow!("{error}. {HOLES}"),
        Some(ImportError::OtherBase { .. }) => error.context("--base"),
        _ => error,
    })
}

/// An error of the base with its name.
fn in_base(error: ImportError, base: &Path) -> anyhow::Error {
    match error {
        ImportError::Write { error: WriteError::Parent(_), .. } => {
            anyhow::Error::new(error).context(base.display().to_string())
        }
        error => error.into(),
    }
}

/// What to do about a memory file with holes.
const HOLES: &str = "\
If it is one, give the snapshot on which it is based by --base. If it is a full one that was copied sparsely, give \
--holes-are-zeros";

fn cloud_hypervisor(folder: &Path, quiet: bool) -> Result<Import> {
    let imported = {
        let _reading = reading(folder);
        Import::cloud_hypervisor(folder)?
    };
    if !quiet {
        report_other_files(folder)?;
    }
    Ok(imported)
}

/// Imports with the user's regions, if there are some.
fn in_regions(
    args: &Args,
    import: impl FnOnce(Option<&[Range<u64>]>) -> Result<Import, ImportError>,
) -> Result<Import> {
    let ranges: Vec<_> = args.regions.iter().map(|region| region.0.clone()).collect();
    let ranges = (!ranges.is_empty()).then_some(&ranges[..]);
    import(ranges).map_err(|error| match error {
        ImportError::Ranges(_) => anyhow::Error::new(error).context("--region"),
        error => error.into(),
    })
}

/// The memory image: a file, or stdin.
fn memory_image(args: &Args) -> Result<MemoryImage> {
    let image = match stdio::is_meant(&args.input) {
        false => {
            let _reading = reading(&args.input);
            MemoryImage::open(&args.input)?
        }
        true => image_from_stdin(args)?,
    };
    Ok(match &args.base {
        Some(base) => image.with_base(input::open(base, &args.keys.clone().into())?),
        None if args.holes_are_zeros => image.holes_are_zeros(),
        None => image,
    })
}

fn image_from_stdin(args: &Args) -> Result<MemoryImage> {
    let path = Path::new("stdin");
    let folder = args.out.parent().filter(|folder| *folder != Path::new(""));
    let folder = folder.unwrap_or(Path::new("."));
    let (file, origin) = stdio::stdin(folder, |start| Ok(MemoryImage::check_start(path, start)?))?;
    let image = MemoryImage::from_file(file, path)?;
    Ok(match origin {
        Origin::File => image,
        Origin::Stream if args.base.is_some() => bail!(
            "--base: a diff is told from zeros by its holes, which do not come through a pipe; give the file, or redirect \
             it (< FILE)"
        ),
        Origin::Stream => image.holes_are_zeros(),
    })
}

/// Reports each file in the folder that does not belong to the snapshot: it is not imported.
fn report_other_files(folder: &Path) -> Result<()> {
    let named = || folder.display().to_string();
    for entry in std::fs::read_dir(folder).with_context(named)? {
        let name = entry.with_context(named)?.file_name();
        if !Import::cloud_hypervisor_files().iter().any(|ours| name == *ours) {
            let path = folder.join(name).display().to_string();
            stderr::print(&format!("snap: {} is not stored\n", one_line(&path)));
        }
    }
    Ok(())
}
