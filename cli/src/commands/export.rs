//! `snap export`: give a snapshot's memory, and another program's state, back as its own files.

use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ChunkBuffer, PageIndex, Progress, ReadError, Snapshot, Storage};

use crate::exit::{Interrupted, WrongOptions};
use crate::foreign::async_pf;
use crate::foreign::cloud_hypervisor;
use crate::foreign::elf;
use crate::foreign::firecracker::{self, Arch, VMSTATE};
use crate::foreign::memory_file::Layout;
use crate::foreign::staging::{Shape, Staging};
use crate::input::{Input, refuse_as_output};
use crate::millis::ms;
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdio::{self, Stdout};
use crate::stdout::print_line;

/// Give a snapshot's memory back: as a flat image, an ELF core, or the files it was imported from.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap export guest.snap --format raw -o memory.raw                 flat and sparse
  snap export guest.snap --format elf -o guest.core                 for readelf, gdb, crash, drgn
  snap export guest.snap --format raw -o - | zstd > memory.raw.zst
  snap export guest.snap --format firecracker -o snapshot-dir       memory and vmstate
  snap export guest.snap --format cloud-hypervisor -o snapshot-dir")]
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

    /// With --format firecracker: switch KVM's asynchronous page faults off in the vmstate. Guests that have them are
    /// slow while their pages come (docs/serving.md). All else stays as it was imported.
    #[arg(long)]
    no_async_pf: bool,

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
}

impl Format {
    fn shape(self) -> Shape {
        use cloud_hypervisor::{CONFIG, MEMORY, STATE};
        match self {
            Self::Raw | Self::Elf => Shape::File,
            Self::Firecracker => Shape::Folder(&[firecracker::MEMORY, VMSTATE.name]),
            Self::CloudHypervisor => Shape::Folder(&[CONFIG.name, STATE.name, MEMORY]),
        }
    }
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let started = Instant::now();
    let file = &args.input.file;
    let named = || file.display().to_string();
    let snapshot = args.input.open()?;
    if args.no_async_pf && args.format != Format::Firecracker {
        let wrong =
            "--no-async-pf changes a Firecracker vmstate: it goes with --format firecracker";
        return Err(WrongOptions(wrong.into()).into());
    }
    let to_stdout = stdio::is_meant(&args.out);
    if to_stdout && args.format.shape() != Shape::File {
        bail!("this format is a folder of files, which stdout cannot be; give its name with -o");
    }
    if !to_stdout {
        refuse_as_output(&args.out, [&snapshot])?;
    }
    let export = Export { snapshot: &snapshot, args, session };
    match args.format {
        Format::Raw => export.single(&[]),
        Format::Elf => {
            let arch = arch(&snapshot).with_context(named)?;
            export.single(&elf::headers(snapshot.regions(), arch))
        }
        Format::Firecracker => {
            let mut vmstate = VMSTATE.of(&snapshot).with_context(named)?;
            if args.no_async_pf {
                vmstate = async_pf::switched_off(&vmstate).with_context(named)?;
            }
            let layout = Layout::linear(snapshot.regions(), 0);
            export.folder(firecracker::MEMORY, &layout, &[(VMSTATE.name, &vmstate)])
        }
        Format::CloudHypervisor => {
            use cloud_hypervisor::{CONFIG, MEMORY, STATE};
            let state = STATE.of(&snapshot).with_context(named)?;
            let config = CONFIG.of(&snapshot).with_context(named)?;
            let layout = cloud_hypervisor::ranges(&state)
                .and_then(|ranges| Layout::new(&ranges))
                .with_context(|| format!("{} in {}", STATE.name, named()))?;
            if layout.regions != snapshot.regions() {
                bail!("{}: its {} and its memory map say different things", named(), STATE.name);
            }
            export.folder(MEMORY, &layout, &[(CONFIG.name, &config), (STATE.name, &state)])
        }
    }?;
    if !session.quiet && !to_stdout {
        print_line(format_args!(
            "{}: memory {}, {:.0} ms",
            args.out.display(),
            size::human(snapshot.header().memory_bytes),
            ms(started.elapsed())
        ))?;
    }
    Ok(())
}

/// The guest's architecture, as an importer noted it; this project's own guests are x86_64.
fn arch(snapshot: &Snapshot) -> Result<Arch> {
    let metadata = snapshot.metadata()?;
    let noted = metadata.other.get("source").and_then(|source| source.get("arch"));
    Ok(match noted.and_then(|arch| arch.as_str()) {
        Some(name) if name == Arch::Aarch64.name() => Arch::Aarch64,
        _ => Arch::X86_64,
    })
}

struct Export<'a> {
    snapshot: &'a Snapshot,
    args: &'a Args,
    session: &'a Session,
}

impl Export<'_> {
    /// One file: a head, and memory after it.
    fn single(&self, head: &[u8]) -> Result<()> {
        if stdio::is_meant(&self.args.out) {
            return self.stream(head);
        }
        let staging = self.staging()?;
        let file = staging.file()?;
        (&file).write_all(head).with_context(|| self.cannot_write())?;
        let layout = Layout::linear(self.snapshot.regions(), head.len() as u64);
        self.write_memory(&file, &layout)?;
        staging.publish()
    }

    /// The same to stdout, from front to back.
    fn stream(&self, head: &[u8]) -> Result<()> {
        let mut stdout = Stdout::new()?;
        for file in self.snapshot.storages().filter_map(Storage::file) {
            let input = file.metadata().context("cannot look at an open snapshot")?;
            let there = stdout.file().metadata()?;
            if (there.dev(), there.ino()) == (input.dev(), input.ino()) {
                bail!("stdout is read, itself or as a parent; choose another output");
            }
        }
        stdout.write_all(head)?;
        // It waits for its reader, which `stdout` tells.
        let bar = Bar::of_other("exporting", self.session.quiet, &self.session.interrupt);
        let named = || self.args.input.file.display().to_string();
        let total_bytes = self.snapshot.header().memory_bytes;
        let (mut buffer, mut done_bytes) = (ChunkBuffer::new(), 0);
        for range in self.snapshot.populated() {
            stdout.write_zeros(range.start - done_bytes)?;
            for offset in range.clone().step_by(PAGE_BYTES) {
                // Below the end of memory: a page.
                let page = PageIndex::containing(offset).context("above 16 TiB")?;
                match self.snapshot.page(page, &mut buffer).with_context(named)? {
                    Some(bytes) => stdout.write_all(bytes)?,
                    None => stdout.write_zeros(PAGE_BYTES as u64)?,
                }
            }
            done_bytes = range.end;
            if bar.update(Progress::new(done_bytes, total_bytes)).is_break() {
                return Err(Interrupted.into());
            }
        }
        stdout.write_zeros(total_bytes - done_bytes)?;
        stdout.finish()
    }

    /// A folder with a memory file and small files.
    fn folder(&self, memory: &str, layout: &Layout, small: &[(&str, &[u8])]) -> Result<()> {
        let staging = self.staging()?;
        for (name, bytes) in small {
            let mut file = staging.file_named(name)?;
            file.write_all(bytes).with_context(|| self.cannot_write())?;
        }
        self.write_memory(&staging.file_named(memory)?, layout)?;
        staging.publish()
    }

    fn staging(&self) -> Result<Staging> {
        Staging::new(&self.args.out, self.args.format.shape(), self.args.force)
    }

    /// Writes every page that is not zero to its place; the rest stays a hole.
    fn write_memory(&self, file: &File, layout: &Layout) -> Result<()> {
        file.set_len(layout.file_bytes()).with_context(|| self.cannot_write())?;
        let bar = Bar::new("exporting", self.session.quiet, &self.session.interrupt);
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let failed = Mutex::new(None::<io::Error>);
        let failure = || failed.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = self.snapshot.load(
            threads,
            &|source_offset, bytes| {
                if let Err(error) = layout.write(file, source_offset, bytes) {
                    failure().get_or_insert(error);
                }
            },
            &|progress| match failure().is_some() {
                true => ControlFlow::Break(()),
                false => bar.update(progress),
            },
        );
        if let Some(error) = failure().take() {
            return Err(error).with_context(|| self.cannot_write());
        }
        match loaded {
            // The user's Ctrl-C: nothing is wrong with the snapshot.
            Err(error @ ReadError::Cancelled) => Err(error.into()),
            loaded => {
                let named = || self.args.input.file.display().to_string();
                self.snapshot.release(&loaded.with_context(named)?);
                Ok(())
            }
        }
    }

    fn cannot_write(&self) -> String {
        format!("cannot write {}", self.args.out.display())
    }
}
