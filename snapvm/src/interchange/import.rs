//! Imports files of other programs into a snapshot.

use std::fs::Metadata as FileMetadata;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::json;
use snapfmt::layout::MAX_STATE_BYTES;
use snapfmt::{
    Contents, Header, Metadata, OnProgress, Parent, Snapshot, StateBlob, WriteError, WriteOptions,
    write_layer, write_snapshot,
};

use super::cloud_hypervisor::{self, CONFIG, STATE};
use super::error::ImportError;
use super::firecracker::{self, GuestArch};
use super::foreign_file;
use super::layout::ImageLayout;
use super::mapped_ram_error::MappedRamError;
use super::memory_image::{LaidOutImage, MemoryImage, data_between};
use super::qemu::{self, MAPPED_RAM, MappedRam, Skeleton, WrittenPages};
use crate::stable_file::StableFile;

/// A memory image, or a snapshot of another program, that is ready to be written to a snapshot file.
#[derive(Debug)]
pub struct Import {
    source: Source,
    memory: LaidOutImage,
    states: Vec<StateBlob>,
}

/// The kind of the imported files, for the metadata.
#[derive(Debug)]
enum Source {
    Raw,
    Firecracker(Option<GuestArch>),
    CloudHypervisor,
    Qemu { machine: String },
}

impl Import {
    /// Imports a flat image of memory. `ranges` are guest-physical, in the order of the file. `None`: memory starts at
    /// 0 and has no gaps.
    ///
    /// # Errors
    /// [`ImportError::Ranges`]
    pub fn raw(image: MemoryImage, ranges: Option<&[Range<u64>]>) -> Result<Self, ImportError> {
        let own = 0..image.len_bytes();
        let memory = match ranges {
            Some(ranges) => in_ranges(image, ranges)?,
            None => in_ranges(image, std::slice::from_ref(&own))?,
        };
        Ok(Self { source: Source::Raw, memory, states: Vec::new() })
    }

    /// Imports a memory file and the [`VMSTATE`](super::VMSTATE) of Firecracker. `ranges` are as for [`Import::raw`].
    /// `None`: the ranges that Firecracker uses for memory of that size on the architecture of the vmstate.
    ///
    /// # Errors
    /// [`ImportError::Ranges`]; [`ImportError::OtherVmstate`] if the memory is smaller than the vmstate says, or, without
    /// `ranges`, larger; [`ImportError::Holes`]; [`ImportError::OtherBase`]; without `ranges` also
    /// [`ImportError::NotMebibytes`], [`ImportError::NoVmstate`].
    pub fn firecracker(
        image: MemoryImage,
        vmstate: StateBlob,
        ranges: Option<&[Range<u64>]>,
    ) -> Result<Self, ImportError> {
        let arch = GuestArch::of_vmstate(&vmstate.bytes);
        if let Some(expected_bytes) = firecracker::memory_bytes(&vmstate.bytes) {
            let (path, found_bytes) = (image.path(), image.len_bytes());
            // The ranges may have memory that was plugged in.
            if found_bytes < expected_bytes || (found_bytes > expected_bytes && ranges.is_none()) {
                let path = path.to_owned();
                return Err(ImportError::OtherVmstate { path, found_bytes, expected_bytes });
            }
        }
        let own;
        let ranges = match (ranges, arch) {
            (Some(ranges), _) => ranges,
            (None, _) if !image.len_bytes().is_multiple_of(firecracker::MEMORY_UNIT) => {
                let (path, len_bytes) = (image.path().to_owned(), image.len_bytes());
                return Err(ImportError::NotMebibytes { path, len_bytes });
            }
            (None, None) => return Err(ImportError::NoVmstate),
            (None, Some(arch)) => {
                own = arch.ranges(image.len_bytes());
                &own
            }
        };
        image.check_holes()?;
        let memory = in_ranges(image, ranges)?;
        Ok(Self { source: Source::Firecracker(arch), memory, states: vec![vmstate] })
    }

    /// Imports a folder of Cloud Hypervisor, with [`CONFIG`], [`STATE`] and `memory-ranges`.
    ///
    /// # Errors
    /// [`ImportError`]; [`ImportError::NoCloudHypervisor`] names the file that is missing.
    pub fn cloud_hypervisor(folder: &Path) -> Result<Self, ImportError> {
        let in_folder = |error| ImportError::NoCloudHypervisor {
            folder: folder.to_owned(),
            error: Box::new(error),
        };
        let state_path = folder.join(STATE.name);
        let state = STATE.read(&state_path).map_err(in_folder)?;
        let config = CONFIG.read(&folder.join(CONFIG.name)).map_err(in_folder)?;
        let layout = cloud_hypervisor::layout(&state_path, &state.bytes)?;
        let image = MemoryImage::open(&folder.join(cloud_hypervisor::MEMORY)).map_err(in_folder)?;
        let memory = image.laid_out(layout)?;
        Ok(Self { source: Source::CloudHypervisor, memory, states: vec![config, state] })
    }

    /// Imports a file that QEMU has written by `migrate file:PATH` with the capability `mapped-ram`. `main_ranges` are the
    /// guest-physical ranges of main memory, in order. `None`: those that QEMU's machine type uses for memory of that size.
    ///
    /// # Errors
    /// [`ImportError::MappedRam`]; [`ImportError::Ranges`]; [`ImportError::StateTooLong`] if the file has more than memory
    /// and a state section take; [`ImportError::Io`].
    pub fn qemu(path: &Path, main_ranges: Option<&[Range<u64>]>) -> Result<Self, ImportError> {
        let file = StableFile::new(foreign_file::open(path)?).map_err(ImportError::io(path))?;
        let bad = |error| ImportError::MappedRam { path: path.to_owned(), error };
        let mapped = MappedRam::parse(file.file()).map_err(bad)?;
        let no_layout = |error| {
            let error = ImportError::Layout { path: path.to_owned(), error };
            match main_ranges {
                Some(_) => ImportError::Ranges(Box::new(error)),
                None => error,
            }
        };
        let placed = qemu::placed(&mapped, main_ranges).map_err(no_layout)?;
        let layout = ImageLayout::placed(placed.clone()).map_err(no_layout)?;
        let data = |range| data_between(file.file(), range);
        let skeleton = Skeleton::read(file.file(), &mapped, placed, data);
        let skeleton = skeleton.map_err(ImportError::io(path))?.ok_or_else(|| {
            let (path, what) = (path.to_owned(), MAPPED_RAM.what);
            let most_bytes = MAX_STATE_BYTES;
            ImportError::StateTooLong { path, what, len_bytes: most_bytes + 1, most_bytes }
        })?;
        let written = WrittenPages::read(file.file(), &mapped);
        let written = written.map_err(|error| bad(MappedRamError::Io(error)))?;
        // What was read is of one state of the file.
        file.check_unchanged().map_err(ImportError::io(path))?;
        let memory = LaidOutImage::of_written(file, path.to_owned(), layout, written)?;
        let source = Source::Qemu { machine: mapped.machine };
        Ok(Self { source, memory, states: vec![skeleton.encode()] })
    }

    /// Whether [`Import::write`] has left out something of the file: pages that QEMU had written to it before they became
    /// zero. QEMU does not read them, and an export has zeros there.
    #[must_use]
    pub fn has_left_out(&self) -> bool {
        self.memory.has_cleared()
    }

    /// The snapshot whose memory is in the holes of the memory file, if the caller has given one.
    #[must_use]
    pub fn base(&self) -> Option<&Snapshot> {
        self.memory.base()
    }

    /// The kind of import: `raw`, `firecracker`, `cloud-hypervisor` or `qemu`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.source {
            Source::Raw => "raw",
            Source::Firecracker(_) => "firecracker",
            Source::CloudHypervisor => "cloud-hypervisor",
            Source::Qemu { .. } => "qemu",
        }
    }

    /// The memory file's length and identity, for comparison with an output: see [`refuse_same`](crate::refuse_same).
    ///
    /// # Errors
    /// The error of fstat(2).
    pub fn memory_metadata(&self) -> io::Result<FileMetadata> {
        self.memory.file.file().metadata()
    }

    /// The files of a Cloud Hypervisor folder that an import reads.
    #[must_use]
    pub fn cloud_hypervisor_files() -> [&'static str; 3] {
        [CONFIG.name, STATE.name, cloud_hypervisor::MEMORY]
    }

    /// Writes the snapshot to a new file at `out`. Holes of the memory file are not read; pages of zeros take no space.
    ///
    /// `progress` is called on the writing threads; `Break` cancels, and leaves no file.
    ///
    /// # Errors
    /// [`ImportError::Io`]; [`ImportError::Write`], also for a memory file that has changed since it was opened.
    pub fn write(
        &self,
        out: &Path,
        options: &WriteOptions,
        progress: OnProgress<'_>,
    ) -> Result<Header, ImportError> {
        let data = self.memory.data();
        let written = write_snapshot(out, self.contents(&data), options, progress);
        Ok(written.map_err(|error| self.not_written(error))?.0)
    }

    /// Writes a layer on the [base](Import::base): the pages that the memory file has and that differ from the base. The
    /// pages of the base are neither copied nor, except for these, read. `base_path` is the path of the base that the
    /// layer will store: see [`path_of_parent`](crate::path_of_parent). Otherwise as [`Import::write`].
    ///
    /// # Errors
    /// As [`Import::write`]; [`ImportError::NoBase`] if the caller has given no base.
    pub fn write_layer(
        &self,
        out: &Path,
        base_path: impl Into<PathBuf>,
        options: &WriteOptions,
        progress: OnProgress<'_>,
    ) -> Result<Header, ImportError> {
        let no_base = || ImportError::NoBase { path: self.memory.path.clone() };
        let parent = Parent::new(self.base().ok_or_else(no_base)?, base_path);
        let contents = self.contents(self.memory.own());
        let written = write_layer(out, contents, &parent, options, progress);
        Ok(written.map_err(|error| self.not_written(error))?.0)
    }

    /// The parts of memory in `data`, as source offsets, and the states.
    fn contents<'a>(&'a self, data: &'a [Range<u64>]) -> Contents<'a> {
        let mut source = json!({ "kind": self.kind() });
        match &self.source {
            Source::Firecracker(arch) => source["arch"] = json!(arch.map(GuestArch::name)),
            Source::Qemu { machine } => source["machine"] = json!(machine),
            Source::Raw | Source::CloudHypervisor => {}
        }
        let mut other = serde_json::Map::new();
        other.insert("source".into(), source);
        let metadata =
            Metadata::default().tool("snap").tool_version(env!("CARGO_PKG_VERSION")).other(other);
        Contents::new(self.memory.regions(), &self.memory, data)
            .states(&self.states)
            .metadata(metadata)
    }

    fn not_written(&self, error: WriteError) -> ImportError {
        ImportError::Write { path: self.memory.path.clone(), error }
    }
}

/// The image with the ranges that the caller gives.
fn in_ranges(image: MemoryImage, ranges: &[Range<u64>]) -> Result<LaidOutImage, ImportError> {
    let path = image.path().to_owned();
    ImageLayout::new(ranges)
        .map_err(|error| ImportError::Layout { path, error })
        .and_then(|layout| image.laid_out(layout))
        .map_err(|error| match error {
            ImportError::Layout { .. } | ImportError::Length { .. } => {
                ImportError::Ranges(Box::new(error))
            }
            error => error,
        })
}
