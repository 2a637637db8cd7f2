//! A file in memory (memfd), filled page by page, that other mappings share.
//!
//! Pages get into the file only by `UFFDIO_COPY` into a mapping of this object: the kernel adds a page after it is
//! complete, and never more than one. (`write(2)` may add a huge page, depending on
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled`. Its other pages would be zeros.)
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::StartError;
use crate::install::kernel::{self, Drained, Fill, Filler, InstallError, InstallObserver, Target};
use crate::install::page_state::{PageState, PageStates};
use crate::install::register;
use crate::install::runs::{self, Placed, Run};
use crate::layout::Layout;
use crate::mapping::Mapping;
use crate::region::{PAGE_BYTES, Region};
use crate::source::error::SourceError;
use crate::source::load::LoadedPages;
use crate::uffd::{Features, Uffd};

/// Fills a file that begins with holes only, and to which no one else adds pages.
pub(crate) struct FilledFile {
    /// The fields drop in this order: the userfaultfd before the mapping.
    filler: Filler,
    layout: Layout,
    states: PageStates,
    /// Held while page states are checked and pages are installed.
    lock: Mutex<()>,
    tampered: AtomicBool,
    /// Only `UFFDIO_COPY` writes to it.
    _mapping: Mapping,
}

impl FilledFile {
    /// Fills `file`, which has `len_bytes` bytes, in whole pages.
    ///
    /// # Errors
    /// [`StartError`]: no mapping, or no userfaultfd.
    pub(crate) fn new(file: BorrowedFd<'_>, len_bytes: u64) -> Result<FilledFile, StartError> {
        let mapping = usize::try_from(len_bytes)
            .map_err(io::Error::other)
            .and_then(|len| Mapping::shared(file, len))
            .map_err(|error| StartError::System { what: "a mapping of the memfd", error })?;
        // SAFETY: this object owns the mapping. It outlives the userfaultfd, and is never accessed.
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
        Ok(FilledFile {
            filler: Filler { uffd, zeros: None },
            layout,
            states,
            lock: Mutex::new(()),
            tampered: AtomicBool::new(false),
            _mapping: mapping,
        })
    }

    #[cfg(feature = "serve")]
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// An error if another process has added pages to the file.
    pub(crate) fn whole(&self) -> Result<(), SourceError> {
        match self.tampered.load(Ordering::Relaxed) {
            true => Err(SourceError::permanent("another process has written to the shared memory")),
            false => Ok(()),
        }
    }

    /// Whether the page at this offset is in the file; `None` beyond its end.
    pub(crate) fn has(&self, offset: u64) -> Option<bool> {
        let place = self.layout.at_source(offset, 0)?;
        Some(self.states.of(place.page) == PageState::Present)
    }

    /// Adds the pages that are not in the file, starting with the one at the requested offset.
    ///
    /// # Errors
    /// [`SourceError`] if the requested page is not among the loaded ones, if the kernel refuses a page, or if another
    /// process has added pages to the file.
    pub(crate) fn fill(
        &self,
        loaded: &LoadedPages<'_>,
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
        let asked_page = asked.and_then(|offset| Some(self.layout.at_source(offset, 0)?.page));
        // No page has the number `u64::MAX`.
        runs::coalesce(placed, PAGE_BYTES, asked_page.unwrap_or(u64::MAX), runs);
        let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let mut observer = FileObserver { states: &self.states, tampered: false };
        for run in runs.iter() {
            let target = Target {
                first_page: run.first_page,
                pages: run.pages,
                host_addr: run.host_addr,
                page_bytes: PAGE_BYTES,
            };
            let end = run.buffer_offset + run.pages * PAGE_BYTES;
            let fill = Fill::Copy(&loaded.bytes[run.buffer_offset..end]);
            match kernel::install(&self.filler, target, fill, &mut observer) {
                Ok(()) => {}
                Err(InstallError::Refused { errno, .. }) => {
                    let error = SourceError::permanent("the shared memory takes no more pages");
                    return Err(error.caused_by(errno));
                }
                Err(InstallError::ProcessGone) => {
                    return Err(SourceError::permanent("the shared memory was closed"));
                }
            }
        }
        if observer.tampered {
            self.tampered.store(true, Ordering::Relaxed);
        }
        self.whole()?;
        match asked.is_none_or(|offset| self.has(offset) == Some(true)) {
            true => Ok(()),
            false => Err(SourceError::permanent("the requested page is not among the loaded ones")),
        }
    }
}

impl fmt::Debug for FilledFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilledFile").field("pages", &self.layout.pages()).finish_non_exhaustive()
    }
}

/// Keeps the states of the pages of the file. The lock is held as long as it exists.
struct FileObserver<'a> {
    states: &'a PageStates,
    tampered: bool,
}

impl InstallObserver for FileObserver<'_> {
    fn wants(&self, page: u64) -> bool {
        self.states.of(page) == PageState::Missing
    }

    fn filled(&mut self, first_page: u64, pages: usize) {
        for page in first_page..first_page + pages as u64 {
            self.states.set(page, PageState::Present);
        }
    }

    /// This process did not add the page: otherwise its state would be present.
    fn existing(&mut self, _page: u64) {
        self.tampered = true;
    }

    fn gone(&mut self, _page: u64) {
        self.tampered = true;
    }

    /// No events are enabled. A fork of this process, for example, changes the memory map for a short time.
    fn drain_events(&mut self) -> Drained {
        std::thread::yield_now();
        Drained::Retry
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::source::load::LoadedPage;

    /// This holds for every setting of huge pages in files.
    #[test]
    fn only_filled_pages_are_in_the_file() {
        let memfd = rustix::fs::memfd_create("filled", rustix::fs::MemfdFlags::CLOEXEC);
        let memfd = File::from(memfd.expect("a memfd"));
        memfd.set_len(8 << 20).expect("a sparse file");
        let file = match FilledFile::new(memfd.as_fd(), 8 << 20) {
            Ok(file) => file,
            Err(error) => {
                assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{error}");
                let line = format!("SKIPPED only_filled_pages_are_in_the_file: {error}\n");
                return io::Write::write_all(&mut io::stderr(), line.as_bytes()).expect("stderr");
            }
        };
        let bytes = vec![7; 2 * PAGE_BYTES];
        let page = |number: u64, buffer_offset| LoadedPage {
            source_offset: number * PAGE_BYTES as u64,
            buffer_offset,
        };
        let pages = [page(513, 0), page(700, PAGE_BYTES)];
        let loaded = LoadedPages { bytes: &bytes, pages: &pages, cost: Default::default() };
        let mut runs = Vec::new();
        file.fill(&loaded, Some(700 * 4096), &mut runs).expect("they get in");
        assert_eq!(memfd.metadata().expect("a file").blocks() * 512, 2 * PAGE_BYTES as u64);
        let has = [513, 512, 700, 2047, 2048].map(|page| file.has(page * PAGE_BYTES as u64));
        assert_eq!(has, [Some(true), Some(false), Some(true), Some(false), None]);
        let error = file.fill(&loaded, Some(5 * 4096), &mut runs).expect_err("it is not there");
        assert!(error.to_string().contains("not among the loaded ones"), "{error}");
    }
}
