//! Restores a guest from a snapshot.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pager::serve::SnapshotName;
use pager::shared::SharedClone;
use pager::{
    FailurePolicy, PageSource, Pager, PagerBuilder, Placement, Populate, Recording, Region,
    SnapshotSource,
};
use snapfmt::{Loaded, OnProgress, Parents, ReadError, Snapshot};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::state::{STATE_KIND, VmState};
use vmm::{Clock, Console, HostCpu, MemoryRange, PausedVm, RestoreOptions, VmHandle};

use crate::devices::DeviceConnections;
use crate::error::{GuestFailure, MemoryError, RestoreError};
use crate::guest_memory;
use crate::interchange::imported_from;
use crate::memory::{Origin, Release, Restored, Service, SetDamage, VmMemory};
use crate::memory_map::{gpa_ranges, to_ranges, to_regions};
use crate::metadata::GuestMetadata;
use crate::observer::{Observer, Silent, Step};
use crate::vm::Vm;
use crate::working_set::{self, Prefetch};

type Result<T> = std::result::Result<T, RestoreError>;

/// How a restored guest gets its memory.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum MemoryFrom {
    /// A pager loads each page from the snapshot when the guest touches it, and loads ahead while the guest waits much.
    #[default]
    Lazy,
    /// All memory is loaded before the guest runs.
    Eager,
    /// A pager loads pages as for `Lazy`, but without prefetch, and records the touched pages: see [`crate::record`].
    Recorded,
    /// A page server (`snap serve`) loads pages. The guests of a snapshot share the pages that they only read.
    Shared {
        /// The server's socket.
        socket: PathBuf,
        /// The time within which the server must answer, in total.
        timeout: Duration,
    },
    /// The kernel loads pages from a raw image of the memory, without checks.
    Image(PathBuf),
}

type WrapSource = dyn Fn(Arc<dyn PageSource>) -> Arc<dyn PageSource> + Send + Sync;

/// How to restore a guest.
pub struct RestoreConfig {
    snapshot: Arc<Snapshot>,
    file: PathBuf,
    memory: MemoryFrom,
    on_error: FailurePolicy,
    populate: Populate,
    populate_rate: Option<NonZeroU64>,
    prefetch: Prefetch,
    placement: Placement,
    clock: Clock,
    force_cpu: bool,
    guest_trigger: bool,
    quick_resets: bool,
    devices: DeviceConnections,
    observer: Arc<dyn Observer>,
    wrap_source: Box<WrapSource>,
}

/// A restored guest, which has not run yet.
#[derive(Debug)]
#[non_exhaustive]
pub struct RestoredVm {
    /// The VM and its memory.
    pub vm: Vm,
    /// Bytes of the file that an eager restore has read to load the memory. 0 for other restores.
    pub loaded_bytes: u64,
    /// When the file and the devices were open.
    pub opened_at: Instant,
    /// When memory was loaded, or its pager was running.
    pub memory_ready_at: Instant,
}

impl std::fmt::Debug for RestoreConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RestoreConfig")
            .field("file", &self.file)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

impl RestoreConfig {
    /// A lazy restore of the snapshot at `file`. The parents of a layer are opened at the paths that the layer gives.
    ///
    /// # Errors
    /// [`RestoreError::Open`] and [`RestoreError::Read`]
    pub fn open(file: impl AsRef<Path>) -> Result<Self> {
        let file = file.as_ref();
        let snapshot = Snapshot::open_with(file, &Parents::default());
        let snapshot = snapshot.map_err(|error| match error {
            error @ ReadError::Open { .. } => RestoreError::Open(error),
            error => RestoreError::Read { file: file.to_owned(), error },
        })?;
        Ok(Self::new(Arc::new(snapshot), file))
    }

    /// A lazy restore of an open snapshot. `file` names it in errors, and in layers that are written on it.
    #[must_use]
    pub fn new(snapshot: Arc<Snapshot>, file: &Path) -> Self {
        Self {
            snapshot,
            file: file.to_owned(),
            memory: MemoryFrom::default(),
            on_error: FailurePolicy::default(),
            populate: Populate::default(),
            populate_rate: None,
            prefetch: Prefetch::default(),
            placement: Placement::default(),
            clock: Clock::default(),
            force_cpu: false,
            guest_trigger: false,
            quick_resets: false,
            devices: DeviceConnections::default(),
            observer: Arc::new(Silent),
            wrap_source: Box::new(|source| source),
        }
    }

    /// How the guest gets its memory. The default is [`MemoryFrom::Lazy`].
    #[must_use]
    pub fn memory(mut self, from: MemoryFrom) -> Self {
        self.memory = from;
        self
    }

    /// What a lazy restore does if a page cannot be loaded.
    #[must_use]
    pub fn on_error(mut self, policy: FailurePolicy) -> Self {
        self.on_error = policy;
        self
    }

    /// What a lazy restore loads in the background, and how many bytes a second at most.
    #[must_use]
    pub fn populate(mut self, populate: Populate, bytes_per_second: Option<NonZeroU64>) -> Self {
        (self.populate, self.populate_rate) = (populate, bytes_per_second);
        self
    }

    /// What a lazy restore loads before the guest touches it.
    #[must_use]
    pub fn prefetch(mut self, prefetch: Prefetch) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Where the pager's threads run.
    #[must_use]
    pub fn placement(mut self, placement: Placement) -> Self {
        self.placement = placement;
        self
    }

    /// What the guest's clocks show: see [`Clock`].
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Restores a guest even if this host's CPU lacks features that the guest uses. The guest may crash.
    #[must_use]
    pub fn force_cpu(mut self, force: bool) -> Self {
        self.force_cpu = force;
        self
    }

    /// Whether the guest stops when it requests a snapshot.
    #[must_use]
    pub fn guest_trigger(mut self, on: bool) -> Self {
        self.guest_trigger = on;
        self
    }

    /// Whether a guest that is restored lazily or eagerly records which pages are written to, so that [`Vm::reset`] puts
    /// back only these: otherwise it puts back all that were loaded. The first write to a page that was only read before
    /// then takes longer, and KVM maps the guest's memory in pages of 4 KiB. Other guests are not affected.
    #[must_use]
    pub fn quick_resets(mut self, on: bool) -> Self {
        self.quick_resets = on;
        self
    }

    /// The files, sockets and taps to which the guest's devices are connected.
    #[must_use]
    pub fn devices(mut self, devices: DeviceConnections) -> Self {
        self.devices = devices;
        self
    }

    /// The observer that receives each step.
    #[must_use]
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = observer;
        self
    }

    /// Puts a source between the snapshot and the pager of a lazy restore, to measure, delay or fail reads.
    #[must_use]
    pub fn wrap_source(
        mut self,
        wrap: impl Fn(Arc<dyn PageSource>) -> Arc<dyn PageSource> + Send + Sync + 'static,
    ) -> Self {
        self.wrap_source = Box::new(wrap);
        self
    }

    /// What it restores from.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Builds the guest. A pager that fails stops it.
    ///
    /// # Errors
    /// [`RestoreError`]
    pub fn restore(&self, console: impl Console + 'static) -> Result<RestoredVm> {
        let file = || self.file.clone();
        let step = self.observer.step(Step::ReadState { file: &self.file });
        let state = machine_state(&self.snapshot, &self.file)?;
        self.check_cpu(&state)?;
        // Devices come before anything slow, because a disk may be refused.
        let devices =
            self.devices.restore(state.devices(), &self.snapshot, &self.file, &*self.observer);
        let devices = devices.map_err(|error| RestoreError::Device { file: file(), error })?;
        drop(step);
        let opened_at = Instant::now();

        // Memory and its pager come first, because setting the state of the vCPUs touches memory.
        let guest = GuestSlot::default();
        let Served { service, mapped, loaded_bytes, prefetch_start } =
            self.serve_memory(state.vcpus().len(), &guest)?;
        let memory_ready_at = Instant::now();
        let memory = VmMemory {
            protection: Mutex::default(),
            regions: self.snapshot.regions().to_vec(),
            mapped: Arc::clone(&mapped),
            origin: Origin::Restored(Restored {
                service,
                snapshot: Arc::clone(&self.snapshot),
                file: file(),
                clock: self.clock,
            }),
        };

        // This is declared after the memory, so that it is always dropped first: the pager waits for the prefetch
        // thread.
        let prefetch_start = prefetch_start;
        let mut options =
            RestoreOptions::default().guest_snapshot_trigger(self.guest_trigger).clock(self.clock);
        let may_record = matches!(self.memory, MemoryFrom::Lazy | MemoryFrom::Eager);
        options = options.record_writes(self.quick_resets && may_record);
        if !matches!(self.memory, MemoryFrom::Eager) {
            let regions = self.snapshot.regions();
            let first = self.snapshot.populated().flat_map(|range| gpa_ranges(regions, range));
            options = options.register_first(first.collect());
        }
        let step = self.observer.step(Step::BuildMachine { file: &self.file });
        let machine = PausedVm::restore_with(mapped, &state, console, &options, devices);
        drop(step);
        // This is checked even if the machine was built, because KVM ignores some pages that it cannot read.
        if let Some(failure) = memory.failure() {
            return Err(RestoreError::Failed(failure));
        }
        let machine = machine.map_err(|error| RestoreError::Machine { file: file(), error })?;
        drop(prefetch_start);
        guest.connect(machine.handle());
        let vm = Vm { machine, memory: Arc::new(memory) };
        Ok(RestoredVm { vm, loaded_bytes, opened_at, memory_ready_at })
    }

    fn read_error(&self, error: ReadError) -> RestoreError {
        RestoreError::Read { file: self.file.clone(), error }
    }

    /// Refuses a guest that uses CPU features which this host does not have.
    fn check_cpu(&self, state: &VmState) -> Result<()> {
        if self.force_cpu {
            return Ok(());
        }
        // On the CPU on which the guest was snapshotted, KVM is not queried, because that takes time.
        let metadata = self.snapshot.metadata().map_err(|error| self.read_error(error))?;
        if GuestMetadata::read(&metadata).host_cpu == Some(HostCpu::current()) {
            return Ok(());
        }
        let file = || self.file.clone();
        let missing = vmm::missing_features(state)
            .map_err(|error| RestoreError::Features { file: file(), error })?;
        match missing.is_empty() {
            true => Ok(()),
            false => Err(RestoreError::Cpu { file: file(), missing }),
        }
    }

    fn serve_memory(&self, vcpus: usize, guest: &GuestSlot) -> Result<Served> {
        let ranges = to_ranges(self.snapshot.regions());
        // There are as many demand threads as vCPUs can wait for pages at the same time, but no more than CPUs.
        let slices = vcpus.min(thread::available_parallelism().map_or(1, |cpus| cpus.get()));
        match &self.memory {
            MemoryFrom::Eager => {
                let mapped = guest_memory::private(&ranges)?;
                let loaded =
                    load(&self.snapshot, &mapped, &|progress| self.observer.loaded(progress));
                let loaded = loaded.map_err(|error| match error {
                    LoadError::Read(error) => self.read_error(error),
                    LoadError::Memory(error) => error.into(),
                })?;
                let loaded_bytes = loaded.bytes_read;
                let release = Release::start(&self.snapshot, loaded);
                let service = Service::Loaded { kept: Mutex::default(), _release: release };
                Ok(Served { loaded_bytes, ..Served::new(service, mapped) })
            }
            MemoryFrom::Lazy => {
                let mapped = guest_memory::private(&ranges)?;
                let mut builder =
                    Pager::builder(self.source()).regions(self.pager_regions(&mapped)?);
                let (set_damage, mut prefetch_start) = (SetDamage::default(), None);
                if self.prefetch != Prefetch::Off && working_set::has_set(&self.snapshot) {
                    let (begin, wait) = working_set::start();
                    let pages = working_set::list(Arc::clone(&self.snapshot), set_damage.clone());
                    builder = builder.prefetch(pages).prefetch_when(wait);
                    prefetch_start = Some(begin);
                }
                let populate = match self.prefetch {
                    Prefetch::All => Populate::Full,
                    Prefetch::Off | Prefetch::Hot => self.populate,
                };
                let pager = self.start(builder.slices(slices).populate(populate), guest)?;
                let service = Service::Lazy { pager, set_damage };
                Ok(Served { prefetch_start, ..Served::new(service, mapped) })
            }
            MemoryFrom::Recorded => {
                let (file, mapped) = guest_memory::recorded(&ranges)?;
                let recording = Recording::new(self.source(), file, self.pager_regions(&mapped)?)
                    .map_err(|error| RestoreError::Record(error.into()))?;
                let builder = Pager::recording(&recording).slices(slices);
                let pager = self.start(builder.populate(self.populate), guest)?;
                Ok(Served::new(Service::Recorded { pager, recording }, mapped))
            }
            MemoryFrom::Shared { socket, timeout } => self.share(socket, *timeout, &ranges, guest),
            MemoryFrom::Image(path) => {
                let step = self.observer.step(Step::OpenImage { image: path });
                let (image, mapped) = guest_memory::image(path, &ranges)?;
                drop(step);
                let path = path.clone();
                Ok(Served::new(Service::Image { image, path }, mapped))
            }
        }
    }

    fn source(&self) -> Arc<dyn PageSource> {
        (self.wrap_source)(Arc::new(SnapshotSource::new(Arc::clone(&self.snapshot))))
    }

    /// Gets the memory from a page server, which serves it from then on.
    fn share(
        &self,
        socket: &Path,
        timeout: Duration,
        ranges: &[MemoryRange],
        guest: &GuestSlot,
    ) -> Result<Served> {
        let name = snapshot_name(&self.snapshot);
        let ranges: Vec<_> =
            ranges.iter().map(|r| (GuestAddress(r.gpa), r.len as usize, r.source_offset)).collect();
        let (file, guest) = (self.file.clone(), guest.clone());
        let on_failure = move |reason| guest.fail(&GuestFailure::new(&file, reason));
        let step = self.observer.step(Step::AskServer { socket, timeout });
        let (clone, mapped) = SharedClone::start(socket, &name, &ranges, timeout, on_failure)
            .map_err(|error| RestoreError::Share { socket: socket.to_owned(), error })?;
        drop(step);
        Ok(Served::new(Service::Shared(clone), mapped))
    }

    fn pager_regions(&self, mapped: &Arc<GuestMemoryMmap>) -> Result<Vec<Region>> {
        let offset_of = |gpa: GuestAddress| {
            let found = self.snapshot.regions().iter().find(|region| region.gpa == gpa.0);
            found.map_or(u64::MAX, |region| region.source_offset)
        };
        Region::of_guest_memory(mapped, offset_of).map_err(RestoreError::Region)
    }

    fn start(&self, mut builder: PagerBuilder, guest: &GuestSlot) -> Result<Pager> {
        let (file, guest) = (self.file.clone(), guest.clone());
        if let Some(overhead) = remote_fault_overhead(&self.snapshot) {
            builder = builder.fault_overhead(overhead);
        }
        builder
            .on_error(self.on_error)
            .placement(self.placement)
            .populate_rate(self.populate_rate)
            .on_failure(move |failure| guest.fail(&GuestFailure::of_pager(&file, failure)))
            .start()
            .map_err(RestoreError::Pager)
    }
}

/// What each fault counts in addition, as a measure of [`Populate::Auto`], if the snapshot or a parent of it is not a file of
/// this host: one fault there takes a round trip to a server. The measure counts at most 100 us of an answer, because one
/// slow read of a disk does not show how many will follow. With this, 8 faults in a row start the loading. The argument
/// of [`PagerBuilder::fault_overhead`].
#[must_use]
pub fn remote_fault_overhead(snapshot: &Snapshot) -> Option<Duration> {
    const ROUND_TRIP: Duration = Duration::from_millis(1);
    snapshot.storages().any(|storage| storage.file().is_none()).then_some(ROUND_TRIP)
}

/// The machine's state, which must have the file's memory map. `file` names the snapshot.
pub(crate) fn machine_state(snapshot: &Snapshot, file: &Path) -> Result<VmState> {
    let file = || file.to_owned();
    let blob = snapshot.state(STATE_KIND);
    let blob = blob.map_err(|error| RestoreError::Read { file: file(), error })?;
    let blob = blob.ok_or_else(|| match imported_from(snapshot) {
        Some(program) => RestoreError::Foreign { file: file(), program },
        None => RestoreError::NoState { file: file() },
    })?;
    let state = VmState::decode(STATE_KIND, blob.version, &blob.bytes)
        .map_err(|error| RestoreError::State { file: file(), error })?;
    if to_regions(state.memory()) != snapshot.regions() {
        return Err(RestoreError::MemoryMap { file: file() });
    }
    Ok(state)
}

/// Memory that was not loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error(transparent)]
    Read(ReadError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Loads all memory that is not zero, on all CPUs.
pub(crate) fn load(
    snapshot: &Snapshot,
    mapped: &GuestMemoryMmap,
    progress: OnProgress<'_>,
) -> std::result::Result<Loaded, LoadError> {
    let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let failed = Mutex::new(None::<MemoryError>);
    let place = |source_offset: u64, bytes: &[u8]| {
        if let Err(error) = guest_memory::write(mapped, snapshot.regions(), source_offset, bytes) {
            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    };
    let loaded = snapshot.load(threads, &place, progress).map_err(LoadError::Read)?;
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(LoadError::Memory(error)),
        None => Ok(loaded),
    }
}

/// Mapped memory, and the service that provides its pages.
struct Served {
    service: Service,
    mapped: Arc<GuestMemoryMmap>,
    loaded_bytes: u64,
    prefetch_start: Option<working_set::Start>,
}

impl Served {
    fn new(service: Service, mapped: Arc<GuestMemoryMmap>) -> Self {
        Self { service, mapped, loaded_bytes: 0, prefetch_start: None }
    }
}

/// The name of a snapshot. A guest shares memory only with a page server that has a snapshot of this name.
#[must_use]
pub fn snapshot_name(snapshot: &Snapshot) -> SnapshotName {
    SnapshotName {
        layers: snapshot.headers().map(|header| header.id.to_string()).collect(),
        memory_bytes: snapshot.header().memory_bytes,
    }
}

/// The guest that a failing pager stops, and the failure: either may come first.
#[derive(Clone, Default)]
struct GuestSlot(Arc<OnceLock<VmHandle>>, Arc<OnceLock<String>>);

impl GuestSlot {
    fn connect(&self, guest: VmHandle) {
        let guest = self.0.get_or_init(|| guest);
        if let Some(reason) = self.1.get() {
            guest.fail(reason);
        }
    }

    fn fail(&self, failure: &GuestFailure) {
        let reason = self.1.get_or_init(|| failure.to_string());
        if let Some(guest) = self.0.get() {
            guest.fail(reason);
        }
    }
}
