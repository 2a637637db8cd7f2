//! The file of decoded pages (a memfd), filled when a clone first wants them.
//!
//! Pages get into it only by `UFFDIO_COPY` into this process' own mapping: the kernel puts a page into the file
//! when it is complete, and never a larger piece (a huge page would bring zeros for its neighbours). Zero pages stay
//! holes: each clone has its own.
//!
//! A hole that somebody touches through a mapping without a userfaultfd, or fills by `fallocate`, becomes zeros for
//! all. Clones get a descriptor that cannot do the latter, and don't do the former; that a page is there which was never
//! put there is found when it is wanted, and then nothing is served from this file any more.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

use crate::error::StartError;
use crate::install::{self, Book, Fill, Filler, InstallError, Settled, Target};
use crate::layout::Layout;
use crate::mapping::Mapping;
use crate::page_state::{PageState, PageStates};
use crate::region::Region;
use crate::register;
use crate::run::{self, Placed, Run};
use crate::source::{Load, LoadedPages, PageReader, PageSource, SourceError};
use crate::uffd::{Features, Uffd};

const PAGE_BYTES: usize = 4096;

/// The seals of the file: its length stays, and nobody but the holder of the first mapping writes.
pub(crate) const SEALS: SealFlags =
    SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::FUTURE_WRITE).union(SealFlags::SEAL);

/// The shared file of one snapshot. As a source it answers [`Load::InFile`] or zeros.
pub(crate) struct SharedImage {
    source: Arc<dyn PageSource>,
    /// Drops in this order: the userfaultfd before the mapping.
    filler: Filler,
    layout: Layout,
    states: PageStates,
    /// Held while pages are looked at and installed.
    gate: Mutex<()>,
    tampered: AtomicBool,
    /// For clones: it cannot be written through.
    handed: OwnedFd,
    /// Only ever written to by `UFFDIO_COPY`.
    _mapping: Mapping,
}

impl SharedImage {
    pub(super) const PAGE_BYTES: usize = PAGE_BYTES;

    /// An empty file for all of `source`.
    pub(crate) fn new(source: Arc<dyn PageSource>) -> Result<SharedImage, StartError> {
        let system =
            |what| move |error: rustix::io::Errno| StartError::System { what, error: error.into() };
        let len_bytes = source.len_bytes();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("snapshot-pages", flags).map_err(system("a memfd"))?;
        rustix::fs::ftruncate(&file, len_bytes).map_err(system("a memfd of that size"))?;
        let mapping = usize::try_from(len_bytes)
            .map_err(io::Error::other)
            .and_then(|len| Mapping::shared(file.as_fd(), len))
            .map_err(|error| StartError::System { what: "a mapping of the memfd", error })?;
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(system("a sealed memfd"))?;
        rustix::fs::fchmod(&file, Mode::RUSR).map_err(system("a private memfd"))?;
        let handed = read_only(file.as_fd()).map_err(system("the memfd again, to be read only"))?;

        // SAFETY: the mapping is this object's own, lives longer than the userfaultfd, and is never accessed.
        let region =
            unsafe { Region::new(mapping.at(0, 0).as_ptr() as u64, len_bytes, PAGE_BYTES, 0) };
        let region = region.map_err(|error| StartError::System {
            what: "a region of the memfd",
            error: io::Error::other(error),
        })?;
        let layout = Layout::cut(&[region], 1);
        let states = PageStates::all_missing(layout.pages() as usize)
            .map_err(|error| StartError::System { what: "memory for the page states", error })?;
        let uffd = Uffd::open(Features::MISSING_SHMEM, Features::NONE).map_err(StartError::Open)?;
        register::all(&uffd, layout.extents_of(0), false)?;
        Ok(SharedImage {
            source,
            filler: Filler { uffd, zeros: None },
            layout,
            states,
            gate: Mutex::new(()),
            tampered: AtomicBool::new(false),
            handed,
            _mapping: mapping,
        })
    }

    /// What a clone is given.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.handed.as_fd()
    }

    /// As a source for the clones' pagers.
    pub(crate) fn as_source(self: &Arc<SharedImage>) -> Arc<dyn PageSource> {
        Arc::new(ImageSource(Arc::clone(self)))
    }

    /// An error if somebody else has put pages into the file.
    pub(crate) fn whole(&self) -> Result<(), SourceError> {
        match self.tampered.load(Ordering::Relaxed) {
            true => Err(SourceError::permanent("somebody has written to the shared memory")),
            false => Ok(()),
        }
    }

    pub(super) fn source(&self) -> &Arc<dyn PageSource> {
        &self.source
    }

    /// Whether the page at this offset of the source is not in the file.
    pub(super) fn lacks(&self, source_offset: u64) -> bool {
        let place = self.layout.at_source(source_offset, 0);
        place.is_some_and(|place| self.states.of(place.page) == PageState::Missing)
    }

    /// Puts the pages into the file that are not there, the asked one first. Afterwards all of them are.
    pub(super) fn fill(
        &self,
        loaded: LoadedPages<'_>,
        asked: Option<u64>,
        runs: &mut Vec<Run>,
    ) -> Result<(), SourceError> {
        let inside =
            |at: usize| at.checked_add(PAGE_BYTES).is_some_and(|end| end <= loaded.bytes.len());
        if !loaded.pages.iter().all(|page| inside(page.buffer_offset)) {
            return Err(SourceError::permanent("a page lies beyond the loaded bytes"));
        }
        let placed = loaded.pages.iter().filter_map(|page| {
            let place = self.layout.at_source(page.source_offset, 0)?;
            Some(Placed { place, buffer_offset: page.buffer_offset })
        });
        // No page has that number.
        run::coalesce(placed, PAGE_BYTES, asked.unwrap_or(u64::MAX), runs);
        let _gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let mut book = ImageBook { image: self, tampered: false };
        for run in runs.iter() {
            let target = Target {
                first_page: run.first_page,
                pages: run.pages,
                host_addr: run.host_addr,
                page_bytes: PAGE_BYTES,
            };
            let end = run.buffer_offset + run.pages * PAGE_BYTES;
            let fill = Fill::Copy(&loaded.bytes[run.buffer_offset..end]);
            match install::install(&self.filler, target, fill, &mut book) {
                Ok(()) => {}
                Err(InstallError::Refused { errno, .. }) => {
                    let error = SourceError::permanent("the shared memory takes no more pages");
                    return Err(error.caused_by(errno));
                }
                Err(InstallError::ProcessGone) => {
                    return Err(SourceError::permanent("the shared memory is gone"));
                }
            }
        }
        if book.tampered {
            self.tampered.store(true, Ordering::Relaxed);
        }
        self.whole()
    }
}

impl std::fmt::Debug for SharedImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedImage").field("pages", &self.layout.pages()).finish_non_exhaustive()
    }
}

/// Keeps the states of the file's pages. Lives under the gate.
struct ImageBook<'a> {
    image: &'a SharedImage,
    tampered: bool,
}

impl Book for ImageBook<'_> {
    fn wants(&self, page: u64) -> bool {
        self.image.states.of(page) == PageState::Missing
    }

    fn filled(&mut self, first_page: u64, pages: usize) {
        for page in first_page..first_page + pages as u64 {
            self.image.states.set(page, PageState::Present);
        }
    }

    /// Not by this process: it would be known.
    fn existing(&mut self, _page: u64) {
        self.tampered = true;
    }

    fn gone(&mut self, _page: u64) {
        self.tampered = true;
    }

    /// No events were asked for: only a fork or the like of this process, which is over soon.
    fn settle(&mut self) -> Settled {
        std::thread::yield_now();
        Settled::Retry
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
        let place = self.image.layout.at_source(source_offset, 0);
        let page = place.ok_or_else(|| SourceError::permanent("an offset beyond the source"))?.page;
        if self.image.states.of(page) == PageState::Present {
            return Ok(Load::InFile { cost: Default::default() });
        }
        match self.inner.load(source_offset)? {
            Load::Pages(loaded) => {
                let cost = loaded.cost;
                self.image.fill(loaded, Some(page), &mut self.runs)?;
                if self.image.states.of(page) != PageState::Present {
                    return Err(SourceError::permanent(
                        "the asked page is not among the loaded ones",
                    ));
                }
                Ok(Load::InFile { cost })
            }
            Load::Zero { range } => Ok(Load::Zero { range }),
            Load::InFile { .. } => Err(SourceError::permanent("a shared file of a shared file")),
        }
    }
}

/// The same file, opened anew for reading: a duplicate could be written through.
fn read_only(file: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use rustix::fs::FallocateFlags;

    use super::*;
    use crate::VecSource;

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
    fn nobody_else_writes_to_the_file() {
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
        // Even root, who may open it for writing, can neither write nor map it so, nor change its length.
        let Ok(writable) = OpenOptions::new().read(true).write(true).open(path) else { return };
        assert!(writable.write_at(&[1], 0).is_err());
        assert!(writable.set_len(0).is_err());
        assert!(rustix::fs::fallocate(&writable, punch, 0, 4096).is_err());
        assert!(Mapping::shared(writable.as_fd(), 4096).is_err());
        // What is left to root is found.
        rustix::fs::fallocate(&writable, FallocateFlags::empty(), 4096, 4096)
            .expect("zeros get in");
        let mut reader = image.as_source().reader(PAGE_BYTES).expect("it has such pages");
        for page in [1, 20] {
            let error = reader.load(page * PAGE_BYTES as u64).expect_err("it is found");
            assert!(error.to_string().contains("somebody has written"), "{error}");
        }
    }
}
