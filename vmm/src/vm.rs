//! A guest as a state machine of two types: [`PausedVm`] and [`RunningVm`].

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::boot::{Board, GENERATION_ID_GPA};
use crate::bus::Bus;
use crate::console::Console;
use crate::control::{Control, Stop, VmHandle};
use crate::devices::{DeviceError, Devices, MmioDevice};
use crate::error::KvmError;
use crate::generation;
use crate::host::{self, ProbeError};
use crate::irqchip;
use crate::kick;
use crate::layout::{LayoutError, MemoryRange, memory_layout};
use crate::memory_slots::{LatePlugger, Memslots};
use crate::paravirt;
use crate::payload::{LoadedPayload, Payload, PayloadError};
use crate::rtc::Rtc;
use crate::run_loop::{self, Shared};
use crate::serial::Com1;
use crate::state::{VCPUS_MAX, VmState};
use crate::vcpu_state::{Vcpu, VcpuError};

/// A guest that does not run. Only in this form does it have a state that can be saved.
pub struct PausedVm {
    // Fields drop in this order: what can run before what it runs on.
    vcpus: Vec<Vcpu>,
    machine: Machine,
}

/// A guest that runs, each vCPU on a thread of its own. Dropping it stops the threads.
pub struct RunningVm {
    threads: VcpuThreads,
    machine: Machine,
}

/// All of a guest but its vCPUs.
struct Machine {
    late_plugger: Option<LatePlugger>,
    shared: Arc<Shared>,
    vm: Arc<VmFd>,
    kvm: Kvm,
    memory_layout: Vec<MemoryRange>,
    generation_id_gpa: Option<u64>,
}

/// How to boot a guest.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BootOptions {
    /// vCPUs; programs and the demo guest use the first only.
    pub cpus: u8,
    /// Whether a write of the guest to [`REQUEST_PORT`](crate::REQUEST_PORT) stops it with
    /// [`Stop::Requested`]. Otherwise such writes do nothing.
    pub heed_requests: bool,
}

impl Default for BootOptions {
    fn default() -> BootOptions {
        BootOptions { cpus: 1, heed_requests: false }
    }
}

impl BootOptions {
    /// Sets [`BootOptions::cpus`].
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> BootOptions {
        self.cpus = cpus;
        self
    }

    /// Sets [`BootOptions::heed_requests`].
    #[must_use]
    pub fn heed_requests(mut self, on: bool) -> BootOptions {
        self.heed_requests = on;
        self
    }
}

/// What the guest's clocks do about the time between the save and the restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// kvm-clock and time stamp counters go on by the host's time of day, as if the guest had slept.
    /// States of version 1 do not say when they were saved: their clocks are kept.
    #[default]
    Advance,
    /// They go on from the moment of the pause: for the guest no time has passed.
    Keep,
}

/// How to restore a guest.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Ranges of guest physical addresses that hold every page that is not zero, in any order; they are
    /// widened to 2 MiB. Only they are given to KVM before the guest starts, all other memory while
    /// it runs. That makes the time to the first instruction independent of the size of memory.
    ///
    /// `None` gives KVM all memory before the guest starts.
    pub first: Option<Vec<Range<u64>>>,
    /// As in [`BootOptions::heed_requests`].
    pub heed_requests: bool,
    /// The guest's clocks.
    pub clock: Clock,
}

/// A guest that could not be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// This host cannot run guests.
    #[error(transparent)]
    Host(#[from] ProbeError),
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The memory given is not laid out as [`memory_layout`] says.
    #[error(transparent)]
    Memory(#[from] MemoryMismatch),
    /// The guest's generation id could not be written.
    #[error("cannot write a generation id into guest memory")]
    GenerationId(#[source] io::Error),
    /// A number of vCPUs that no guest has.
    #[error("{found} vCPUs, expected 1 to {VCPUS_MAX}")]
    Cpus {
        /// The number asked for.
        found: u8,
    },
    /// A device cannot be part of the guest.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The payload does not fit.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// The signal handlers could not be installed.
    #[error("sigaction failed")]
    Signals(#[source] io::Error),
}

/// A guest that could not be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// This host cannot run guests.
    #[error(transparent)]
    Host(#[from] ProbeError),
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The memory given is not the memory of the state.
    #[error(transparent)]
    Memory(#[from] MemoryMismatch),
    /// The devices given are not the saved ones, or cannot be connected.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The guest's generation id could not be changed.
    #[error("cannot write a new generation id into guest memory")]
    GenerationId(#[source] io::Error),
    /// This host does not take the state of a vCPU.
    #[error("vCPU {index} cannot be restored")]
    Vcpu {
        /// Number of the vCPU.
        index: usize,
        /// What was refused.
        #[source]
        source: VcpuError,
    },
    /// The signal handlers could not be installed.
    #[error("sigaction failed")]
    Signals(#[source] io::Error),
}

/// Guest memory whose regions are not where they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryMismatch {
    /// No guest has this much.
    #[error(transparent)]
    Size(#[from] LayoutError),
    /// The right size, or another one, in the wrong places.
    #[error("guest memory is laid out as {found:x?}, expected {expected:x?}")]
    Layout {
        /// The regions given.
        found: Vec<MemoryRange>,
        /// The regions needed.
        expected: Vec<MemoryRange>,
    },
}

/// A state that could not be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The guest has broken down: its state must not be kept.
    #[error("the guest cannot be saved: {stop}")]
    Stopped {
        /// Why it stopped.
        stop: Stop,
    },
}

/// A guest that could not be resumed.
#[derive(Debug, thiserror::Error)]
#[error("cannot start a thread of the guest")]
pub struct ResumeError(#[source] io::Error);

/// A guest that could not be paused, because it had stopped for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest cannot go on: {stop}")]
#[non_exhaustive]
pub struct PauseError {
    /// Why it stopped.
    pub stop: Stop,
}

impl PausedVm {
    /// A fresh guest of one vCPU and without devices, about to run the first instruction of `payload`.
    ///
    /// `memory` is laid out by [`memory_layout`] and all zeros. It is the caller's to provide, and the
    /// guest writes to it while it runs.
    ///
    /// # Errors
    /// [`BootError`] when the host cannot run guests, when the payload does not fit into memory, or when
    /// a KVM call fails.
    pub fn boot(
        memory: Arc<GuestMemoryMmap>,
        payload: &Payload,
        console: impl Console + 'static,
    ) -> Result<PausedVm, BootError> {
        PausedVm::boot_with(memory, payload, console, &BootOptions::default(), Vec::new())
    }

    /// As [`PausedVm::boot`], with options and devices.
    ///
    /// # Errors
    /// As there; and [`BootError::Device`] and [`BootError::Cpus`].
    pub fn boot_with(
        memory: Arc<GuestMemoryMmap>,
        payload: &Payload,
        console: impl Console + 'static,
        options: &BootOptions,
        devices: Vec<Box<dyn MmioDevice>>,
    ) -> Result<PausedVm, BootError> {
        let ranges = checked_layout(&memory, None)?;
        let cpus = options.cpus;
        if cpus == 0 || usize::from(cpus) > VCPUS_MAX {
            return Err(BootError::Cpus { found: cpus });
        }
        let board = Board { cpus, devices: devices.len() };
        let devices = Devices::new(devices)?;
        let LoadedPayload { touched, entry } = payload.load(&memory, &ranges, board)?;
        kick::install_signal_handlers().map_err(BootError::Signals)?;
        let kvm = host::open_kvm()?;
        let vm = Arc::new(host::create_vm(&kvm)?);
        let memslots = Memslots::plug_first(Arc::clone(&vm), memory, touched.as_deref())?;
        irqchip::create(&vm)?;
        let vcpus = (0..cpus)
            .map(|index| Vcpu::boot(&kvm, &vm, index, cpus, entry))
            .collect::<Result<Vec<_>, _>>()?;
        let generation = payload.has_generation_id().then_some(GENERATION_ID_GPA);
        if let Some(gpa) = generation {
            generation::renew(&memslots, gpa).map_err(BootError::GenerationId)?;
        }
        let com1 = Com1::new(Arc::clone(&vm));
        let bus = Bus::new(com1, Rtc::default(), Box::new(console), options.heed_requests);
        let machine = Machine::new(kvm, vm, memslots, bus, devices, ranges, generation);
        machine.attach_devices()?;
        Ok(PausedVm { vcpus, machine })
    }

    /// The guest of `state`, with what `memory` holds or comes to hold.
    ///
    /// Nothing here reads guest memory (only a generation id is written), so its pages may still be on their way.
    ///
    /// # Errors
    /// [`RestoreError`] when the host cannot run guests, when memory is not laid out as the state says,
    /// or when the host refuses a part of the state.
    pub fn restore(
        memory: Arc<GuestMemoryMmap>,
        state: &VmState,
        console: impl Console + 'static,
        options: &RestoreOptions,
    ) -> Result<PausedVm, RestoreError> {
        PausedVm::restore_with(memory, state, console, options, Vec::new())
    }

    /// As [`PausedVm::restore`], with the devices of [`VmState::devices`], made from their states by the
    /// caller, in the same order.
    ///
    /// # Errors
    /// As there; and [`RestoreError::Device`] when the devices are not of the saved kinds.
    pub fn restore_with(
        memory: Arc<GuestMemoryMmap>,
        state: &VmState,
        console: impl Console + 'static,
        options: &RestoreOptions,
        devices: Vec<Box<dyn MmioDevice>>,
    ) -> Result<PausedVm, RestoreError> {
        let devices = Devices::new(devices)?;
        devices.check_kinds(&state.devices)?;
        let ranges = checked_layout(&memory, Some(&state.memory))?;
        kick::install_signal_handlers().map_err(RestoreError::Signals)?;
        let kvm = host::open_kvm()?;
        let vm = Arc::new(host::create_vm(&kvm)?);
        // Memory first: after KVM_CREATE_IRQCHIP each slot waits for a grace period, which takes
        // milliseconds.
        let first = options.first.as_ref().map(|first| {
            let shared = state.vcpus.iter().flat_map(|vcpu| paravirt::shared_pages(&vcpu.msrs));
            shared.chain(first.iter().cloned()).collect::<Vec<_>>()
        });
        let memslots = Memslots::plug_first(Arc::clone(&vm), memory, first.as_deref())?;
        // Then the interrupt controllers, without which vCPUs get no LAPIC.
        irqchip::create(&vm)?;
        let slept_ns = match options.clock {
            Clock::Advance if state.saved_unix_ns != 0 => {
                unix_ns().saturating_sub(state.saved_unix_ns)
            }
            Clock::Advance | Clock::Keep => 0,
        };
        // The vCPUs with all of their state, CPUID from the state: asking KVM what it supports
        // (KVM_GET_SUPPORTED_CPUID) takes half as long as all of the rest.
        let vcpus = state
            .vcpus
            .iter()
            .zip(0u8..)
            .map(|(vcpu, index)| {
                Vcpu::restore(&vm, index, vcpu, slept_ns)
                    .map_err(|source| RestoreError::Vcpu { index: index.into(), source })
            })
            .collect::<Result<Vec<_>, _>>()?;
        // The chips' state at the end: it may deliver interrupts to LAPICs, and it starts clocks.
        irqchip::restore(&vm, &state.chips, slept_ns)?;
        if let Some(gpa) = state.generation_id_gpa {
            generation::renew(&memslots, gpa).map_err(RestoreError::GenerationId)?;
            generation::notify(&vm)?;
        }
        let com1 = Com1::restore(Arc::clone(&vm), &state.com1);
        let rtc = Rtc::restore(&state.rtc);
        let bus = Bus::new(com1, rtc, Box::new(console), options.heed_requests);
        let generation = state.generation_id_gpa;
        let machine = Machine::new(kvm, vm, memslots, bus, devices, ranges, generation);
        machine.attach_devices()?;
        Ok(PausedVm { vcpus, machine })
    }

    /// The guest's state, all but its memory.
    ///
    /// # Errors
    /// [`SaveError`] when a KVM call fails, or when the guest has broken down while it was paused.
    pub fn state(&mut self) -> Result<VmState, SaveError> {
        if let Some(stop) = self.breakdown() {
            return Err(SaveError::Stopped { stop });
        }
        let machine = &self.machine;
        // The vCPUs before the chips: reading a vCPU may move an interrupt out of its LAPIC, never
        // into one.
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.state(&machine.kvm))
            .collect::<Result<Vec<_>, _>>()?;
        let chips = irqchip::state(&machine.vm)?;
        let saved_unix_ns = unix_ns();
        let mut bus = machine.lock_bus();
        Ok(VmState {
            memory: machine.memory_layout.clone(),
            vcpus,
            chips,
            com1: bus.com1().state(),
            rtc: bus.rtc().state(),
            saved_unix_ns,
            generation_id_gpa: machine.generation_id_gpa,
            devices: machine.shared.devices.states(),
        })
    }

    /// How many vCPUs it has.
    #[must_use]
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// Why the guest cannot go on, if it has broken down while it was paused: [`VmHandle::fail`].
    #[must_use]
    pub fn breakdown(&self) -> Option<Stop> {
        self.machine.shared.control.reason().filter(|stop| !stop.is_resumable())
    }

    /// What the devices have to store besides their states, by their places in the list.
    ///
    /// # Errors
    /// Why one of them cannot be stored.
    pub fn device_contents(&self) -> io::Result<Vec<Option<Vec<u8>>>> {
        self.machine.shared.devices.contents()
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// [`ResumeError`] when the system gives no thread.
    pub fn resume(self) -> Result<RunningVm, ResumeError> {
        let PausedVm { vcpus, mut machine } = self;
        machine.shared.control.clear_pause();
        machine.shared.devices.resume();
        let mut threads =
            VcpuThreads { control: Arc::clone(&machine.shared.control), handles: Vec::new() };
        for (index, mut vcpu) in vcpus.into_iter().enumerate() {
            vcpu.tell_of_pause();
            let shared = Arc::clone(&machine.shared);
            let run = move || {
                run_loop::run(&mut vcpu, &shared);
                vcpu
            };
            let handle = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(run)
                .map_err(ResumeError)?;
            threads.handles.push(handle);
        }
        // After the vCPUs: this is what they do not wait for.
        if machine.late_plugger.is_none() {
            let control = Arc::clone(&machine.shared.control);
            let memslots = Arc::clone(&machine.shared.memslots);
            machine.late_plugger = LatePlugger::start(memslots, move |error| {
                control.stop(run_loop::plug_failed(error))
            })
            .map_err(ResumeError)?;
        }
        Ok(RunningVm { threads, machine })
    }

    /// A handle for other threads.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        self.machine.handle()
    }

    /// The instant just before KVM_RUN was called for the first time, if it was.
    #[must_use]
    pub fn first_entry(&self) -> Option<Instant> {
        self.machine.shared.control.first_entry()
    }

    /// The instant at which KVM_RUN came back for the first time, if it did.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.machine.shared.control.first_exit()
    }

    /// Guest accesses so far to memory that KVM did not have yet: see [`RestoreOptions::first`].
    #[must_use]
    pub fn late_accesses(&self) -> u64 {
        self.machine.shared.memslots.late_accesses()
    }
}

impl RunningVm {
    /// Waits until the guest stops, and says why; `None` when `timeout` runs out first.
    ///
    /// A guest that has stopped for a reason it can survive ([`Stop::is_resumable`]) goes on with
    /// [`RunningVm::pause`] and [`PausedVm::resume`].
    #[must_use = "the guest may have stopped for good"]
    pub fn wait(&self, timeout: Option<Duration>) -> Option<Stop> {
        self.machine.shared.control.wait(timeout)
    }

    /// Stops the vCPUs, wherever they are, and waits for their threads.
    ///
    /// # Errors
    /// [`PauseError`] when the guest had stopped, or stops now, for a reason that it cannot survive.
    pub fn pause(self) -> Result<PausedVm, PauseError> {
        let RunningVm { threads, machine } = self;
        machine.shared.control.stop(Stop::PauseRequested);
        let vcpus = threads.join();
        // After the vCPUs, which would give the devices new work.
        machine.shared.devices.pause();
        match machine.shared.control.reason() {
            Some(stop) if !stop.is_resumable() => Err(PauseError { stop }),
            _ => Ok(PausedVm { vcpus, machine }),
        }
    }

    /// A handle for other threads.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        self.machine.handle()
    }

    /// The instant just before KVM_RUN was called for the first time, if it was.
    #[must_use]
    pub fn first_entry(&self) -> Option<Instant> {
        self.machine.shared.control.first_entry()
    }

    /// The instant at which KVM_RUN came back for the first time, if it did.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.machine.shared.control.first_exit()
    }

    /// Guest accesses so far to memory that KVM did not have yet: see [`RestoreOptions::first`].
    #[must_use]
    pub fn late_accesses(&self) -> u64 {
        self.machine.shared.memslots.late_accesses()
    }
}

impl RestoreOptions {
    /// Sets [`RestoreOptions::first`].
    #[must_use]
    pub fn plug_first(mut self, ranges: Vec<Range<u64>>) -> RestoreOptions {
        self.first = Some(ranges);
        self
    }

    /// Sets [`RestoreOptions::clock`].
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> RestoreOptions {
        self.clock = clock;
        self
    }

    /// Sets [`RestoreOptions::heed_requests`].
    #[must_use]
    pub fn heed_requests(mut self, on: bool) -> RestoreOptions {
        self.heed_requests = on;
        self
    }
}

impl Machine {
    fn new(
        kvm: Kvm,
        vm: Arc<VmFd>,
        memslots: Memslots,
        bus: Bus,
        devices: Devices,
        memory_layout: Vec<MemoryRange>,
        generation_id_gpa: Option<u64>,
    ) -> Machine {
        let shared = Shared {
            control: Arc::new(Control::default()),
            memslots: Arc::new(memslots),
            bus: Arc::new(Mutex::new(bus)),
            devices,
        };
        let shared = Arc::new(shared);
        Machine { late_plugger: None, shared, vm, kvm, memory_layout, generation_id_gpa }
    }

    fn attach_devices(&self) -> Result<(), DeviceError> {
        self.shared.devices.attach(&self.vm, self.shared.memslots.memory(), &self.handle())
    }

    fn handle(&self) -> VmHandle {
        VmHandle::new(Arc::clone(&self.shared.control), Arc::downgrade(&self.shared.bus))
    }

    fn lock_bus(&self) -> std::sync::MutexGuard<'_, Bus> {
        self.shared.bus.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The threads that run vCPUs. Dropping stops and joins them.
struct VcpuThreads {
    control: Arc<Control>,
    handles: Vec<JoinHandle<Vcpu>>,
}

impl VcpuThreads {
    /// Waits for the threads, which have been told to stop. A vCPU whose thread panicked is missing; the
    /// thread has said so to `control`.
    fn join(mut self) -> Vec<Vcpu> {
        std::mem::take(&mut self.handles).into_iter().filter_map(|h| h.join().ok()).collect()
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        if self.handles.is_empty() {
            return;
        }
        self.control.stop(Stop::PauseRequested);
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The layout of `memory`, if it is the expected one (by default the one of its size).
fn checked_layout(
    memory: &GuestMemoryMmap,
    expected: Option<&[MemoryRange]>,
) -> Result<Vec<MemoryRange>, MemoryMismatch> {
    let mut source_offset = 0;
    let mut found = Vec::new();
    for region in memory.iter() {
        found.push(MemoryRange { gpa: region.start_addr().0, len: region.len(), source_offset });
        source_offset += region.len();
    }
    let expected = match expected {
        Some(expected) => expected.to_vec(),
        None => memory_layout(source_offset)?,
    };
    if found == expected { Ok(found) } else { Err(MemoryMismatch::Layout { found, expected }) }
}
