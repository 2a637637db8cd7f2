//! Puts a restored guest back to the snapshot that it came from, in place.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use pager::Pager;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{OnProgress, ReadAt};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::devices::{self, DeviceError};
use crate::error::{GuestFailure, MemoryError, RestoreError};
use crate::guest_memory;
use crate::memory::{Restored, Service, VmMemory};
use crate::memory_map::{gpa_ranges, source_ranges};
use crate::pagemap::private_pages;
use crate::restore;
use crate::vm::Vm;
use crate::written_pages::len_bytes;

/// A guest that was not reset. After [`ResetError::Unfinished`] it is stopped permanently; after all others nothing is
/// changed, and it can be resumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// There is no snapshot to go back to.
    #[error("the guest was not restored from a snapshot, so that there is none to reset it to")]
    NotRestored,
    /// The guest writes to a file that is not part of its state, and the file cannot be put back.
    #[error(
        "the guest writes to {}, which a reset cannot undo: restore it with an overlay for its disks", path.display()
    )]
    OutsideFile {
        /// The disk.
        path: PathBuf,
    },
    /// Such a guest cannot be reset.
    #[error("a guest whose touched pages are recorded cannot be reset")]
    Recorded,
    /// A [`Cut`](crate::Cut) or [`Armed`](crate::Armed) of the guest exists, which needs its memory. This is the last
    /// check: without it the guest can be reset.
    #[error("a live snapshot of the guest is not complete yet")]
    Busy,
    /// A page of the guest could not be loaded.
    #[error(transparent)]
    Failed(GuestFailure),
    /// The snapshot's state cannot be read, or is none of this guest.
    #[error("cannot read the snapshot again")]
    Snapshot(#[source] Box<RestoreError>),
    /// The image from which memory is mapped has changed.
    #[error(transparent)]
    Image(MemoryError),
    /// The snapshot is not one of this guest, or the guest has stopped.
    #[error(transparent)]
    Machine(vmm::ResetError),
    /// The guest is between two states.
    #[error("the guest was partly reset, and is stopped")]
    Unfinished(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What a reset has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResetStats {
    /// Memory that was put back, in bytes: pages that the guest had written to, and with some kinds of memory others
    /// ([`Vm::reset`]).
    pub memory_bytes: u64,
}

impl Vm {
    /// Puts the guest back to the snapshot from which it was restored: memory, vCPUs, devices, and the overlays of its
    /// disks. What its devices are connected to stays; connections of its vsock are closed, as by a restore. The clocks are
    /// those of a restore at this moment ([`RestoreConfig::clock`](crate::RestoreConfig::clock)), and it has a new generation
    /// id.
    ///
    /// Of a lazily restored guest, the pages are dropped that were written to, or without
    /// [`RestoreConfig::quick_resets`](crate::RestoreConfig::quick_resets) all, and are loaded again when they are touched.
    /// Pages that a guest wrote to which shares memory, or runs from an image, have the shared content again. Of an
    /// eagerly restored guest, the pages that were written to are loaded again, or without `quick_resets` all. `progress` is
    /// called only if all are; `Break` stops the guest permanently.
    ///
    /// # Errors
    /// [`ResetError`]
    pub fn reset(&mut self, progress: OnProgress<'_>) -> Result<ResetStats, ResetError> {
        let memory = Arc::clone(&self.memory);
        let restored = memory.restored().ok_or(ResetError::NotRestored)?;
        if let Some(path) = self.machine.outside_file() {
            return Err(ResetError::OutsideFile { path });
        }
        if matches!(restored.service, Service::Recorded { .. }) {
            return Err(ResetError::Recorded);
        }
        if let Some(failure) = memory.failure() {
            return Err(ResetError::Failed(failure));
        }
        memory.check_image().map_err(ResetError::Image)?;
        let unread = |error| ResetError::Snapshot(Box::new(error));
        let state = restore::machine_state(&restored.snapshot, &restored.file).map_err(unread)?;
        let contents: Result<Vec<_>, DeviceError> = (0..state.devices().len())
            .map(|place| devices::content(&restored.snapshot, place).map(Some))
            .collect();
        let contents = contents
            .map_err(|error| unread(RestoreError::Device { file: restored.file.clone(), error }))?;
        self.machine.check_reset(&state).map_err(ResetError::Machine)?;
        // The last check, so that the caller can drop its live snapshot for a reset that is made then.
        if memory.has_window() {
            return Err(ResetError::Busy);
        }

        // From here on, the guest is between two states.
        let put_back = self.put_memory_back(&memory, restored, progress).and_then(|bytes| {
            // After memory: KVM writes to it when the vCPUs are set.
            self.machine.reset(&state, &contents, restored.clock)?;
            Ok(bytes)
        });
        match put_back {
            Ok(memory_bytes) => Ok(ResetStats { memory_bytes }),
            Err(error) => {
                let reason = pager::with_causes(&*error);
                self.machine.handle().fail(format!("the guest was partly reset: {reason}"));
                Err(ResetError::Unfinished(error))
            }
        }
    }

    /// Returns how many bytes were put back.
    fn put_memory_back(
        &mut self,
        memory: &VmMemory,
        restored: &Restored,
        progress: OnProgress<'_>,
    ) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        let written = self.machine.take_written()?;
        let written = written.map(|gpas| source_ranges(&memory.regions, &gpas));
        match &restored.service {
            Service::Lazy { pager, .. } => {
                memory.unprotect();
                Ok(pager.reset(written.as_deref())?)
            }
            Service::Loaded { kept, .. } => {
                if let Some(written) = &written {
                    return Ok(memory.put_back_written(&restored.snapshot, kept, written)?);
                }
                let own = memory.drop_own_pages()?;
                let loaded = restore::load(&restored.snapshot, &memory.mapped, progress)?;
                restored.snapshot.release(&loaded);
                Ok(own)
            }
            Service::Shared(_) => Ok(memory.copy_shared_pages()?),
            Service::Image { .. } => Ok(memory.drop_own_pages()?),
            Service::Recorded { .. } => Err(ResetError::Recorded.into()),
        }
    }
}

impl VmMemory {
    /// Whether a live snapshot has a window of the memory.
    fn has_window(&self) -> bool {
        let protection = self.protection.lock().unwrap_or_else(PoisonError::into_inner);
        protection.as_ref().is_some_and(|protection| protection.has_window())
            || self.pager().is_some_and(Pager::has_window)
    }

    /// Drops the protection of live snapshots, so that a pager can register the memory again.
    fn unprotect(&self) {
        *self.protection.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Drops all pages that only this process has: of an image's mapping those that the guest has written to, of anonymous
    /// memory all.
    fn drop_own_pages(&self) -> Result<u64, MemoryError> {
        let own = private_pages(&self.mapped, &self.regions)?;
        own.iter().try_for_each(|range| self.drop_pages(range))?;
        Ok(len_bytes(&own))
    }

    /// Copies the content of the shared file into the pages that the guest has written to, and returns how many bytes
    /// differed. The pages cannot be dropped, because the page server would take that for memory that the guest does not
    /// need any more. Pages that are equal are only read: among them are zero pages of the kernel, which the page server
    /// has installed, and which a write would replace by memory of this process.
    fn copy_shared_pages(&self) -> Result<u64, MemoryError> {
        const STEP_BYTES: u64 = 1 << 20;
        let mut bytes = 0;
        let (mut shared, mut own) = (vec![0; STEP_BYTES as usize], vec![0; STEP_BYTES as usize]);
        for range in &private_pages(&self.mapped, &self.regions)? {
            for start in range.clone().step_by(STEP_BYTES as usize) {
                let end = range.end.min(start + STEP_BYTES);
                for gpas in gpa_ranges(&self.regions, start..end) {
                    let len = (gpas.end - gpas.start) as usize;
                    let (shared, own) = (&mut shared[..len], &mut own[..len]);
                    self.read_shared(gpas.start, shared)?;
                    guest_memory::read_at(&self.mapped, gpas.start, own)?;
                    bytes += self.copy_different_pages(gpas.start, shared, own)?;
                }
            }
        }
        Ok(bytes)
    }

    /// Reads from the shared file what is in the memory at `gpa`, which is in one region.
    fn read_shared(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let region = self.mapped.find_region(GuestAddress(gpa));
        let Some((region, file)) = region.and_then(|r| Some((r, r.file_offset()?))) else {
            return Err(MemoryError::Layout);
        };
        let at = file.start() + (gpa - region.start_addr().0);
        let read = file.file().read_exact_at(buf, at);
        read.map_err(MemoryError::system("cannot read the shared memory"))
    }

    /// Writes the pages of `shared` that differ from those of `own`, the memory at `gpa`. Returns their bytes.
    fn copy_different_pages(
        &self,
        gpa: u64,
        shared: &[u8],
        own: &[u8],
    ) -> Result<u64, MemoryError> {
        let mut bytes = 0;
        let pages = shared.chunks(PAGE_BYTES).zip(own.chunks(PAGE_BYTES));
        for (at, (shared, own)) in (gpa..).step_by(PAGE_BYTES).zip(pages) {
            if shared != own {
                guest_memory::write_at(&self.mapped, at, shared)?;
                bytes += shared.len() as u64;
            }
        }
        Ok(bytes)
    }
}
