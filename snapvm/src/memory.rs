//! A VM's memory, and the source of its content.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};

use pager::shared::SharedClone;
use pager::window::Protection;
use pager::{Pager, Recording};
use serde_json::Value;
use snapfmt::{Loaded, MemoryRegion, Snapshot};
use vm_memory::GuestMemoryMmap;

use crate::error::{GuestFailure, MemoryError};
use crate::guest_memory::{ArrivingBytes, FileMemory};
use crate::kept_pages::KeptPages;
use crate::stable_file::StableFile;

/// Guest memory, and the service that provides its pages. A [`Vm`](crate::Vm) owns it for as long as it can run, so
/// that a missing page is never read as zeros.
pub struct VmMemory {
    /// For memory without a pager, after its first live snapshot.
    pub(crate) protection: Mutex<Option<Arc<Protection>>>,
    // Fields drop in this order: a pager ends before its mapping is unmapped.
    pub(crate) origin: Origin,
    pub(crate) mapped: Arc<GuestMemoryMmap>,
    pub(crate) regions: Vec<MemoryRegion>,
}

/// The source of the content of memory.
pub(crate) enum Origin {
    /// The guest was booted in a memfd. Pages that were never touched are holes of the memfd.
    Booted {
        file: FileMemory,
        /// The description of the guest, for the metadata of its snapshots.
        guest: Value,
    },
    Restored(Restored),
}

pub(crate) struct Restored {
    pub(crate) service: Service,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) file: PathBuf,
    /// The guest's clocks after a reset.
    pub(crate) clock: vmm::Clock,
}

/// How a restored guest gets its pages.
pub(crate) enum Service {
    /// All pages were loaded before the guest ran.
    Loaded { kept: Mutex<KeptPages>, _release: Release },
    /// A pager installs pages in anonymous memory. Missing pages are only in the snapshot.
    Lazy { pager: Pager, set_damage: SetDamage },
    /// A pager loads pages into a memfd that is mapped privately, and the touched pages are recorded.
    Recorded { pager: Pager, recording: Recording },
    /// A page server provides pages, and shares them with other guests.
    Shared(SharedClone),
    /// The kernel loads pages from a raw image that is mapped privately.
    Image { image: StableFile, path: PathBuf },
}

/// The reason why a working set could not be used, once it is known.
pub(crate) type SetDamage = Arc<OnceLock<String>>;

impl fmt::Debug for VmMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmMemory").field("file", &self.file()).finish_non_exhaustive()
    }
}

impl VmMemory {
    /// The memory map, ascending by source offset.
    #[must_use]
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// The mapping. Touching a missing page waits until it is installed. A page that cannot be loaded raises SIGBUS,
    /// which [`VmMemory::reader`] avoids.
    #[must_use]
    pub fn mapped(&self) -> &GuestMemoryMmap {
        &self.mapped
    }

    /// Reads memory by source offset. A page that cannot be loaded is an error.
    #[must_use]
    pub fn reader(&self) -> ArrivingBytes<'_> {
        ArrivingBytes { memory: &self.mapped, regions: &self.regions }
    }

    /// The snapshot from which the guest was restored.
    #[must_use]
    pub fn snapshot(&self) -> Option<&Arc<Snapshot>> {
        self.restored().map(|restored| &restored.snapshot)
    }

    /// The path of that snapshot.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.restored().map(|restored| restored.file.as_path())
    }

    /// The pager of a lazily restored guest.
    #[must_use]
    pub fn pager(&self) -> Option<&Pager> {
        match &self.restored()?.service {
            Service::Lazy { pager, .. } | Service::Recorded { pager, .. } => Some(pager),
            Service::Loaded { .. } | Service::Shared(_) | Service::Image { .. } => None,
        }
    }

    /// Whether pages are loaded when they are touched: by a pager, a page server or the kernel. Touching one may wait.
    #[must_use]
    pub fn is_served(&self) -> bool {
        match self.restored().map(|restored| &restored.service) {
            Some(Service::Loaded { .. }) | None => false,
            Some(_) => true,
        }
    }

    /// The recording of the touched pages, if there is one.
    #[must_use]
    pub fn recording(&self) -> Option<&Recording> {
        match &self.restored()?.service {
            Service::Recorded { recording, .. } => Some(recording),
            _ => None,
        }
    }

    /// The reason why the file's working set is not used, once it is known.
    #[must_use]
    pub fn working_set_damage(&self) -> Option<&str> {
        match &self.restored()?.service {
            Service::Lazy { set_damage, .. } => set_damage.get().map(String::as_str),
            _ => None,
        }
    }

    /// How much memory was ever touched, in bytes. A touched large page counts whole. `None` if that is not known.
    #[must_use]
    pub fn touched_bytes(&self) -> Option<u64> {
        match &self.origin {
            Origin::Booted { file, .. } => file.touched_bytes(),
            Origin::Restored(_) => {
                let pages = self.pager()?.stats();
                Some(pages.pages.present * pages.page_bytes)
            }
        }
    }

    /// The reason why the pager cannot serve the guest any more, if there is one.
    #[must_use]
    pub fn failure(&self) -> Option<GuestFailure> {
        let failure = self.pager()?.failure()?;
        Some(GuestFailure::of_pager(self.file()?, failure))
    }

    /// Checks that the raw image has not changed since it was mapped. Nothing else checks that.
    ///
    /// # Errors
    /// The image has changed, so the guest may have read pages of two images.
    pub fn check_image(&self) -> Result<(), MemoryError> {
        match self.restored().map(|restored| &restored.service) {
            Some(Service::Image { image, path }) => image
                .check_unchanged()
                .map_err(|error| MemoryError::Image { path: path.clone(), error }),
            _ => Ok(()),
        }
    }

    /// Ends the service of pages, after the VM was dropped. The error is the first failure of the page server.
    ///
    /// # Errors
    /// [`GuestFailure`]
    pub fn end(self) -> Result<(), GuestFailure> {
        let Origin::Restored(Restored { service, file, .. }) = self.origin else { return Ok(()) };
        let reason = match service {
            Service::Shared(clone) => clone.stop(),
            _ => None,
        };
        reason.map_or(Ok(()), |reason| Err(GuestFailure::new(&file, reason)))
    }

    pub(crate) fn restored(&self) -> Option<&Restored> {
        match &self.origin {
            Origin::Booted { .. } => None,
            Origin::Restored(restored) => Some(restored),
        }
    }
}

/// A thread that drops the file from the page cache while the guest runs. Dropping this waits for the thread.
pub(crate) struct Release(Option<JoinHandle<()>>);

impl Release {
    /// Starts the thread. If that fails, the file stays cached.
    pub(crate) fn start(snapshot: &Arc<Snapshot>, loaded: Loaded) -> Self {
        let snapshot = Arc::clone(snapshot);
        let release = move || snapshot.release(&loaded);
        Self(thread::Builder::new().name("release".into()).spawn(release).ok())
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // If the thread has panicked, the file stays cached.
            let _ = thread.join();
        }
    }
}
