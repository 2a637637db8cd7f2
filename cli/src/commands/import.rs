//! `snap import`: store a memory image, or a snapshot of another virtual machine monitor.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde_json::{Value, json};
use snapfmt::layout::{MAGIC, PAGE_BYTES};
use snapfmt::{Contents, Header, Metadata, StateBlob, write_snapshot};

use super::cat::parse_address;
use super::summary::Written;
use crate::exit::BadInput;
use crate::foreign::firecracker::{self, Arch, VMSTATE};
use crate::foreign::memory_file::{Layout, MemoryFile};
use crate::foreign::{self, cloud_hypervisor};
use crate::input::{reading, refuse_existing};
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdio;
use crate::stdout::print_line;
use crate::storage::Storage;

/// Store a memory image, or a snapshot of Firecracker or Cloud Hypervisor, in one file.
///
/// Memory is compressed page by page and zeros are not stored; the other program's state is kept
/// as it is. `snap export` gives every byte back.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap import memory.raw -o guest.snap                      a flat dump of memory
  snap import mem.file --vmstate vm.state -o guest.snap     a Firecracker snapshot
  snap import snapshot-dir -o guest.snap                    a Cloud Hypervisor snapshot
  snap import pc.ram -o guest.snap --region 0:3G --region 4G:1G
  zstd -dc memory.raw.zst | snap import - -o guest.snap
  snap import memory.raw -o small.snap --level 19 --chunk-pages 512")]
pub(crate) struct Args {
    /// A file of guest memory, `-` for stdin, or the folder of a Cloud Hypervisor snapshot.
    #[arg(value_name = "MEMORY|FOLDER")]
    input: PathBuf,

    /// The file to write. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap")]
    out: PathBuf,

    /// The vmstate file of a Firecracker snapshot; its memory file is then MEMORY.
    #[arg(long, value_name = "FILE")]
    vmstate: Option<PathBuf>,

    /// Where a part of MEMORY lies in the guest, in the order of the file; once for each part.
    /// Unless told, memory starts at 0 without gaps, or where Firecracker puts it.
    #[arg(long = "region", value_name = "GPA:SIZE")]
    regions: Vec<Region>,

    #[command(flatten)]
    storage: Storage,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// A guest-physical range as the user gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Region(std::ops::Range<u64>);

impl FromStr for Region {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (gpa, len) = text.split_once(':').context("expected GPA:SIZE, like 4G:1G")?;
        let (gpa, len) = (parse_address(gpa)?, parse_address(len)?);
        let end = gpa.checked_add(len).context("it ends above 2^64")?;
        Ok(Self(gpa..end))
    }
}

/// What was stored.
#[derive(Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    written: Written<'a>,
    /// `raw`, `firecracker` or `cloud-hypervisor`.
    source: &'static str,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let started = Instant::now();
    // Before anything is read, which would be in vain.
    args.storage.options()?;
    refuse_existing(&args.out, args.storage.force)?;
    let folder = !stdio::is_meant(&args.input) && args.input.is_dir();
    let imported = match &args.vmstate {
        Some(_) if folder => bail!("--vmstate goes with a memory file, not with a folder"),
        Some(vmstate) => Imported::firecracker(args, vmstate)?,
        None if folder && !args.regions.is_empty() => {
            bail!("--region goes with a memory file; a folder says itself where memory lies")
        }
        None if folder => Imported::cloud_hypervisor(&args.input, session.quiet)?,
        None => Imported::raw(args)?,
    };
    snapvm::refuse_same(&args.out, &imported.memory.metadata()?)?;
    let header = imported.store(args, session)?;
    let written = Written::new(&args.out, &header, started);
    let summary = Summary { written, source: imported.kind };
    if args.json {
        print_line(serde_json::to_string_pretty(&summary)?)?;
    } else if !session.quiet {
        print_line(format_args!(
            "{}: {} memory {}, non-zero {}, file {} (ratio {:.2}), {:.0} ms",
            summary.written.file.display(),
            summary.source,
            size::human(summary.written.memory_bytes),
            size::human(summary.written.nonzero_bytes),
            size::human(summary.written.file_bytes),
            summary.written.ratio,
            summary.written.total_ms,
        ))?;
    }
    Ok(())
}

/// What another program's files hold.
struct Imported {
    kind: &'static str,
    memory: MemoryFile,
    states: Vec<StateBlob>,
    /// For the metadata.
    source: Value,
}

impl Imported {
    fn raw(args: &Args) -> Result<Self> {
        let (file, len, path) = memory(args)?;
        let layout = layout(path, &args.regions, || vec![0..len])?;
        let memory = MemoryFile::new(file, path, layout)?;
        Ok(Self { kind: "raw", memory, states: Vec::new(), source: json!({ "kind": "raw" }) })
    }

    fn firecracker(args: &Args, vmstate: &Path) -> Result<Self> {
        let state = VMSTATE.read(vmstate)?;
        let (file, len, path) = memory(args)?;
        let regions = &args.regions;
        let arch = Arch::of_vmstate(&state.bytes);
        if regions.is_empty() {
            if !len.is_multiple_of(firecracker::MEMORY_UNIT) {
                return Err(BadInput::of(anyhow!(
                    "{}: {len} bytes are not whole MiB, as a Firecracker guest's memory is; \
                     the file was cut short or is something else",
                    path.display()
                )));
            }
            if arch.is_none() {
                return Err(BadInput::of(anyhow!(
                    "{} does not start like a vmstate of Firecracker; if it is one, say with \
                     --region where memory lies",
                    vmstate.display()
                )));
            }
        }
        let layout = layout(path, regions, || arch.map_or(vec![], |arch| arch.ranges(len)))?;
        let memory = MemoryFile::new(file, path, layout)?;
        let source = json!({ "kind": "firecracker", "arch": arch.map(Arch::name) });
        Ok(Self { kind: "firecracker", memory, states: vec![state], source })
    }

    fn cloud_hypervisor(folder: &Path, quiet: bool) -> Result<Self> {
        use cloud_hypervisor::{CONFIG, MEMORY, STATE};
        let state_path = folder.join(STATE.name);
        let not_one = || format!("{} is no snapshot folder of Cloud Hypervisor", folder.display());
        let state = STATE.read(&state_path).with_context(not_one)?;
        let config = CONFIG.read(&folder.join(CONFIG.name)).with_context(not_one)?;
        let layout = cloud_hypervisor::ranges(&state.bytes)
            .and_then(|ranges| Layout::new(&ranges))
            .with_context(|| state_path.display().to_string())
            .map_err(BadInput::of)?;
        let path = folder.join(MEMORY);
        let (file, _) = open_memory(&path).with_context(not_one)?;
        let memory = MemoryFile::new(file, &path, layout).map_err(BadInput::of)?;
        if !quiet {
            tell_of_others(folder, &[CONFIG.name, STATE.name, MEMORY])?;
        }
        let source = json!({ "kind": "cloud-hypervisor" });
        Ok(Self { kind: "cloud-hypervisor", memory, states: vec![config, state], source })
    }

    fn store(&self, args: &Args, session: &Session) -> Result<Header> {
        let options = args.storage.options()?;
        let bar = Bar::new("importing", session.quiet, &session.interrupt);
        let data = self
            .memory
            .data()
            .with_context(|| format!("cannot find the data in {}", args.input.display()))?;
        let mut other = serde_json::Map::new();
        other.insert("source".into(), self.source.clone());
        let contents = Contents::new(self.memory.regions(), &self.memory, &data)
            .states(&self.states)
            .metadata(
                Metadata::default()
                    .tool("snap")
                    .tool_version(env!("CARGO_PKG_VERSION"))
                    .other(other),
            );
        let written = write_snapshot(&args.out, contents, &options, &|p| bar.update(p));
        // An error of the memory does not say which file it is.
        let (header, _) = written.with_context(|| format!("import of {}", args.input.display()))?;
        Ok(header)
    }
}

/// The file of memory that is given, or stdin; its length, and what it is called.
fn memory(args: &Args) -> Result<(File, u64, &Path)> {
    if !stdio::is_meant(&args.input) {
        let (file, len) = open_memory(&args.input)?;
        return Ok((file, len, &args.input));
    }
    let path = Path::new("stdin");
    let folder = args.out.parent().filter(|folder| *folder != Path::new(""));
    let folder = folder.unwrap_or(Path::new("."));
    let file = stdio::stdin(folder, |start| check_start(path, start))?;
    let len = check_length(path, &file)?;
    Ok((file, len, path))
}

/// Opens a file of memory and gives its length; refuses what is surely none, before it is stored
/// as if it were.
fn open_memory(path: &Path) -> Result<(File, u64)> {
    let _reading = reading(path);
    let file = foreign::state::open(path)?;
    let mut start = Vec::new();
    (&file).take(8).read_to_end(&mut start).with_context(|| path.display().to_string())?;
    check_start(path, &start)?;
    let len = check_length(path, &file)?;
    Ok((file, len))
}

/// Refuses a file that begins as others than memory do.
fn check_start(path: &Path, start: &[u8]) -> Result<()> {
    let named = path.display();
    let problem = if start == MAGIC {
        anyhow!("{named} is a snapshot already")
    } else if start.starts_with(b"\x7fELF") {
        anyhow!("{named} is an ELF file, not a flat image of memory")
    } else {
        return Ok(());
    };
    Err(BadInput::of(problem))
}

fn check_length(path: &Path, file: &File) -> Result<u64> {
    let named = || path.display().to_string();
    let len = file.metadata().with_context(named)?.len();
    let problem = if len == 0 {
        anyhow!("{} is empty", named())
    } else if !len.is_multiple_of(PAGE_BYTES as u64) {
        anyhow!("{}: {len} bytes are not whole pages of {PAGE_BYTES} bytes", named())
    } else {
        return Ok(len);
    };
    Err(BadInput::of(problem))
}

/// The layout that the user gives, or else the program's own.
fn layout(
    path: &Path,
    given: &[Region],
    own: impl FnOnce() -> Vec<std::ops::Range<u64>>,
) -> Result<Layout> {
    if given.is_empty() {
        return Layout::new(&own()).with_context(|| path.display().to_string());
    }
    let ranges: Vec<_> = given.iter().map(|region| region.0.clone()).collect();
    Layout::new(&ranges).context("--region")
}

/// Files in the folder that do not belong to the snapshot are not stored, which is worth a line.
fn tell_of_others(folder: &Path, known: &[&str]) -> Result<()> {
    let named = || folder.display().to_string();
    for entry in std::fs::read_dir(folder).with_context(named)? {
        let name = entry.with_context(named)?.file_name();
        if !known.iter().any(|ours| name == *ours) {
            eprintln!("snap: {} is not stored", folder.join(name).display());
        }
    }
    Ok(())
}
