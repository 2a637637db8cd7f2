//! The file of decoded pages (a memfd) that clones share. A page is added when a clone first needs it.
//!
//! [`FilledFile`] adds the pages. Zero pages stay holes: each clone has its own.
//!
//! A hole becomes a zero page for all clones if a process touches it through a mapping without a userfaultfd, or calls
//! `fallocate`. Clones get a descriptor that does not allow the second, and do not do the first. A page that the server
//! did not add is detected when it is needed. Then no page is served from this file any more.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

use crate::error::StartError;
use crate::install::filled_file::FilledFile;
use crate::install::runs::Run;
use crate::layout::Layout;
use crate::region::PAGE_BYTES;
use crate::source::error::SourceError;
use crate::source::load::{Load, LoadedPages, PageReader, WhenReady};
use crate::source::page_source::PageSource;

/// The seals of the file: its length is fixed, and only the first mapping can write.
pub(crate) const SEALS: SealFlags =
    SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::FUTURE_WRITE).union(SealFlags::SEAL);

/// The shared file of one snapshot. As a source it returns [`Load::InFile`] or zeros.
pub(crate) struct SharedImage {
    source: Arc<dyn PageSource>,
    file: FilledFile,
    /// The read-only descriptor for clones.
    handed: OwnedFd,
}

impl SharedImage {
    /// An empty file for all of `source`.
    pub(crate) fn new(source: Arc<dyn PageSource>) -> Result<SharedImage, StartError> {
        let system =
            |what| move |error: rustix::io::Errno| StartError::System { what, error: error.into() };
        let len_bytes = source.len_bytes();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = rustix::fs::memfd_create("snapshot-pages", flags).map_err(system("a memfd"))?;
        rustix::fs::ftruncate(&memfd, len_bytes).map_err(system("a memfd of that size"))?;
        // This makes the writable mapping. After the seals there can be no other.
        let file = FilledFile::new(memfd.as_fd(), len_bytes)?;
        rustix::fs::fcntl_add_seals(&memfd, SEALS).map_err(system("a sealed memfd"))?;
        rustix::fs::fchmod(&memfd, Mode::RUSR).map_err(system("a private memfd"))?;
        let handed = read_only(memfd.as_fd()).map_err(system("the memfd, opened read only"))?;
        Ok(SharedImage { source, file, handed })
    }

    /// The descriptor that clones get.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.handed.as_fd()
    }

    /// The file as a source for the pagers of clones.
    pub(crate) fn as_source(self: &Arc<SharedImage>) -> Arc<dyn PageSource> {
        Arc::new(ImageSource(Arc::clone(self)))
    }

    /// An error if another process has added pages to the file.
    pub(crate) fn whole(&self) -> Result<(), SourceError> {
        self.file.whole()
    }

    pub(super) fn layout(&self) -> &Layout {
        self.file.layout()
    }

    pub(super) fn source(&self) -> &Arc<dyn PageSource> {
        &self.source
    }

    /// Whether the page at this offset of the source is not in the file.
    pub(super) fn lacks(&self, source_offset: u64) -> bool {
        self.file.has(source_offset) == Some(false)
    }

    /// Adds the pages that are not in the file: see [`FilledFile::fill`].
    pub(super) fn fill(
        &self,
        loaded: &LoadedPages<'_>,
        asked: Option<u64>,
        runs: &mut Vec<Run>,
    ) -> Result<(), SourceError> {
        self.file.fill(loaded, asked, runs)
    }
}

impl std::fmt::Debug for SharedImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedImage").field("file", &self.file).finish_non_exhaustive()
    }
}

struct ImageSource(Arc<SharedImage>);

impl PageSource for ImageSource {
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        if page_bytes != PAGE_BYTES {
            return Err(SourceError::permanent(format!("shared pages have {PAGE_BYTES} bytes")));
        }
        let inner = self.0.source.reader(PAGE_BYTES)?;
        Ok(Box::new(ImageReader {
            image: Arc::clone(&self.0),
            inner,
            runs: Vec::with_capacity(512),
        }))
    }

    fn len_bytes(&self) -> u64 {
        self.0.source.len_bytes()
    }
}

struct ImageReader {
    image: Arc<SharedImage>,
    inner: Box<dyn PageReader>,
    runs: Vec<Run>,
}

impl PageReader for ImageReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        self.image.whole()?;
        let file = &self.image.file;
        let beyond = || SourceError::permanent("an offset beyond the source");
        if file.has(source_offset).ok_or_else(beyond)? {
            return Ok(Load::InFile { cost: Default::default() });
        }
        match self.inner.load(source_offset)? {
            Load::Pages(loaded) => {
                file.fill(&loaded, Some(source_offset), &mut self.runs)?;
                Ok(Load::InFile { cost: loaded.cost })
            }
            Load::Zero { range } => Ok(Load::Zero { range }),
            Load::InFile { .. } => Err(SourceError::permanent("a shared file of a shared file")),
        }
    }

    fn would_wait(&mut self, source_offset: u64) -> bool {
        self.image.lacks(source_offset) && self.inner.would_wait(source_offset)
    }

    fn when_ready(&mut self, source_offset: u64, ready: WhenReady) {
        self.inner.when_ready(source_offset, ready);
    }
}

/// The same file, opened again for reading. A duplicate would allow writing.
fn read_only(file: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use rustix::fs::FallocateFlags;

    use super::*;
    use crate::VecSource;
    use crate::mapping::Mapping;

    fn image() -> Option<Arc<SharedImage>> {
        let mut bytes = vec![0; 64 * PAGE_BYTES];
        bytes[..32 * PAGE_BYTES].fill(7);
        match SharedImage::new(Arc::new(VecSource::new(bytes, 4 * PAGE_BYTES))) {
            Ok(image) => Some(Arc::new(image)),
            Err(StartError::Open(error)) => {
                assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{error}");
                io::Write::write_all(&mut io::stderr(), format!("SKIPPED: {error}\n").as_bytes())
                    .ok()?;
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn in_file(image: &SharedImage, page: usize) -> u8 {
        let mut byte = [9];
        let file = File::from(image.descriptor().try_clone_to_owned().expect("a descriptor"));
        file.read_exact_at(&mut byte, (page * PAGE_BYTES) as u64).expect("it can be read");
        byte[0]
    }

    #[test]
    fn pages_get_into_the_file_by_chunks_and_once() {
        let Some(image) = image() else { return };
        let mut reader = image.as_source().reader(PAGE_BYTES).expect("it has such pages");
        let load = reader.load(5 * PAGE_BYTES as u64).expect("it loads");
        assert!(matches!(load, Load::InFile { cost } if cost.bytes_read == 4 * PAGE_BYTES as u64));
        assert_eq!([3, 4, 7, 8].map(|page| in_file(&image, page)), [0, 7, 7, 0]);
        let load = reader.load(6 * PAGE_BYTES as u64).expect("it is there");
        assert!(matches!(load, Load::InFile { cost } if cost.bytes_read == 0));
        let load = reader.load(40 * PAGE_BYTES as u64).expect("it loads");
        assert!(matches!(load, Load::Zero { .. }));
    }

    #[test]
    fn no_other_process_writes_to_the_file() {
        let Some(image) = image() else { return };
        let path = format!("/proc/self/fd/{}", image.descriptor().as_raw_fd());
        assert!(
            File::from(image.descriptor().try_clone_to_owned().expect("one"))
                .write_at(&[1], 0)
                .is_err()
        );
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert!(rustix::fs::fallocate(image.descriptor(), punch, 0, 4096).is_err());
        assert!(
            rustix::fs::fallocate(image.descriptor(), FallocateFlags::empty(), 0, 4096).is_err()
        );
        // Root may open the file for writing, but can neither write to it, nor map it writable, nor change its length.
        let Ok(writable) = OpenOptions::new().read(true).write(true).open(path) else { return };
        assert!(writable.write_at(&[1], 0).is_err());
        assert!(writable.set_len(0).is_err());
        assert!(rustix::fs::fallocate(&writable, punch, 0, 4096).is_err());
        assert!(Mapping::shared(writable.as_fd(), 4096).is_err());
        // The remaining way, fallocate, is detected.
        rustix::fs::fallocate(&writable, FallocateFlags::empty(), 4096, 4096)
            .expect("zeros get in");
        let mut reader = image.as_source().reader(PAGE_BYTES).expect("it has such pages");
        for page in [1, 20] {
            let error = reader.load(page * PAGE_BYTES as u64).expect_err("it is found");
            assert!(error.to_string().contains("another process has written"), "{error}");
        }
    }
}
