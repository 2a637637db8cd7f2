//! Writes a VM to a file while it runs: all pages are protected from writes, a short pause fixes their bytes, and the file
//! is written behind it.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use pager::Region;
use pager::window::{Protection, ReadMemory, Window, WindowError, WindowOptions, WindowStats};
use serde_json::Value;
use snapfmt::{
    Contents, DeferredChunks, Header, OnProgress, Parent, ReadAt, Snapshot, StateBlob,
    WriteOptions, write_deferred, write_layer, write_snapshot,
};
use vm_memory::GuestAddress;
use vmm::{FrozenContent, HeldDiscards};

use crate::error::SnapshotError;
use crate::guest_memory::GuestBytes;
use crate::memory::{Origin, Restored, Service, VmMemory};
use crate::memory_map::source_ranges;
use crate::metadata::GuestMetadata;
use crate::pagemap::private_pages;
use crate::room;
use crate::vm::{RunningVm, Vm};
use crate::write::{Overlay, check_room, device_content, guest_of, machine_state, parent_of};

/// A guest whose memory is protected from writes, for [`Vm::cut`]. Dropping it takes the protection away.
#[derive(Debug)]
pub struct Armed {
    // Fields drop in this order: memory can be written before it may be given back.
    pub(crate) window: Window,
    pub(crate) discards: HeldDiscards,
    pub(crate) memory: Arc<VmMemory>,
}

/// A guest at one point in time. [`Cut::write`] and [`Cut::write_layer`] write it to a file, on any thread, while the
/// guest runs. Dropping it drops that point in time.
///
/// It must be written, or dropped, before the guest's memory is unmapped, which it makes sure of by keeping it.
pub struct Cut {
    pub(crate) window: Window,
    pub(crate) discards: HeldDiscards,
    state: StateBlob,
    contents: Vec<Option<FrozenContent>>,
    pub(crate) memory: Arc<VmMemory>,
}

/// The pages that a guest has written to, as ascending ranges of source offsets, if that is known.
#[derive(Clone, Debug, Default)]
pub struct Written(Option<Vec<Range<u64>>>);

impl fmt::Debug for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cut").field("window", &self.window).finish_non_exhaustive()
    }
}

impl RunningVm {
    /// Protects the guest's memory from writes while it runs, so that the pause for [`Vm::cut`] is short. It takes about
    /// 20 ms for each GiB of memory that is in use. A page that the guest writes after that is protected again in the
    /// pause, so the pause is best soon.
    ///
    /// A guest that was booted, or restored eagerly or lazily, can be protected.
    ///
    /// # Errors
    /// [`SnapshotError::OutsideFile`]; [`SnapshotError::NotLive`]; [`SnapshotError::Window`]: the kernel lacks what it
    /// needs. Then nothing is protected.
    pub fn arm(&self, options: WindowOptions) -> Result<Armed, SnapshotError> {
        refuse_outside_file(self.machine.outside_file())?;
        arm(&self.memory, self.machine.hold_discards(), options)
    }
}

impl Vm {
    /// As [`RunningVm::arm`], for a guest that is paused and is to be resumed before it is written.
    ///
    /// # Errors
    /// As there.
    pub fn arm(&self, options: WindowOptions) -> Result<Armed, SnapshotError> {
        refuse_outside_file(self.machine.outside_file())?;
        arm(&self.memory, self.machine.hold_discards(), options)
    }

    /// Takes the point in time: reads the machine's state, and protects what was written since [`RunningVm::arm`]. The
    /// guest can be resumed after it, and the result written meanwhile.
    ///
    /// # Errors
    /// [`SnapshotError`]. The guest can be resumed after an error, too.
    pub fn cut(&mut self, armed: Armed) -> Result<Cut, SnapshotError> {
        // First, because KVM may write to memory while its state is read.
        let state = machine_state(&mut self.machine)?;
        let contents = self.machine.freeze_device_contents().map_err(SnapshotError::Device)?;
        armed.window.cut().map_err(SnapshotError::Window)?;
        let Armed { window, discards, memory } = armed;
        Ok(Cut { window, discards, state, contents, memory })
    }

    /// The pages that the guest, or this process, has written to since it was restored or reset, for
    /// [`Cut::write_deferred`]. They are not known of a guest without
    /// [`RestoreConfig::quick_resets`](crate::RestoreConfig::quick_resets).
    ///
    /// # Errors
    /// KVM's log cannot be read.
    pub fn written(&mut self) -> Result<Written, SnapshotError> {
        let gpas = self.machine.written().map_err(vmm::SaveError::from)?;
        Ok(Written(gpas.map(|gpas| source_ranges(&self.memory.regions, &gpas))))
    }
}

impl Cut {
    /// Writes all of the guest, as [`Vm::snapshot`] does. Memory that a lazily restored guest has not touched is read
    /// from its snapshot.
    ///
    /// # Errors
    /// [`SnapshotError`]
    pub fn write(
        &self,
        out: &Path,
        options: &WriteOptions,
        progress: OnProgress<'_>,
    ) -> Result<Header, SnapshotError> {
        let (saved, states) = (Saved(self), self.states()?);
        let options = &self.memory.as_sealed(options);
        let write = |bytes: &dyn ReadAt, data: &[Range<u64>], guest: Value| {
            let check = || self.window.check();
            check_room(data, options, true)?;
            let contents = self.contents(bytes, data, &states, guest).read_once(&check);
            Ok(write_snapshot(out, contents, options, progress)?.0)
        };
        let restored = match &self.memory.origin {
            Origin::Booted { file, guest } => {
                return write(&saved, &self.only(file.touched()?), guest.clone());
            }
            Origin::Restored(restored) => restored,
        };
        self.memory.check_complete(restored, out)?;
        let guest = guest_of(&restored.snapshot)?;
        match self.window.own_pages() {
            None => write(&saved, &self.only(self.private_pages()?), guest),
            Some(own) => {
                let rest = restored.snapshot.populated();
                let data: Vec<_> = own.iter().cloned().chain(rest).collect();
                let rest = restored.snapshot.memory();
                write(&Overlay { mapped: &saved, own: &own, rest }, &data, guest)
            }
        }
    }

    /// Writes the changes since the snapshot from which the guest was restored, as [`Vm::snapshot_layer`] does. Memory
    /// that a lazily restored guest has not touched is not read.
    ///
    /// # Errors
    /// [`SnapshotError`]; [`SnapshotError::NotRestored`] for a guest that was booted here.
    pub fn write_layer(
        &self,
        out: &Path,
        options: &WriteOptions,
        progress: OnProgress<'_>,
    ) -> Result<Header, SnapshotError> {
        let Origin::Restored(restored) = &self.memory.origin else {
            return Err(SnapshotError::NotRestored);
        };
        self.memory.check_complete(restored, out)?;
        let options = &self.memory.as_sealed(options);
        let snapshot = &restored.snapshot;
        let data = self.only(self.changed_pages(snapshot)?);
        check_room(&data, options, true)?;
        let (saved, states) = (Saved(self), self.states()?);
        let (guest, check) = (guest_of(snapshot)?, || self.window.check());
        let contents = self.contents(&saved, &data, &states, guest).read_once(&check);
        let parent = Parent::new(snapshot, parent_of(restored, out)?);
        Ok(write_layer(out, contents, &parent, options, progress)?.0)
    }

    /// Writes a file that opens, and whose memory is added by [`Cut::add`]: a layer on the snapshot from which the guest
    /// was restored, or all of a guest that was booted. The layer has a place for each page that may have changed, which is
    /// not compared. `written` is that of the pause in which this point in time was taken, after that. Of `options`, only
    /// `chunk_pages`, `existing` and `seal` are used.
    ///
    /// # Errors
    /// [`SnapshotError`]
    pub fn write_deferred(
        &self,
        out: &Path,
        written: &Written,
        options: &WriteOptions,
    ) -> Result<(Header, DeferredChunks), SnapshotError> {
        let (saved, states) = (Saved(self), self.states()?);
        let options = &self.memory.as_sealed(options);
        let write = |data: &[Range<u64>], guest, parent: Option<&Parent<'_>>| {
            check_room(data, options, true)?;
            let contents = self.contents(&saved, data, &states, guest);
            Ok(write_deferred(out, &contents, parent, options)?)
        };
        match &self.memory.origin {
            Origin::Booted { file, guest } => write(&file.touched()?, guest.clone(), None),
            Origin::Restored(restored) => {
                self.memory.check_complete(restored, out)?;
                let snapshot = &restored.snapshot;
                let parent = Parent::new(snapshot, parent_of(restored, out)?);
                let data = match &written.0 {
                    // The other pages were loaded, and have the bytes of the snapshot.
                    Some(written) => match self.window.own_pages() {
                        Some(own) => common(&own, written),
                        // All were loaded.
                        None => written.clone(),
                    },
                    None => self.changed_pages(snapshot)?,
                };
                write(&data, guest_of(snapshot)?, Some(&parent))
            }
        }
    }

    /// Lets the guest write pages that are not in the file without a copy of what was there.
    pub fn release_others(&self, chunks: &DeferredChunks) {
        self.window.only(&chunks.memory());
    }

    /// Adds a chunk to a file of [`Cut::write_deferred`], on any thread. When all are added, this can be dropped.
    ///
    /// # Errors
    /// [`SnapshotError::Write`]. Then the file lacks the chunk, and will.
    pub fn add(&self, chunks: &DeferredChunks, chunk: usize) -> Result<(), SnapshotError> {
        Ok(chunks.add(chunk, &CheckedSaved(Saved(self)))?)
    }

    /// What was done so far to keep the point in time.
    #[must_use]
    pub fn stats(&self) -> WindowStats {
        self.window.stats()
    }

    pub(crate) fn contents<'a>(
        &'a self,
        bytes: &'a dyn ReadAt,
        data: &'a [Range<u64>],
        states: &'a [StateBlob],
        guest: Value,
    ) -> Contents<'a> {
        Contents::new(&self.memory.regions, bytes, data)
            .states(states)
            .metadata(GuestMetadata::here(guest).to_metadata())
    }

    /// The state of the machine, and the contents of its devices.
    pub(crate) fn states(&self) -> Result<Vec<StateBlob>, SnapshotError> {
        let mut states = vec![self.state.clone()];
        for (place, content) in self.contents.iter().enumerate() {
            let Some(content) = content else { continue };
            let bytes = content().map_err(SnapshotError::Device)?;
            states.extend(device_content(place, bytes));
        }
        Ok(states)
    }

    /// Pages that may differ from those of the snapshot from which the guest was restored.
    fn changed_pages(&self, snapshot: &Snapshot) -> Result<Vec<Range<u64>>, SnapshotError> {
        Ok(match self.window.own_pages() {
            Some(own) => own,
            None => {
                let mut data = self.private_pages()?;
                // A page that the guest gave back is no longer mapped, but has content in the snapshot.
                data.extend(snapshot.populated());
                data
            }
        })
    }

    /// Pages that may not be zero: those in memory now. Each page that was in memory at the cut still is.
    fn private_pages(&self) -> Result<Vec<Range<u64>>, SnapshotError> {
        Ok(private_pages(&self.memory.mapped, &self.memory.regions)?)
    }

    /// Lets the guest write all other pages without a copy of what was there.
    fn only(&self, data: Vec<Range<u64>>) -> Vec<Range<u64>> {
        self.window.only(&data);
        data
    }
}

/// The bytes of the cut, by source offset.
pub(crate) struct Saved<'a>(pub(crate) &'a Cut);

impl ReadAt for Saved<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.window.read(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.memory.regions.iter().map(|region| region.len).sum())
    }
}

/// What two lists of ascending ranges have in common.
fn common(one: &[Range<u64>], other: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut common = Vec::new();
    let (mut here, mut there) = (one.iter().peekable(), other.iter().peekable());
    while let (Some(a), Some(b)) = (here.peek(), there.peek()) {
        let part = a.start.max(b.start)..a.end.min(b.end);
        if a.end < b.end {
            here.next();
        } else {
            there.next();
        }
        if !part.is_empty() {
            common.push(part);
        }
    }
    common
}

/// As [`Saved`], for bytes that are used before all are read.
struct CheckedSaved<'a>(Saved<'a>);

impl ReadAt for CheckedSaved<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)?;
        self.0.0.window.check()
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.0.len_bytes()
    }
}

fn refuse_outside_file(file: Option<std::path::PathBuf>) -> Result<(), SnapshotError> {
    match file {
        Some(path) => Err(SnapshotError::OutsideFile { path }),
        None => Ok(()),
    }
}

fn arm(
    memory: &Arc<VmMemory>,
    discards: HeldDiscards,
    options: WindowOptions,
) -> Result<Armed, SnapshotError> {
    let memory_bytes: u64 = memory.regions.iter().map(|region| region.len).sum();
    let needed_bytes = room::of_window(options.staging_bytes, memory_bytes);
    room::check(needed_bytes).map_err(|error| SnapshotError::NoRoom { needed_bytes, error })?;
    let read = reader(memory)?;
    let window = match memory.restored().map(|restored| &restored.service) {
        Some(Service::Lazy { pager, .. }) => match pager.window(Arc::clone(&read), options) {
            Err(WindowError::Released) => memory.protect(read, options),
            window => window,
        },
        _ => memory.protect(read, options),
    };
    let window = window.map_err(SnapshotError::Window)?;
    Ok(Armed { window, discards, memory: Arc::clone(memory) })
}

/// Reads pages that are in memory.
fn reader(memory: &VmMemory) -> Result<ReadMemory, SnapshotError> {
    let what = match &memory.origin {
        Origin::Booted { file, .. } => {
            let file = file.file.try_clone().map_err(|error| {
                SnapshotError::Memory(
                    crate::error::MemoryError::system("cannot read guest memory")(error),
                )
            })?;
            return Ok(Arc::new(move |offset, buf: &mut [u8]| file.read_exact_at(buf, offset)));
        }
        Origin::Restored(Restored { service, .. }) => match service {
            Service::Loaded { .. } | Service::Lazy { .. } => {
                let (mapped, regions) = (Arc::clone(&memory.mapped), memory.regions.clone());
                return Ok(Arc::new(move |offset, buf: &mut [u8]| {
                    GuestBytes { memory: &mapped, regions: &regions }.read_exact_at(buf, offset)
                }));
            }
            Service::Recorded { .. } => "whose touched pages are recorded",
            Service::Shared(_) => "that shares the memory of a page server",
            Service::Image { .. } => "whose memory is a mapping of an image",
        },
    };
    Err(SnapshotError::NotLive { what })
}

impl VmMemory {
    /// A window of memory that has no pager.
    fn protect(&self, read: ReadMemory, options: WindowOptions) -> Result<Window, WindowError> {
        let mut protection =
            self.protection.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let protection = match &*protection {
            Some(protection) => Arc::clone(protection),
            None => {
                let offset_of = |gpa: GuestAddress| {
                    let found = self.regions.iter().find(|region| region.gpa == gpa.0);
                    found.map_or(u64::MAX, |region| region.source_offset)
                };
                let regions = Region::of_guest_memory(&self.mapped, offset_of);
                let regions = regions.map_err(|_| WindowError::Unsupported)?;
                Arc::clone(protection.insert(Arc::new(Protection::new(regions)?)))
            }
        };
        Window::open(protection, read, options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_parts_of_ranges_are_found() {
        let one = [0..4, 6..8, 10..20];
        assert_eq!(
            common(&one, &[1..2, 3..7, 8..10, 12..13, 19..30]),
            [1..2, 3..4, 6..7, 12..13, 19..20]
        );
        assert_eq!(common(&one, &one), one);
        assert!(common(&one, &[]).is_empty() && common(&[], &one).is_empty());
    }
}
