//! A VM's memory together with where its content comes from.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use pager::shared::SharedClone;
use pager::{Pager, Recording};
use serde_json::Value;
use snapfmt::{Loaded, MemoryRegion, Snapshot};
use vm_memory::GuestMemoryMmap;

use crate::error::{GuestFailure, MemoryError};
use crate::guest_memory::{ArrivingBytes, FileMemory};
use crate::stable_file::StableFile;

/// Guest memory, and what serves it. A [`Vm`](crate::Vm) holds it for as long as it can run: a page that has not arrived is
/// never read as zeros.
pub struct VmMemory {
    // Fields drop in this order: a pager lets go of the mapping before that is unmapped.
    pub(crate) origin: Origin,
    pub(crate) mapped: Arc<GuestMemoryMmap>,
    pub(crate) regions: Vec<MemoryRegion>,
}

/// Where its content comes from.
pub(crate) enum Origin {
    /// The guest was booted here, in a memfd. What was never touched is a hole of it.
    Booted {
        file: FileMemory,
        /// What the metadata of its snapshots says of the guest.
        guest: Value,
    },
    Restored(Restored),
}

pub(crate) struct Restored {
    pub(crate) service: Service,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) file: PathBuf,
}

/// How a restored guest gets its pages.
pub(crate) enum Service {
    /// All were loaded before it ran.
    Loaded { _release: Release },
    /// One by one, by a pager into anonymous memory. What was never touched is only in the snapshot.
    Lazy { pager: Pager, set_damage: SetDamage },
    /// By a pager into a memfd that is mapped privately, and the touched pages are recorded.
    Recorded { pager: Pager, recording: Recording },
    /// From a page server, which shares them with other guests.
    Shared(SharedClone),
    /// By the kernel, from a raw image that is mapped privately.
    Image { image: StableFile, path: PathBuf },
}

/// Why a working set could not be used, once that is known.
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

    /// The mapping. Touching a page that has not arrived waits for it; one that cannot be had is SIGBUS: see
    /// [`VmMemory::reader`].
    #[must_use]
    pub fn mapped(&self) -> &GuestMemoryMmap {
        &self.mapped
    }

    /// Reads memory by source offset. A page that cannot be had is an error.
    #[must_use]
    pub fn reader(&self) -> ArrivingBytes<'_> {
        ArrivingBytes { memory: &self.mapped, regions: &self.regions }
    }

    /// The snapshot that the guest was restored from.
    #[must_use]
    pub fn snapshot(&self) -> Option<&Arc<Snapshot>> {
        self.restored().map(|restored| &restored.snapshot)
    }

    /// Its path.
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

    /// Whether pages come when they are touched: from a pager, a page server or a raw image. Touching one may wait.
    #[must_use]
    pub fn is_served(&self) -> bool {
        match self.restored().map(|restored| &restored.service) {
            Some(Service::Loaded { .. }) | None => false,
            Some(_) => true,
        }
    }

    /// Which pages are touched, if that is recorded.
    #[must_use]
    pub fn recording(&self) -> Option<&Recording> {
        match &self.restored()?.service {
            Service::Recorded { recording, .. } => Some(recording),
            _ => None,
        }
    }

    /// Why the file's working set is not used, if that has turned out.
    #[must_use]
    pub fn working_set_damage(&self) -> Option<&str> {
        match &self.restored()?.service {
            Service::Lazy { set_damage, .. } => set_damage.get().map(String::as_str),
            _ => None,
        }
    }

    /// How much memory was ever touched, in bytes, of large pages all of each. `None` where that is not known.
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

    /// Why the pager cannot serve the guest any more.
    #[must_use]
    pub fn failure(&self) -> Option<GuestFailure> {
        let failure = self.pager()?.failure()?;
        Some(GuestFailure::of_pager(self.file()?, failure))
    }

    /// Whether the raw image is still what was mapped, which nothing else checks.
    ///
    /// # Errors
    /// The image was written to: the guest may have run from two.
    pub fn check_image(&self) -> Result<(), MemoryError> {
        match self.restored().map(|restored| &restored.service) {
            Some(Service::Image { image, path }) => image
                .check_unchanged()
                .map_err(|error| MemoryError::Image { path: path.clone(), error }),
            _ => Ok(()),
        }
    }

    /// Ends the service of pages, after the VM was dropped. The error is what the page server could not bring.
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

/// A thread that drops the file from the page cache, while the guest runs that has its memory now. Dropping this waits for it.
pub(crate) struct Release(Option<JoinHandle<()>>);

impl Release {
    /// Where no thread can be started, the file stays cached.
    pub(crate) fn start(snapshot: &Arc<Snapshot>, loaded: Loaded) -> Self {
        let snapshot = Arc::clone(snapshot);
        let release = move || snapshot.release(&loaded);
        Self(thread::Builder::new().name("release".into()).spawn(release).ok())
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // A panic in it leaves the file cached.
            let _ = thread.join();
        }
    }
}
