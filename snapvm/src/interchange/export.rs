//! Exports a snapshot to files of other programs.

use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ChunkBuffer, OnProgress, PageIndex, Progress, ReadError, Snapshot};

use super::cloud_hypervisor::{self, CONFIG, STATE};
use super::error::ExportError;
use super::file_view::FileView;
use super::firecracker::{self, GuestArch, VMSTATE};
use super::layout::ImageLayout;
use super::qemu::{LAZY, MAPPED_RAM, Skeleton};
use super::{async_pf, elf};
use crate::staged_output::{OutputShape, StagedOutput};

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The format of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExportFormat {
    /// The regions of guest memory, one after the other.
    Raw,
    /// An ELF core with one segment for each region, as QEMU's `dump-guest-memory` writes it.
    Elf,
    /// A folder with `memory` and `vmstate`.
    Firecracker,
    /// A folder with `config.json`, `state.json` and `memory-ranges`.
    CloudHypervisor,
    /// A mapped-ram file, for `-incoming file:PATH` of QEMU.
    Qemu,
}

/// An export for which the snapshot has all data.
pub struct Export<'a> {
    snapshot: &'a Snapshot,
    format: ExportFormat,
    layout: ImageLayout,
    /// Bytes around memory in its file, with their offsets: the headers of an ELF core.
    others: Vec<(u64, Vec<u8>)>,
    /// The length of the file with memory.
    file_bytes: u64,
    /// Of a mapped-ram file.
    skeleton: Option<Skeleton>,
    /// The other files, by name.
    files: Vec<(&'static str, Vec<u8>)>,
}

impl<'a> Export<'a> {
    /// Reads what the format needs besides memory.
    ///
    /// # Errors
    /// [`ExportError`]: the snapshot was not imported from files of this format, is damaged, or contradicts itself.
    pub fn new(snapshot: &'a Snapshot, format: ExportFormat) -> Result<Self, ExportError> {
        let (mut others, mut skeleton) = (Vec::new(), None);
        let mut files = Vec::new();
        let layout = match format {
            ExportFormat::Raw => ImageLayout::linear(snapshot.regions(), 0),
            ExportFormat::Elf => {
                let head = elf::headers(snapshot.regions(), arch(snapshot)?);
                let layout = ImageLayout::linear(snapshot.regions(), head.len() as u64);
                others.push((0, head));
                layout
            }
            ExportFormat::Firecracker => {
                files.push((VMSTATE.name, VMSTATE.bytes_in(snapshot)?));
                ImageLayout::linear(snapshot.regions(), 0)
            }
            ExportFormat::CloudHypervisor => {
                let state = STATE.bytes_in(snapshot)?;
                files.push((CONFIG.name, CONFIG.bytes_in(snapshot)?));
                let layout = cloud_hypervisor::layout(Path::new(STATE.name), &state)
                    .map_err(ExportError::State)?;
                if layout.regions != snapshot.regions() {
                    return Err(ExportError::MemoryMap { what: STATE.name });
                }
                files.push((STATE.name, state));
                layout
            }
            ExportFormat::Qemu => {
                let what = MAPPED_RAM.what;
                let decoded = Skeleton::decode(&MAPPED_RAM.bytes_in(snapshot)?);
                let decoded = decoded.ok_or(ExportError::Skeleton { what })?;
                let layout = ImageLayout::placed(decoded.memory.clone());
                let layout = layout.map_err(|_| ExportError::Skeleton { what })?;
                if layout.regions != snapshot.regions() {
                    return Err(ExportError::MemoryMap { what });
                }
                others.clone_from(&decoded.kept);
                skeleton = Some(decoded);
                layout
            }
        };
        let file_bytes =
            skeleton.as_ref().map_or(layout.file_bytes(), |skeleton| skeleton.file_bytes);
        Ok(Self { snapshot, format, layout, others, file_bytes, skeleton, files })
    }

    /// Switches KVM's asynchronous page faults off in the vmstate. Only their MSR and the checksum change. A guest with
    /// them on waits milliseconds for each page that is loaded lazily (Linux, Documentation/virt/kvm/x86/msr.rst,
    /// `MSR_KVM_ASYNC_PF_EN`).
    ///
    /// # Errors
    /// [`ExportError::NotFirecracker`]; [`ExportError::AsyncPageFaults`].
    pub fn without_async_page_faults(mut self) -> Result<Self, ExportError> {
        let vmstate = self.files.iter_mut().find(|(name, _)| *name == VMSTATE.name);
        let (_, bytes) = vmstate.ok_or(ExportError::NotFirecracker)?;
        *bytes = async_pf::switched_off(bytes)?;
        Ok(self)
    }

    /// The shape of the output that [`Export::write`] fills.
    #[must_use]
    pub fn shape(&self) -> OutputShape {
        match self.format {
            ExportFormat::Raw | ExportFormat::Elf | ExportFormat::Qemu => OutputShape::File,
            ExportFormat::Firecracker => OutputShape::Folder(&[firecracker::MEMORY, VMSTATE.name]),
            ExportFormat::CloudHypervisor => {
                OutputShape::Folder(&[CONFIG.name, STATE.name, cloud_hypervisor::MEMORY])
            }
        }
    }

    /// The files of the output, to be read without writing them. A format of one file has the name `memory.raw`,
    /// `memory.core` or `migration`. QEMU's has another view, `migration-lazy`: the same without the pages of main memory,
    /// for a QEMU that maps them from `memory.raw`.
    #[must_use]
    pub fn views(&self) -> Vec<FileView> {
        let memory = match self.format {
            ExportFormat::Raw => "memory.raw",
            ExportFormat::Elf => "memory.core",
            ExportFormat::Firecracker => firecracker::MEMORY,
            ExportFormat::CloudHypervisor => cloud_hypervisor::MEMORY,
            ExportFormat::Qemu => MAPPED_RAM.name,
        };
        let lazy = self.skeleton.as_ref().map(|skeleton| {
            let mut layout = self.layout.clone();
            layout.extents.retain(|part| !skeleton.main_pages.contains(&part.file_offset));
            let others = skeleton.without_main();
            FileView::of_memory(LAZY, &others, &layout, self.file_bytes, self.snapshot)
        });
        let bytes = self.files.iter().map(|(name, bytes)| FileView::of_bytes(name, bytes.clone()));
        let memory =
            FileView::of_memory(memory, &self.others, &self.layout, self.file_bytes, self.snapshot);
        bytes.chain([memory]).chain(lazy).collect()
    }

    /// Writes the output, with pages of zeros as holes. [`StagedOutput::publish`] renames it to its path.
    ///
    /// `progress` is called on the writing threads; `Break` cancels.
    ///
    /// # Errors
    /// [`ExportError::Output`]; [`ExportError::Write`]; [`ExportError::Read`].
    pub fn write(&self, out: &StagedOutput, progress: OnProgress<'_>) -> Result<(), ExportError> {
        for (name, bytes) in &self.files {
            let mut file = out.file_named(name)?;
            file.write_all(bytes).map_err(ExportError::write(out.path()))?;
        }
        let memory = match self.format {
            ExportFormat::Raw | ExportFormat::Elf | ExportFormat::Qemu => out.file()?,
            ExportFormat::Firecracker => out.file_named(firecracker::MEMORY)?,
            ExportFormat::CloudHypervisor => out.file_named(cloud_hypervisor::MEMORY)?,
        };
        for (offset, bytes) in &self.others {
            memory.write_all_at(bytes, *offset).map_err(ExportError::write(out.path()))?;
        }
        self.write_memory(&memory, out.path(), progress)
    }

    /// Writes every page that is not zero to its place; the rest stays a hole.
    fn write_memory(
        &self,
        file: &File,
        out: &Path,
        progress: OnProgress<'_>,
    ) -> Result<(), ExportError> {
        file.set_len(self.file_bytes).map_err(ExportError::write(out))?;
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let failed = Mutex::new(None::<io::Error>);
        let failure = || failed.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = self.snapshot.load(
            threads,
            &|source_offset, bytes| {
                if let Err(error) = self.layout.write(file, source_offset, bytes) {
                    failure().get_or_insert(error);
                }
            },
            &|at| match failure().is_some() {
                true => ControlFlow::Break(()),
                false => progress(at),
            },
        );
        if let Some(error) = failure().take() {
            return Err(ExportError::write(out)(error));
        }
        self.snapshot.release(&loaded?);
        Ok(())
    }

    /// Writes the single file of the format, raw or ELF, from front to back, including zeros.
    ///
    /// # Errors
    /// [`ExportError::Stream`], with `InvalidInput` for the other formats; [`ExportError::Read`].
    pub fn stream(&self, out: &mut dyn Write, progress: OnProgress<'_>) -> Result<(), ExportError> {
        if !matches!(self.format, ExportFormat::Raw | ExportFormat::Elf) {
            return Err(ExportError::Stream(io::ErrorKind::InvalidInput.into()));
        }
        // Of these two formats they come before memory, without gaps.
        for (_, bytes) in &self.others {
            out.write_all(bytes).map_err(ExportError::Stream)?;
        }
        let total_bytes = self.snapshot.header().memory_bytes;
        let (mut buffer, mut done_bytes) = (ChunkBuffer::new(), 0);
        for range in self.snapshot.populated() {
            write_zeros(out, range.start - done_bytes)?;
            for offset in range.clone().step_by(PAGE_BYTES) {
                // `populated` ends with memory, which has at most 2^32 pages, so the number fits.
                let page = PageIndex((offset / PAGE_BYTES as u64) as u32);
                match self.snapshot.page(page, &mut buffer)? {
                    Some(bytes) => out.write_all(bytes).map_err(ExportError::Stream)?,
                    None => write_zeros(out, PAGE_BYTES as u64)?,
                }
            }
            done_bytes = range.end;
            if progress(Progress::new(done_bytes, total_bytes)).is_break() {
                return Err(ReadError::Cancelled.into());
            }
        }
        write_zeros(out, total_bytes - done_bytes)
    }
}

fn write_zeros(out: &mut dyn Write, mut len: u64) -> Result<(), ExportError> {
    while len > 0 {
        let now = len.min(ZEROS.len() as u64);
        out.write_all(&ZEROS[..now as usize]).map_err(ExportError::Stream)?;
        len -= now;
    }
    Ok(())
}

/// The guest's architecture, which the import has recorded. Without a record it is x86-64, as for the guests of `snap`.
fn arch(snapshot: &Snapshot) -> Result<GuestArch, ReadError> {
    let metadata = snapshot.metadata()?;
    let recorded = metadata.other.get("source").and_then(|source| source.get("arch"));
    Ok(match recorded.and_then(|arch| arch.as_str()) {
        Some(name) if name == GuestArch::Aarch64.name() => GuestArch::Aarch64,
        _ => GuestArch::X86_64,
    })
}
