//! The parent of a layer: what a layer stores about it, and how it is found.

use std::cell::OnceCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use uuid::Uuid;

use crate::catalogue::{Catalogue, MOST_FILES};
use crate::chunk::ChunkBuffer;
use crate::entry::{PageEntry, PageIndex};
use crate::error::{ChainError, Corruption, Part, Problem, ReadError};
use crate::header::Header;
use crate::layer::Layer;
use crate::layout::{HASH_BYTES, u32_at};
use crate::memory_map::MemoryRegion;
use crate::read_at::ReadAt;
use crate::seal::KeyProvider;
use crate::section::SectionKind;
use crate::snapshot::Snapshot;
use crate::storage::Storage;

/// Most layers in one chain. Each is an open file, and a file may claim any number of parents.
pub(crate) const MAX_LAYERS: usize = 256;

/// The information about its parent in a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ParentHint {
    /// The parent's id. The parent must have it.
    pub id: Uuid,
    /// Checksum of the parent's header. The parent must have it.
    pub header_crc: u32,
    /// Of a sealed layer: the BLAKE3 hash of the parent's header. The parent must have it.
    pub header_hash: Option<[u8; 32]>,
    /// Where the parent was: a path, relative to the layer's own folder or absolute, or the address of an object. Only a
    /// hint. This crate never follows an address.
    pub path: PathBuf,
}

impl ParentHint {
    pub(crate) fn parse(header: &Header, bytes: &[u8], offset: u64) -> Result<Self, Corruption> {
        let part = Part::Section(SectionKind::PARENT_HINT);
        let hash_bytes = if header.is_sealed() { HASH_BYTES } else { 0 };
        let path_at = 4 + hash_bytes;
        let min = path_at as u64;
        if bytes.len() < path_at {
            let (field, found) = ("section.len", bytes.len() as u64);
            let problem = Problem::Range { field, min, max: u64::MAX, found };
            return Err(Corruption::new(part, offset, problem));
        }
        let Some(id) = header.parent_id else {
            let problem = Problem::Field { field: "parent_id is zero", expected: 0, found: 1 };
            return Err(Corruption::new(Part::Header, 0, problem));
        };
        let header_hash = header.is_sealed().then(|| {
            let mut hash = [0; HASH_BYTES];
            hash.copy_from_slice(&bytes[4..path_at]);
            hash
        });
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&bytes[path_at..]));
        Ok(Self { id, header_crc: u32_at(bytes, 0), header_hash, path })
    }

    /// Whether the parent was an object in a bucket, and not a file.
    fn is_address(&self) -> bool {
        self.path.to_str().is_some_and(|path| path.contains("://"))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let hash = self.header_hash.as_ref().map_or(&[][..], |hash| &hash[..]);
        [&self.header_crc.to_le_bytes(), hash, self.path.as_os_str().as_bytes()].concat()
    }

    /// Whether a header is that of the parent.
    pub(crate) fn check(&self, parent: &Header) -> Result<(), ChainError> {
        if parent.id != self.id {
            return Err(ChainError::WrongParent { expected: self.id, found: parent.id });
        }
        if parent.crc != self.header_crc {
            let (expected, found) = (self.header_crc, parent.crc);
            return Err(ChainError::ChangedParent { id: self.id, expected, found });
        }
        if self.header_hash.is_some() && self.header_hash != parent.hash {
            return Err(ChainError::ForgedParent { id: self.id });
        }
        Ok(())
    }
}

/// The parent of a layer that is to be written: see [`write_layer`](crate::write_layer).
#[derive(Clone)]
pub struct Parent<'a> {
    pub(crate) pages: &'a dyn ParentPages,
    pub(crate) regions: &'a [MemoryRegion],
    pub(crate) hint: ParentHint,
}

impl<'a> Parent<'a> {
    /// The given snapshot as the parent. `path` is the path of the parent that the layer will store:
    /// relative to the layer's folder, or absolute; or the address of its object.
    pub fn new<R: ReadAt>(snapshot: &'a Snapshot<R>, path: impl Into<PathBuf>) -> Self {
        let header = snapshot.header();
        let (id, header_crc, header_hash) = (header.id, header.crc, header.hash);
        let hint = ParentHint { id, header_crc, header_hash, path: path.into() };
        Self { pages: snapshot, regions: snapshot.regions(), hint }
    }
}

/// The pages of a parent, whatever its storage is.
pub(crate) trait ParentPages: Sync {
    /// Where a page is.
    fn entry(&self, page: PageIndex) -> Result<PageEntry, ReadError>;

    /// The bytes of one page; `None` when they are all zero.
    fn page<'b>(
        &self,
        page: PageIndex,
        buffer: &'b mut ChunkBuffer,
    ) -> Result<Option<&'b [u8]>, ReadError>;
}

impl<R: ReadAt> ParentPages for Snapshot<R> {
    fn entry(&self, page: PageIndex) -> Result<PageEntry, ReadError> {
        Snapshot::entry(self, page)
    }

    fn page<'b>(
        &self,
        page: PageIndex,
        buffer: &'b mut ChunkBuffer,
    ) -> Result<Option<&'b [u8]>, ReadError> {
        Snapshot::page(self, page, buffer)
    }
}

/// Where to search for the parents of a layer, besides the path in the layer itself.
#[derive(Clone, Debug, Default)]
pub struct Parents {
    /// Files that may be parents, for any layer of the chain; the first matching one is used.
    pub files: Vec<PathBuf>,
    /// Folders in which a parent is searched, first by the name that the layer stores. If there is no such parent, it
    /// is searched by its id in the first 4 KiB of the folders' files, of 4096 files at most.
    pub folders: Vec<PathBuf>,
    /// Who has the keys of the file and of its parents. With it only sealed files are opened, without it only others.
    pub keys: Option<Arc<dyn KeyProvider>>,
}

impl Parents {
    /// Opens the file at `path` and all of its parents, top first.
    pub(crate) fn open_chain(&self, path: &Path) -> Result<Vec<Layer<Storage>>, ReadError> {
        let mut layers = vec![self.open(path)?];
        let mut child = path.to_owned();
        // Read once for the whole chain, if a parent is not at its path.
        let catalogue = OnceCell::new();
        loop {
            let number = layers.len() - 1;
            let hint = layers[number].parent_hint();
            let Some(hint) = hint.map_err(|error| layers[number].named(number, error))? else {
                break;
            };
            if layers.iter().any(|layer| layer.header.id == hint.id) {
                return Err(ChainError::Loop { id: hint.id }.into());
            }
            if layers.len() == MAX_LAYERS {
                return Err(ChainError::TooLong { most: MAX_LAYERS }.into());
            }
            let (parent, layer) = self.find(&child, &hint, &catalogue)?;
            layers.push(layer);
            child = parent;
        }
        Ok(layers)
    }

    /// The first existing file that is the parent. If none is: the error of the first existing file, or that none
    /// exists.
    fn find(
        &self,
        child: &Path,
        hint: &ParentHint,
        catalogue: &OnceCell<Catalogue>,
    ) -> Result<(PathBuf, Layer<Storage>), ReadError> {
        // A parent that was pulled from a bucket has its id as its name.
        let of_id = PathBuf::from(format!("{}.snap", hint.id));
        let path = if hint.is_address() { &of_id } else { &hint.path };
        let beside = child.parent().unwrap_or(Path::new("")).join(path);
        let name = path.file_name().unwrap_or_default();
        let in_folders = self.folders.iter().map(|folder| folder.join(name));
        let places: Vec<_> = self.files.iter().cloned().chain([beside]).chain(in_folders).collect();
        let there = places.iter().map(PathBuf::as_path).filter(|place| place.is_file());
        // Searched only if it is at none of those places.
        let by_id = std::iter::once_with(|| {
            let catalogue = catalogue.get_or_init(|| Catalogue::read(&self.folders));
            catalogue.find(hint).filter(|found| places.iter().all(|place| place != found))
        });
        let mut first_error = None;
        for place in there.chain(by_id.flatten()) {
            let fits = self.open(place).and_then(|layer| {
                hint.check(&layer.header)?;
                Ok(layer)
            });
            match fits {
                Ok(layer) => return Ok((place.to_owned(), layer)),
                Err(error) => _ = first_error.get_or_insert((place.to_owned(), error)),
            }
        }
        if let Some((path, error)) = first_error {
            return Err(ChainError::Parent { path, source: Box::new(error) }.into());
        }
        Err(ChainError::NotFound {
            id: hint.id,
            looked_at: places,
            searched: self.folders.clone(),
            most: catalogue.get().is_some_and(|catalogue| catalogue.more).then_some(MOST_FILES),
        }
        .into())
    }

    fn open(&self, path: &Path) -> Result<Layer<Storage>, ReadError> {
        let file =
            open_file(path).map_err(|source| ReadError::Open { path: path.to_owned(), source })?;
        let mut layer = Layer::open(Storage::File(file), self.keys.as_deref())?;
        layer.path = Some(path.to_owned());
        Ok(layer)
    }
}

/// Opens a regular file to be read. Opening anything else, for example a pipe, could block endlessly.
///
/// # Errors
/// As [`File::open`]; `InvalidInput` or `IsADirectory` for what is not a regular file.
pub fn open_file(path: &Path) -> io::Result<File> {
    let nonblocking = OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !kind.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_layer_knows_the_whole_header_of_its_parent() {
        let mut parent = crate::header::tests::header();
        parent.hash = Some([5; HASH_BYTES]);
        let (id, header_crc) = (parent.id, parent.crc);
        let of = |header_hash| ParentHint { id, header_crc, header_hash, path: "p".into() };
        of(None).check(&parent).unwrap();
        of(parent.hash).check(&parent).unwrap();
        // The same id and checksum, and another header.
        let forged = of(Some([6; HASH_BYTES])).check(&parent);
        assert!(matches!(forged, Err(ChainError::ForgedParent { id: found }) if found == id));
        parent.hash = None;
        assert!(of(Some([5; HASH_BYTES])).check(&parent).is_err());
    }
}
