//! A guest brought back from a file, about to run: what every command does that needs one.

use std::fs::File;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pager::shared::SharedClone;
use pager::{Failure, FailurePolicy, Pager, PagerBuilder, Placement, Populate, Recording, Region};
use snapfmt::{Loaded, Snapshot};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::state::{STATE_KIND, VmState};
use vmm::{Clock, Console, HostCpu, MemoryRange, PausedVm, RestoreOptions, VmHandle};

use crate::awaited_source::AwaitedSource;
use crate::commands::{Session, open, reading, serve};
use crate::devices::SavedDeviceArgs;
use crate::exit::GuestStopped;
use crate::prefetch::{self, PrefetchArg, SetDamage};
use crate::progress::Bar;
use crate::recording::Record;
use crate::waits::Wait;
use crate::watched::Watched;
use crate::{guest_memory, size};

/// Where a guest comes from, and how.
pub(crate) struct Origin<'a> {
    pub(crate) file: &'a Path,
    /// Files that may be the parents of a layer.
    pub(crate) parents: &'a [PathBuf],
    /// Whether pages come on faults instead of all at once.
    pub(crate) lazy: bool,
    /// Whose pages a lazy restore shares, if anybody's.
    pub(crate) share: Option<Share<'a>>,
    /// A raw image of the memory, mapped privately instead of reading the file's pages.
    pub(crate) image: Option<&'a Path>,
    /// What a lazy restore does with a page that cannot be had.
    pub(crate) on_error: FailurePolicy,
    /// How much memory the guest must have, if that was said.
    pub(crate) memory_bytes: Option<u64>,
    /// What a lazy restore loads in the background, and how many bytes a second at most.
    pub(crate) populate: Populate,
    pub(crate) populate_rate: Option<NonZeroU64>,
    /// What of the file's working set, and beyond, a lazy restore loads in front of the guest.
    pub(crate) prefetch: PrefetchArg,
    /// Whether and how a lazy restore records which pages are touched.
    pub(crate) record: Option<Record>,
    pub(crate) placement: Placement,
    /// What the guest's clocks do about the time it was stored.
    pub(crate) clock: Clock,
    /// Whether a CPU that lacks features of the saved one is taken.
    pub(crate) force: bool,
    /// Whether the guest stops when it asks to be stored.
    pub(crate) heed_requests: bool,
    /// What its devices are connected to.
    pub(crate) devices: &'a SavedDeviceArgs,
}

/// Pages that come from a page server.
#[derive(Clone, Copy)]
pub(crate) struct Share<'a> {
    pub(crate) socket: &'a Path,
    /// How long it has to answer.
    pub(crate) patience: Duration,
}

/// A guest that was brought back and does not run yet.
pub(crate) struct Restored {
    // Fields drop in this order: the vCPUs are gone before the pager, after which missing pages
    // would read as zeros.
    pub(crate) vm: PausedVm,
    pub(crate) pager: Option<Pager>,
    /// Which pages are touched, if that is recorded.
    pub(crate) recording: Option<Recording>,
    /// Why the file's working set is of no use, if that turns out.
    pub(crate) set_damage: SetDamage,
    pub(crate) clone: Option<SharedClone>,
    /// The raw image that memory is a mapping of, if it is.
    pub(crate) image: Option<Watched>,
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) snapshot: Arc<Snapshot>,
    /// Bytes of chunks that were read before the guest runs.
    pub(crate) loaded_bytes: u64,
    _release: Release,
    /// When the file was open, and when memory was loaded or given to the pager.
    pub(crate) opened: Instant,
    pub(crate) memory_ready: Instant,
}

impl Origin<'_> {
    /// Brings the guest back. It is paused by an interrupt, and by a failing pager.
    pub(crate) fn restore(
        &self,
        console: impl Console + 'static,
        session: &Session,
    ) -> Result<Restored> {
        let named = || self.file.display().to_string();
        let snapshot = Arc::new(open(self.file, self.parents)?);
        let opening = reading(self.file);
        let state = self.state(&snapshot).with_context(named)?;
        self.check_cpu(&snapshot, &state).with_context(named)?;
        // Before anything that takes time: a disk may be refused.
        let devices = self
            .devices
            .restore(state.devices(), |place| device_content(&snapshot, place))
            .with_context(named)?;
        drop(opening);
        let opened = Instant::now();

        // Memory first, and its pager: setting the vCPUs' state may touch it already.
        let ranges = guest_memory::to_ranges(snapshot.regions());
        let guest = GuestSlot::default();
        let (mut loaded_bytes, mut release) = (0, Release(None));
        let (mut pager, mut clone, mut recording) = (None, None, None);
        let (mut options, set_damage) = (RestoreOptions::default(), SetDamage::default());
        if self.lazy || self.image.is_some() {
            let first = snapshot
                .populated()
                .flat_map(|range| guest_memory::gpa_ranges(snapshot.regions(), range));
            options = options.register_first(first.collect());
        }
        let (mut recorded, mut image, mut prefetch_start) = (None, None, None);
        let memory = match (self.share, self.image) {
            (None, Some(path)) => {
                let _opening = reading(path);
                let (file, memory) = guest_memory::image(path, &ranges)?;
                image = Some(file);
                memory
            }
            (Some(share), _) => {
                let (started, memory) = self.start_clone(share, &snapshot, &ranges, &guest)?;
                clone = Some(started);
                memory
            }
            (None, None) if self.record.is_some() => {
                let (file, memory) = guest_memory::recorded(&ranges)?;
                recorded = Some(file);
                memory
            }
            (None, None) => guest_memory::private(&ranges)?,
        };
        let slices = slices(state.vcpus().len());
        if self.image.is_some() {
            // The kernel reads it, when the guest touches it.
        } else if !self.lazy {
            let loaded = load(&snapshot, &memory, session).with_context(named)?;
            loaded_bytes = loaded.bytes_read;
            release = Release::start(&snapshot, loaded);
        } else if let Some(file) = recorded {
            let (record, started) =
                self.start_recording(&snapshot, &memory, file, &guest, slices)?;
            (recording, pager) = (Some(record), Some(started));
        } else if clone.is_none() {
            let (started, start) =
                self.start_pager(&snapshot, &memory, &guest, &set_damage, slices)?;
            (pager, prefetch_start) = (Some(started), start);
        }
        let memory_ready = Instant::now();

        // Declared after the pager, which waits for its thread: gone before it, whatever goes wrong.
        let prefetch_start = prefetch_start;
        let options = options.guest_snapshot_trigger(self.heed_requests).clock(self.clock);
        let file = self.file.to_owned();
        let first = move || format!("the first pages of {} that the machine needs", file.display());
        let waiting = Wait::new(first).begin();
        let restored =
            PausedVm::restore_with(Arc::clone(&memory), &state, console, &options, devices);
        drop(waiting);
        let vm = match (restored, pager.as_ref().and_then(Pager::failure)) {
            // Also when the machine could be built: KVM passes over some pages that it cannot read.
            (_, Some(failure)) => return Err(damaged(self.file, failure)),
            (Ok(vm), None) => vm,
            (Err(error), None) => {
                return Err(error).with_context(|| format!("cannot restore {}", named()));
            }
        };
        drop(prefetch_start);
        guest.connect(vm.handle());
        session.interrupt.pauses(vm.handle());
        Ok(Restored {
            vm,
            pager,
            recording,
            set_damage,
            clone,
            image,
            memory,
            snapshot,
            loaded_bytes,
            _release: release,
            opened,
            memory_ready,
        })
    }

    /// The machine state of the file; checks that it and `--memory` fit to the file's memory.
    fn state(&self, snapshot: &Snapshot) -> Result<VmState> {
        let found = snapshot.header().memory_bytes;
        if let Some(expected) = self.memory_bytes
            && expected != found
        {
            bail!(
                "--memory {} expected, found {} in the snapshot; leave --memory out to take what is there",
                size::human(expected),
                size::human(found)
            );
        }
        let blob = snapshot
            .state(STATE_KIND)?
            .context("the file has no state of a KVM guest: it cannot be restored by snap")?;
        let state = VmState::decode(STATE_KIND, blob.version, &blob.bytes)?;
        if guest_memory::to_regions(state.memory()) != snapshot.regions() {
            bail!("the memory map of the file and that of the guest's state are not the same");
        }
        Ok(state)
    }

    /// The memory comes with its service: it must not be touched before.
    fn start_clone(
        &self,
        Share { socket, patience }: Share<'_>,
        snapshot: &Snapshot,
        ranges: &[MemoryRange],
        guest: &GuestSlot,
    ) -> Result<(SharedClone, Arc<GuestMemoryMmap>)> {
        let name = serve::snapshot_name(snapshot);
        let ranges: Vec<_> =
            ranges.iter().map(|r| (GuestAddress(r.gpa), r.len as usize, r.source_offset)).collect();
        let (file, guest) = (self.file.to_owned(), guest.clone());
        let on_failure = move |reason: String| guest.fail(stopped(&file, &reason).to_string());
        let server = socket.to_owned();
        let server = move || format!("the page server at {} to answer", server.display());
        let _waiting = Wait::new(server).at_most(patience).begin();
        SharedClone::start(socket, &name, &ranges, patience, on_failure)
            .with_context(|| format!("cannot share memory by {}", socket.display()))
    }

    /// Refuses a guest that was given CPU features which this host does not have.
    fn check_cpu(&self, snapshot: &Snapshot, state: &VmState) -> Result<()> {
        if self.force {
            return Ok(());
        }
        // Asking KVM takes time, which is not spent on the CPU that the guest was saved on.
        let saved = snapshot.metadata()?.other.remove("host_cpu").map(serde_json::from_value);
        if let Some(Ok(saved)) = saved
            && HostCpu::current() == saved
        {
            return Ok(());
        }
        let missing = vmm::missing_features(state)?;
        if missing.is_empty() {
            return Ok(());
        }
        bail!(
            "this host's CPU lacks what the guest was given: {}; --force-cpu restores it all the same, \
             and it may crash",
            missing.join(", ")
        )
    }

    fn start_pager(
        &self,
        snapshot: &Arc<Snapshot>,
        memory: &Arc<GuestMemoryMmap>,
        guest: &GuestSlot,
        set_damage: &SetDamage,
        slices: usize,
    ) -> Result<(Pager, Option<prefetch::Start>)> {
        let mut start = None;
        let mut builder =
            Pager::builder(Arc::new(AwaitedSource::new(Arc::clone(snapshot), self.file)))
                .regions(regions(snapshot, memory)?)
                .slices(slices);
        if self.prefetch != PrefetchArg::Off && prefetch::has_set(snapshot) {
            let (begin, wait) = prefetch::start();
            let list = prefetch::list(Arc::clone(snapshot), set_damage.clone());
            builder = builder.prefetch(list).prefetch_when(wait);
            start = Some(begin);
        }
        Ok((self.start(builder, guest)?, start))
    }

    fn start_recording(
        &self,
        snapshot: &Arc<Snapshot>,
        memory: &Arc<GuestMemoryMmap>,
        file: File,
        guest: &GuestSlot,
        slices: usize,
    ) -> Result<(Recording, Pager)> {
        let source = Arc::new(AwaitedSource::new(Arc::clone(snapshot), self.file));
        let recording = Recording::new(source, file, regions(snapshot, memory)?)
            .context("cannot record which pages are touched")?;
        let pager = self.start(Pager::recording(&recording).slices(slices), guest)?;
        Ok((recording, pager))
    }

    fn start(&self, builder: PagerBuilder, guest: &GuestSlot) -> Result<Pager> {
        let populate = match self.prefetch {
            PrefetchArg::All if self.record.is_none() => Populate::Full,
            _ => self.populate,
        };
        let (file, guest) = (self.file.to_owned(), guest.clone());
        builder
            .on_error(self.on_error)
            .placement(self.placement)
            .populate(populate)
            .populate_rate(self.populate_rate)
            .on_failure(move |failure| guest.fail(format!("{:#}", damaged(&file, failure))))
            .start()
            .context("cannot restore lazily (without --lazy, userfaultfd is not needed)")
    }
}

/// Demand threads for so many vCPUs, which may all wait for pages at once: no more than can run.
fn slices(vcpus: usize) -> usize {
    vcpus.min(thread::available_parallelism().map_or(1, |cpus| cpus.get()))
}

/// The regions of guest memory for the pager.
fn regions(snapshot: &Snapshot, memory: &Arc<GuestMemoryMmap>) -> Result<Vec<Region>> {
    let offset_of = |gpa: GuestAddress| {
        let regions = snapshot.regions().iter();
        regions.filter(|r| r.gpa == gpa.0).map(|r| r.source_offset).next().unwrap_or(u64::MAX)
    };
    Ok(Region::of_guest_memory(memory, offset_of)?)
}

/// What is stored of a device besides its state, nothing where there is no such section.
fn device_content(snapshot: &Snapshot, place: usize) -> Result<Vec<u8>> {
    let Some(kind) = vmm::state::device_content_kind(place) else { return Ok(Vec::new()) };
    let Some(blob) = snapshot.state(kind)? else { return Ok(Vec::new()) };
    if blob.version != vmm::state::DEVICE_CONTENT_VERSION {
        bail!("the content of device {place} is of version {}, which is not known", blob.version);
    }
    Ok(blob.bytes)
}

/// The guest that a failing pager stops: known only after the pager was started.
#[derive(Clone, Default)]
struct GuestSlot(Arc<OnceLock<VmHandle>>, Arc<OnceLock<String>>);

impl GuestSlot {
    fn connect(&self, guest: VmHandle) {
        let guest = self.0.get_or_init(|| guest);
        // The pager may have failed while there was no guest yet.
        if let Some(reason) = self.1.get() {
            guest.fail(reason);
        }
    }

    fn fail(&self, reason: String) {
        let reason = self.1.get_or_init(|| reason);
        if let Some(guest) = self.0.get() {
            guest.fail(reason);
        }
    }
}

/// An error that names the file, and why no page comes from it any more.
pub(crate) fn stopped(file: &Path, reason: &str) -> anyhow::Error {
    GuestStopped(format!("guest stopped: {}: {reason}", file.display())).into()
}

/// An error that names the file, what the pager could not do and every cause of it.
pub(crate) fn damaged(file: &Path, failure: &Failure) -> anyhow::Error {
    let mut text = format!("guest stopped: {}: {failure}", file.display());
    let mut cause = std::error::Error::source(failure);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    GuestStopped(text).into()
}

/// A thread that lets go of the file in the page cache, beside the guest that has its memory now. When this is dropped, it has.
struct Release(Option<JoinHandle<()>>);

impl Release {
    /// Where there is no thread for it, the file stays cached.
    fn start(snapshot: &Arc<Snapshot>, loaded: Loaded) -> Self {
        let snapshot = Arc::clone(snapshot);
        let release = move || snapshot.release(&loaded);
        Self(thread::Builder::new().name("release".into()).spawn(release).ok())
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // One that has panicked has let go of nothing: the file stays cached.
            let _ = thread.join();
        }
    }
}

/// Loads all memory, on all CPUs.
fn load(snapshot: &Snapshot, memory: &GuestMemoryMmap, session: &Session) -> Result<Loaded> {
    let bar = Bar::new("loading", session.quiet, &session.interrupt);
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let failed = Mutex::new(None);
    let place = |source_offset: u64, bytes: &[u8]| {
        if let Err(error) = guest_memory::write(memory, snapshot.regions(), source_offset, bytes) {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    };
    let loaded = snapshot.load(threads, &place, &|progress| bar.update(progress))?;
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(loaded),
    }
}
