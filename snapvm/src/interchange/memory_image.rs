//! A file of guest memory that another program has written.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use snapfmt::layout::{MAGIC, PAGE_BYTES};
use snapfmt::{MemoryRegion, ReadAt};

use super::error::{ImportError, NotMemory};
use super::foreign_file;
use super::layout::ImageLayout;
use crate::stable_file::StableFile;

/// A file of whole pages that may be guest memory.
#[derive(Debug)]
pub struct MemoryImage {
    file: File,
    path: PathBuf,
    len_bytes: u64,
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
        Ok(Self { file, path, len_bytes })
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
        } else {
            return Ok(());
        };
        Err(ImportError::NotMemory { path: path.to_owned(), found })
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
        let Self { file, path, len_bytes: found_bytes } = self;
        let expected_bytes = layout.memory_bytes();
        if found_bytes != expected_bytes {
            return Err(ImportError::Length { path, found_bytes, expected_bytes });
        }
        let file = StableFile::new(file).map_err(ImportError::io(&path))?;
        Ok(LaidOutImage { file, path, layout })
    }
}

/// A memory image with its layout, which is read by source offset.
#[derive(Debug)]
pub(super) struct LaidOutImage {
    pub(super) file: StableFile,
    pub(super) path: PathBuf,
    layout: ImageLayout,
}

impl LaidOutImage {
    pub(super) fn regions(&self) -> &[MemoryRegion] {
        &self.layout.regions
    }

    /// The parts of the source space that are not holes of the file (lseek(2), `SEEK_DATA`).
    pub(super) fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let mut data = Vec::new();
        for extent in &self.layout.extents {
            let end = extent.file_offset + extent.len;
            let to_source = |offset: u64| extent.source_offset + (offset - extent.file_offset);
            let mut at = extent.file_offset;
            while at < end {
                let start = match rustix::fs::seek(self.file.file(), SeekFrom::Data(at)) {
                    Ok(start) if start < end => start,
                    // There is no data from there on, or not before the end.
                    Ok(_) | Err(Errno::NXIO) => break,
                    Err(error) => return Err(error.into()),
                };
                at = rustix::fs::seek(self.file.file(), SeekFrom::Hole(start))?.min(end);
                data.push(to_source(start)..to_source(at));
            }
        }
        Ok(data)
    }
}

impl ReadAt for LaidOutImage {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buf;
        for (at, len) in self.layout.parts(offset..offset + rest.len() as u64) {
            let (now, later) = rest.split_at_mut(len);
            self.file.read_exact_at(now, at)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
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
