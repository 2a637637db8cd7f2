//! Writes a VM to a file: all of it, or the changes since the snapshot from which it was restored.

use std::fs::Metadata;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use snapfmt::{
    Contents, Header, OnProgress, Parent, ReadAt, Snapshot, SnapshotMemory, StateBlob, Storage,
    WriteOptions, write_layer, write_snapshot,
};

use crate::error::SnapshotError;
use crate::guest_memory::{ArrivingBytes, GuestBytes};
use crate::memory::{Origin, Restored, Service, VmMemory};
use crate::metadata::GuestMetadata;
use crate::pagemap::private_pages;
use crate::room;
use crate::stable_file::StableFile;
use crate::vm::Vm;

impl Vm {
    /// Writes all of the guest to a new file at `out`. The VM can be resumed afterwards, also after an error.
    ///
    /// `progress` is called on the writing threads; `Break` cancels, and leaves no file.
    ///
    /// # Errors
    /// [`SnapshotError`]
    pub fn snapshot(
        &mut self,
        out: &Path,
        options: &WriteOptions,
        progress: OnProgress<'_>,
    ) -> Result<Header, SnapshotError> {
        let states = states(&mut self.machine)?;
        let memory = &*self.memory;
        let options = &memory.as_sealed(options);
        let regions = &memory.regions[..];
        let mapped = GuestBytes { memory: &memory.mapped, regions };
        let write = |bytes: &dyn ReadAt, data: &[Range<u64>], guest| {
            check_room(data, options, false)?;
            let metadata = GuestMetadata::here(guest).to_metadata();
            let contents = Contents::new(regions, bytes, data).states(&states).metadata(metadata);
            Ok(write_snapshot(out, contents, options, progress)?.0)
        };
        let restored = match &memory.origin {
            Origin::Booted { file, guest } => {
                return write(&mapped, &file.touched()?, guest.clone());
            }
            Origin::Restored(restored) => restored,
        };
        memory.check_complete(restored, out)?;
        let own = memory.own_pages(restored)?;
        let guest = guest_of(&restored.snapshot)?;
        let with_rest = || own.iter().cloned().chain(restored.snapshot.populated()).collect();
        match &restored.service {
            Service::Loaded { .. } => write(&mapped, &own, guest),
            Service::Lazy { .. } => {
                let data: Vec<_> = with_rest();
                let rest = restored.snapshot.memory();
                write(&Overlay { mapped: &mapped, own: &own, rest }, &data, guest)
            }
            // These are read through the mapping: missing pages are loaded, and damaged pages are errors.
            Service::Shared(_) | Service::Recorded { .. } => {
                let data: Vec<_> = with_rest();
                write(&memory.reader(), &data, guest)
            }
            Service::Image { image, .. } => {
                let data: Vec<_> = with_rest();
                write(&ImageBytes { memory: memory.reader(), image }, &data, guest)
            }
        }
    }

    /// Writes the changes since the snapshot from which the guest was restored, as a layer on that snapshot.
    ///
    /// # Errors
    /// [`SnapshotError`]; [`SnapshotError::NotRestored`] for a guest that was booted here.
    pub fn snapshot_layer(
        &mut self,
        out: &Path,
        options: &WriteOptions,
        progress: OnProgress<'_>,
    ) -> Result<Header, SnapshotError> {
        let memory = &*self.memory;
        let options = &memory.as_sealed(options);
        let Origin::Restored(restored) = &memory.origin else {
            return Err(SnapshotError::NotRestored);
        };
        memory.check_complete(restored, out)?;
        let mut data = memory.own_pages(restored)?;
        let snapshot = &restored.snapshot;
        if matches!(restored.service, Service::Loaded { .. }) {
            // A page that the guest gave back is no longer mapped, but has content in the snapshot.
            data.extend(snapshot.populated());
        }
        check_room(&data, options, false)?;
        let states = states(&mut self.machine)?;
        let mapped = GuestBytes { memory: &memory.mapped, regions: &memory.regions };
        let contents = Contents::new(&memory.regions, &mapped, &data)
            .states(&states)
            .metadata(GuestMetadata::here(guest_of(snapshot)?).to_metadata());
        let parent = Parent::new(snapshot, parent_of(restored, out)?);
        Ok(write_layer(out, contents, &parent, options, progress)?.0)
    }
}

impl VmMemory {
    /// Refuses to write memory that lacks pages, and to replace a file from which missing pages are read.
    pub(crate) fn check_complete(
        &self,
        restored: &Restored,
        out: &Path,
    ) -> Result<(), SnapshotError> {
        if let Some(failure) = self.failure() {
            return Err(SnapshotError::Failed(failure));
        }
        self.check_image()?;
        refuse_as_output(out, &restored.snapshot)
    }

    /// What is written of a guest that was restored from a sealed snapshot is sealed too, with the same keys if the
    /// caller has given none.
    pub(crate) fn as_sealed(&self, options: &WriteOptions) -> WriteOptions {
        let keys = self.snapshot().and_then(|snapshot| snapshot.keys());
        let keys = options.seal.as_ref().or(keys).cloned();
        options.clone().seal(keys)
    }

    /// Pages that may differ from the snapshot.
    fn own_pages(&self, restored: &Restored) -> Result<Vec<Range<u64>>, SnapshotError> {
        match &restored.service {
            Service::Lazy { pager, .. } => Ok(pager.touched()),
            _ => Ok(private_pages(&self.mapped, &self.regions)?),
        }
    }
}

/// The description of the guest in the metadata of its snapshot.
pub(crate) fn guest_of(snapshot: &Snapshot) -> Result<Value, SnapshotError> {
    Ok(GuestMetadata::read(&snapshot.metadata()?).guest)
}

/// The path of the parent that a layer at `out` stores.
pub(crate) fn parent_of(restored: &Restored, out: &Path) -> Result<PathBuf, SnapshotError> {
    let snapshot = &restored.snapshot;
    Ok(match snapshot.storage().file() {
        Some(_) => path_of_parent(snapshot.storage(), &restored.file, out)?,
        // Of a snapshot in a bucket: the address of its object.
        None => match snapshot.paths().next().flatten() {
            Some(address) => address.to_owned(),
            None => format!("{}.snap", snapshot.header().id).into(),
        },
    })
}

/// Refuses an output that is the snapshot's file, or a parent's: replacing it would break the layers on it.
///
/// # Errors
/// [`SnapshotError::OutputIsInput`]; [`SnapshotError::Look`].
pub fn refuse_as_output(out: &Path, snapshot: &Snapshot) -> Result<(), SnapshotError> {
    // A file cannot be written over an object in a bucket.
    for file in snapshot.storages().filter_map(Storage::file) {
        refuse_same(out, &file.metadata().map_err(SnapshotError::Look)?)?;
    }
    Ok(())
}

/// Refuses an output that is the same file as the input.
///
/// # Errors
/// [`SnapshotError::OutputIsInput`]
pub fn refuse_same(out: &Path, input: &Metadata) -> Result<(), SnapshotError> {
    match out.metadata() {
        Ok(there) if (there.dev(), there.ino()) == (input.dev(), input.ino()) => {
            Err(SnapshotError::OutputIsInput { out: out.to_owned() })
        }
        _ => Ok(()),
    }
}

/// The path of the parent that a layer stores: its name if both are in the same folder, otherwise its absolute path. Of
/// a parent that is no file, `parent` is its address, which is stored as it is.
///
/// # Errors
/// [`SnapshotError::ParentPath`]; [`SnapshotError::ParentReplaced`] if the path names another file than `storage`, or
/// none; [`SnapshotError::Look`].
pub fn path_of_parent(
    storage: &Storage,
    parent: &Path,
    layer: &Path,
) -> Result<PathBuf, SnapshotError> {
    let Some(file) = storage.file() else { return Ok(parent.to_owned()) };
    let open = file.metadata().map_err(SnapshotError::Look)?;
    let is_open = |named: Metadata| (named.dev(), named.ino()) == (open.dev(), open.ino());
    if !parent.metadata().is_ok_and(is_open) {
        return Err(SnapshotError::ParentReplaced { path: parent.to_owned() });
    }
    let folder = |path: &Path| {
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        folder.unwrap_or(Path::new(".")).canonicalize()
    };
    let failed = |error| SnapshotError::ParentPath { path: parent.to_owned(), error };
    let parent_folder = folder(parent).map_err(failed)?;
    let name = parent.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidFilename.into()))?;
    match folder(layer) {
        Ok(layer_folder) if layer_folder == parent_folder => Ok(name.into()),
        _ => Ok(parent_folder.join(name)),
    }
}

/// Refuses to write if the address space is not enough: a failed allocation would end the process, and the guest.
pub(crate) fn check_room(
    data: &[Range<u64>],
    options: &WriteOptions,
    read_once: bool,
) -> Result<(), SnapshotError> {
    let data_bytes = data.iter().map(|range| range.end - range.start).sum();
    let needed_bytes = room::of_writer(options, data_bytes, read_once);
    room::check(needed_bytes).map_err(|error| SnapshotError::NoRoom { needed_bytes, error })
}

/// Guest memory of which some pages are mapped here, and the others are only in the snapshot.
pub(crate) struct Overlay<'a> {
    pub(crate) mapped: &'a dyn ReadAt,
    /// Ranges of source offsets that are mapped here, ascending.
    pub(crate) own: &'a [Range<u64>],
    pub(crate) rest: SnapshotMemory<'a, Storage>,
}

impl ReadAt for Overlay<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let next = self.own.partition_point(|own| own.end <= at);
            let here = self.own.get(next).filter(|own| own.start <= at);
            let end = match (here, self.own.get(next)) {
                (Some(own), _) => own.end,
                (None, Some(later)) => later.start,
                (None, None) => u64::MAX,
            };
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match here {
                Some(_) => self.mapped.read_exact_at(now, at)?,
                None => self.rest.read_exact_at(now, at)?,
            }
            rest = later;
            at += len as u64;
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.mapped.len_bytes()
    }
}

/// Guest memory whose pages may come from a raw image. The image must not have changed since it was mapped.
struct ImageBytes<'a> {
    memory: ArrivingBytes<'a>,
    image: &'a StableFile,
}

impl ReadAt for ImageBytes<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_exact_at(buf, offset)?;
        self.image.check_unchanged()
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.memory.len_bytes()
    }
}

/// The state of the machine, and the contents of its devices.
fn states(machine: &mut vmm::PausedVm) -> Result<Vec<StateBlob>, SnapshotError> {
    let mut states = vec![machine_state(machine)?];
    let contents = machine.device_contents().map_err(SnapshotError::Device)?;
    for (place, content) in contents.into_iter().enumerate() {
        states.extend(content.and_then(|bytes| device_content(place, bytes)));
    }
    Ok(states)
}

/// The state of the machine, without the contents of its devices.
pub(crate) fn machine_state(machine: &mut vmm::PausedVm) -> Result<StateBlob, SnapshotError> {
    let bytes = machine.state()?.encode();
    Ok(StateBlob { tag: vmm::state::STATE_KIND, version: vmm::state::STATE_VERSION, bytes })
}

/// The content of the device at `place`.
pub(crate) fn device_content(place: usize, bytes: Vec<u8>) -> Option<StateBlob> {
    let tag = vmm::state::device_content_kind(place)?;
    Some(StateBlob { tag, version: vmm::state::DEVICE_CONTENT_VERSION, bytes })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn a_parent_without_its_name_is_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        let (parent, layer) = (at("parent.snap"), at("layer.snap"));
        fs::write(&parent, "one").expect("it is written");
        let storage = Storage::from(File::open(&parent).expect("it opens"));
        let path = || path_of_parent(&storage, &parent, &layer);
        assert_eq!(path().expect("it is there"), Path::new("parent.snap"));
        let refused = || match path() {
            Err(SnapshotError::ParentReplaced { path }) => assert_eq!(path, parent),
            other => panic!("{other:?}"),
        };
        fs::write(at("other.snap"), "two").expect("it is written");
        fs::rename(at("other.snap"), &parent).expect("it is renamed");
        refused();
        fs::remove_file(&parent).expect("it is removed");
        refused();
    }
}
