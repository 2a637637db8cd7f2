//! A file of guest memory that another program has written.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use snapfmt::layout::{MAGIC, PAGE_BYTES};
use snapfmt::{MemoryRegion, ReadAt, Snapshot};

use super::error::{ImportError, NotMemory};
use super::foreign_file;
use super::layout::ImageLayout;
use super::qemu::{WrittenPages, is_stream};
use crate::stable_file::StableFile;

/// A file of whole pages that may be guest memory.
#[derive(Debug)]
pub struct MemoryImage {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    holes: Option<Holes>,
}

/// What the holes of a memory file mean.
#[derive(Debug)]
enum Holes {
    Zeros,
    Base(Base),
}

/// The snapshot to which a diff snapshot belongs.
struct Base(Box<Snapshot>);

impl fmt::Debug for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Base").field(&self.0.header().id).finish()
    }
}

impl MemoryImage {
    /// Opens a regular file.
    ///
    /// # Errors
    /// [`ImportError`]: it cannot be read, is not a regular file, or is surely not guest memory.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let file = foreign_file::open(path)?;
        let mut start = Vec::new();
        (&file).take(8).read_to_end(&mut start).map_err(ImportError::io(path))?;
        Self::check_start(path, &start)?;
        Self::from_file(file, path)
    }

    /// Takes an open file. `path` names it in errors.
    ///
    /// # Errors
    /// [`ImportError`]: it is empty, or its length is not whole pages.
    pub fn from_file(file: File, path: &Path) -> Result<Self, ImportError> {
        let (path, named) = (path.to_owned(), ImportError::io(path));
        let len_bytes = file.metadata().map_err(named)?.len();
        if len_bytes == 0 {
            return Err(ImportError::NotMemory { path, found: NotMemory::Empty });
        }
        if !len_bytes.is_multiple_of(PAGE_BYTES as u64) {
            return Err(ImportError::NotPages { path, len_bytes });
        }
        Ok(Self { file, path, len_bytes, holes: None })
    }

    /// Refuses a file that begins with the magic of a snapshot or an ELF file. Its first 8 bytes are enough.
    ///
    /// # Errors
    /// [`ImportError::NotMemory`]
    pub fn check_start(path: &Path, start: &[u8]) -> Result<(), ImportError> {
        let found = if start.starts_with(&MAGIC) {
            NotMemory::Snapshot
        } else if start.starts_with(b"\x7fELF") {
            NotMemory::Elf
        } else if is_stream(start) {
            NotMemory::QemuMigration
        } else {
            return Ok(());
        };
        Err(ImportError::NotMemory { path: path.to_owned(), found })
    }

    /// Its holes are zeros, as in a sparse copy of a full memory file. Only for Firecracker's files this is not assumed:
    /// in the memory file of a diff snapshot they are memory that has not changed.
    #[must_use]
    pub fn holes_are_zeros(self) -> Self {
        Self { holes: Some(Holes::Zeros), ..self }
    }

    /// Its holes are memory of `base`, as in the memory file of a diff snapshot. The base is the full snapshot, with all
    /// diffs between them.
    #[must_use]
    pub fn with_base(self, base: Snapshot) -> Self {
        Self { holes: Some(Holes::Base(Base(Box::new(base)))), ..self }
    }

    /// Refuses holes of which the caller has not said what they mean.
    pub(super) fn check_holes(&self) -> Result<(), ImportError> {
        if self.holes.is_some() {
            return Ok(());
        }
        let data =
            data_between(&self.file, 0..self.len_bytes).map_err(ImportError::io(&self.path))?;
        let data_bytes: u64 = data.iter().map(|range| range.end - range.start).sum();
        match self.len_bytes - data_bytes {
            0 => Ok(()),
            hole_bytes => {
                let (path, len_bytes) = (self.path.clone(), self.len_bytes);
                Err(ImportError::Holes { path, hole_bytes, len_bytes })
            }
        }
    }

    /// The path of the image, for errors.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The length of the image.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Adds the layout, which must be as long as the image.
    pub(super) fn laid_out(self, layout: ImageLayout) -> Result<LaidOutImage, ImportError> {
        let Self { file, path, len_bytes: found_bytes, holes } = self;
        let expected_bytes = layout.memory_bytes();
        if found_bytes != expected_bytes {
            return Err(ImportError::Length { path, found_bytes, expected_bytes });
        }
        let base = match holes {
            Some(Holes::Base(base)) if base.0.regions() != layout.regions => {
                return Err(ImportError::OtherBase { path });
            }
            Some(Holes::Base(base)) => Some(base),
            Some(Holes::Zeros) | None => None,
        };
        let file = StableFile::new(file).map_err(ImportError::io(&path))?;
        LaidOutImage::new(file, path, layout, base, None)
    }
}

/// A memory image with its layout, which is read by source offset.
#[derive(Debug)]
pub(super) struct LaidOutImage {
    pub(super) file: StableFile,
    pub(super) path: PathBuf,
    layout: ImageLayout,
    /// The memory that the file does not have.
    base: Option<Base>,
    /// The parts of the source space that are not holes of the file, ascending.
    own: Vec<Range<u64>>,
    /// Which pages of the file are memory. `None`: all.
    written: Option<WrittenPages>,
    /// Whether there was something in the others.
    cleared: AtomicBool,
}

impl LaidOutImage {
    fn new(
        file: StableFile,
        path: PathBuf,
        layout: ImageLayout,
        base: Option<Base>,
        written: Option<WrittenPages>,
    ) -> Result<Self, ImportError> {
        let (own, cleared) = (Vec::new(), AtomicBool::new(false));
        let mut image = Self { file, path, layout, base, own, written, cleared };
        image.own = image.own_data().map_err(ImportError::io(&image.path))?;
        Ok(image)
    }

    /// A file with more than memory in it. Pages that are not `written` are zero.
    pub(super) fn of_written(
        file: StableFile,
        path: PathBuf,
        layout: ImageLayout,
        written: WrittenPages,
    ) -> Result<Self, ImportError> {
        Self::new(file, path, layout, None, Some(written))
    }

    /// Whether pages were read that are not memory, and had something else than zeros.
    pub(super) fn has_cleared(&self) -> bool {
        self.cleared.load(Ordering::Relaxed)
    }

    pub(super) fn regions(&self) -> &[MemoryRegion] {
        &self.layout.regions
    }

    /// The snapshot whose memory is in the holes.
    pub(super) fn base(&self) -> Option<&Snapshot> {
        self.base.as_ref().map(|base| &*base.0)
    }

    /// The parts of the source space that are in the file itself.
    pub(super) fn own(&self) -> &[Range<u64>] {
        &self.own
    }

    /// The parts of the source space that may not be zero.
    pub(super) fn data(&self) -> Vec<Range<u64>> {
        let base = self.base.iter().flat_map(|base| base.0.populated());
        self.own.iter().cloned().chain(base).collect()
    }

    fn own_data(&self) -> io::Result<Vec<Range<u64>>> {
        let mut own = Vec::new();
        for extent in &self.layout.extents {
            let file = extent.file_offset..extent.file_offset + extent.len;
            let to_source = |offset: u64| extent.source_offset + (offset - extent.file_offset);
            let data = data_between(self.file.file(), file)?;
            own.extend(data.into_iter().map(|data| to_source(data.start)..to_source(data.end)));
        }
        Ok(own)
    }

    fn read_own(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buf;
        for (at, len) in self.layout.parts(offset..offset + rest.len() as u64) {
            let (now, later) = rest.split_at_mut(len);
            self.file.read_exact_at(now, at)?;
            if self.written.as_ref().is_some_and(|written| written.clear_others(now, at)) {
                self.cleared.store(true, Ordering::Relaxed);
            }
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// The parts of a range of a file that are not holes (lseek(2), `SEEK_DATA`), ascending.
pub(super) fn data_between(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut data = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < range.end => start,
            // There is no data from there on, or not before the end.
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(range.end);
        data.push(start..at);
    }
    Ok(data)
}

impl ReadAt for LaidOutImage {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(base) = &self.base else {
            return self.read_own(buf, offset);
        };
        let base = base.0.memory();
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let next = self.own.partition_point(|own| own.end <= at);
            let (own, end) = match self.own.get(next) {
                Some(own) if own.start <= at => (true, own.end),
                Some(later) => (false, later.start),
                None => (false, u64::MAX),
            };
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            if own {
                self.read_own(now, at)?;
            } else {
                base.read_exact_at(now, at)?;
            }
            (rest, at) = (later, at + len as u64);
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.layout.memory_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;

    fn image(file: &File, layout: ImageLayout) -> LaidOutImage {
        let file = file.try_clone().unwrap();
        MemoryImage::from_file(file, Path::new("m")).unwrap().laid_out(layout).unwrap()
    }

    #[test]
    fn a_permuted_file_reads_and_writes_alike() {
        let file = tempfile::tempfile().unwrap();
        let layout = || ImageLayout::new(&[4 * PAGE..6 * PAGE, 0..2 * PAGE]).unwrap();
        let bytes: Vec<u8> = (0..4 * PAGE).map(|at| (at / 100) as u8).collect();
        layout().write(&file, 0, &bytes).unwrap();
        let memory = image(&file, layout());
        let mut found = vec![0; bytes.len()];
        memory.read_exact_at(&mut found, 0).unwrap();
        assert!(found == bytes);
        let mut first = [0; 8];
        memory.file.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first[..], bytes[2 * PAGE as usize..][..8]);
        assert!(memory.read_exact_at(&mut found, PAGE).is_err());
    }

    /// An import must not contain bytes from before and after a write.
    #[test]
    fn a_file_that_was_written_to_meanwhile_is_not_read() {
        let file = tempfile::tempfile().unwrap();
        let layout = ImageLayout::new(&[0..2 * PAGE]).unwrap();
        layout.write(&file, 0, &[7; 2 * PAGE_BYTES]).unwrap();
        let memory = image(&file, layout);
        let mut found = [0; PAGE_BYTES];
        memory.read_exact_at(&mut found, 0).unwrap();
        file.write_all_at(&[8], PAGE).unwrap();
        assert!(memory.read_exact_at(&mut found, PAGE).is_err());
    }
}
