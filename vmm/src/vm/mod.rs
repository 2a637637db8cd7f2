//! A guest as a state machine of two types: [`PausedVm`] and [`RunningVm`].

mod error;
mod options;
mod reset;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub use error::{BootError, MemoryMismatch, PauseError, RestoreError, ResumeError, SaveError};
pub use options::{BootOptions, Clock, RestoreOptions};
pub use reset::ResetError;

use crate::arch::{self, GENERATION_ID_GPA, IoPorts, IrqchipState, Vcpu};
use crate::boot::Board;
use crate::console::Console;
use crate::control::{Control, Stop, VmHandle};
use crate::devices::{DeviceError, Devices, FrozenContent, MmioDevice};
use crate::discards::HeldDiscards;
use crate::generation;
use crate::host;
use crate::kick;
use crate::layout::{MemoryRange, memory_layout};
use crate::memory_slots::{LateRegistration, MemorySlots};
use crate::payload::{LoadedPayload, Payload};
use crate::run_loop::{self, Shared};
use crate::state::{VCPUS_MAX, VmState};
use crate::threads::{self, ThreadKind};
use crate::written::WriteLog;

/// A guest that does not run. Only in this form does it have a state that can be saved.
pub struct PausedVm {
    // Fields are dropped in this order: the vCPUs before the VM that they run in.
    vcpus: Vec<Vcpu>,
    machine: Machine,
}

/// A guest that runs. Each vCPU has its own thread. Dropping it stops the threads.
pub struct RunningVm {
    threads: VcpuThreads,
    machine: Machine,
}

/// A guest without its vCPUs.
struct Machine {
    late_registration: Option<LateRegistration>,
    shared: Arc<Shared>,
    vm: Arc<VmFd>,
    kvm: Kvm,
    memory_layout: Vec<MemoryRange>,
    generation_id_gpa: Option<u64>,
}

impl PausedVm {
    /// A fresh guest of one vCPU and without devices, about to run the first instruction of `payload`.
    ///
    /// `memory` is laid out by [`memory_layout`] and all zeros. The caller provides it, and the guest writes to it
    /// while it runs.
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
        let memory_slots = MemorySlots::register_first(
            Arc::clone(&vm),
            memory,
            touched.as_deref(),
            WriteLog::default(),
        )?;
        arch::create_irqchip(&vm)?;
        let vcpus = (0..cpus)
            .map(|index| Vcpu::boot(&kvm, &vm, index, cpus, entry))
            .collect::<Result<Vec<_>, _>>()?;
        let generation = payload.has_generation_id().then_some(GENERATION_ID_GPA);
        if let Some(gpa) = generation {
            generation::place(&memory_slots, gpa).map_err(BootError::GenerationId)?;
        }
        let io_ports =
            IoPorts::new(Arc::clone(&vm), Box::new(console), options.guest_snapshot_trigger);
        let machine = Machine::new(kvm, vm, memory_slots, io_ports, devices, ranges, generation);
        machine.attach_devices()?;
        Ok(PausedVm { vcpus, machine })
    }

    /// The guest of `state`, with the content of `memory`.
    ///
    /// This does not read guest memory, and it writes only the generation id. So pages of `memory` may arrive
    /// later.
    ///
    /// # Errors
    /// [`RestoreError`] when the host cannot run guests, when memory does not have the layout of the state, or when the
    /// host refuses a part of the state.
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
        let writes = match options.record_writes {
            true => WriteLog::recording(),
            false => WriteLog::default(),
        };
        let mut devices = Devices::new(devices)?;
        devices.writes = writes.clone();
        devices.check_kinds(&state.devices)?;
        let ranges = checked_layout(&memory, Some(&state.memory))?;
        kick::install_signal_handlers().map_err(RestoreError::Signals)?;
        let kvm = host::open_kvm()?;
        let vm = Arc::new(host::create_vm(&kvm)?);
        // Memory first: after KVM_CREATE_IRQCHIP each slot waits for a grace period, which takes
        // milliseconds.
        let first = options.first.as_ref().map(|first| {
            let shared = state.vcpus.iter().flat_map(arch::pages_shared_with_kvm);
            shared.chain(first.iter().cloned()).collect::<Vec<_>>()
        });
        let memory_slots =
            MemorySlots::register_first(Arc::clone(&vm), memory, first.as_deref(), writes)?;
        // Then the interrupt controllers: without them, vCPUs get no local interrupt controller.
        arch::create_irqchip(&vm)?;
        let slept_ns = slept_ns(state, options.clock);
        // The vCPUs with all of their state, CPUID from the state: KVM_GET_SUPPORTED_CPUID takes half as long as all of
        // the rest.
        let vcpus = state
            .vcpus
            .iter()
            .zip(0u8..)
            .map(|(vcpu, index)| {
                Vcpu::restore(&vm, index, vcpu, slept_ns)
                    .map_err(|source| RestoreError::Vcpu { index: index.into(), source })
            })
            .collect::<Result<Vec<_>, _>>()?;
        // The interrupt controllers' state at the end: it may deliver interrupts to vCPUs, and it starts clocks.
        state.irqchip.restore(&vm, slept_ns)?;
        if let Some(gpa) = state.generation_id_gpa {
            generation::renew(&memory_slots, gpa).map_err(RestoreError::GenerationId)?;
            generation::notify(&vm)?;
        }
        let io_ports = IoPorts::restore(
            Arc::clone(&vm),
            &state.serial,
            &state.rtc,
            Box::new(console),
            options.guest_snapshot_trigger,
        );
        let generation = state.generation_id_gpa;
        let machine = Machine::new(kvm, vm, memory_slots, io_ports, devices, ranges, generation);
        machine.attach_devices()?;
        Ok(PausedVm { vcpus, machine })
    }

    /// The guest's state, without its memory.
    ///
    /// # Errors
    /// [`SaveError`] when a KVM call fails, or when the guest failed while it was paused.
    pub fn state(&mut self) -> Result<VmState, SaveError> {
        if let Some(stop) = self.breakdown() {
            return Err(SaveError::Stopped { stop });
        }
        let machine = &self.machine;
        // The vCPUs before the interrupt controllers: reading a vCPU may move an interrupt out of its
        // local interrupt controller, never into it.
        let vcpus =
            self.vcpus.iter().map(|vcpu| vcpu.save(&machine.kvm)).collect::<Result<Vec<_>, _>>()?;
        let irqchip = IrqchipState::save(&machine.vm)?;
        let saved_unix_ns = unix_ns();
        let (serial, rtc) = machine.lock_io_ports().save();
        Ok(VmState {
            memory: machine.memory_layout.clone(),
            vcpus,
            irqchip,
            serial,
            rtc,
            saved_unix_ns,
            generation_id_gpa: machine.generation_id_gpa,
            devices: machine.shared.devices.states(),
        })
    }

    /// The guest's generation id, if it has one. It is new after each restore and each reset.
    ///
    /// # Errors
    /// Its page cannot be read.
    pub fn generation_id(&self) -> io::Result<Option<[u8; 16]>> {
        let gpa = self.machine.generation_id_gpa;
        gpa.map(|gpa| generation::id(&self.machine.shared.memory_slots, gpa)).transpose()
    }

    /// How many vCPUs it has.
    #[must_use]
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// Why the guest cannot continue, if it failed while it was paused: [`VmHandle::fail`].
    #[must_use]
    pub fn breakdown(&self) -> Option<Stop> {
        self.machine.shared.control.reason().filter(|stop| !stop.is_resumable())
    }

    /// Data of the devices that a snapshot must contain besides their states, by their index.
    ///
    /// # Errors
    /// Why one of them cannot be saved.
    pub fn device_contents(&self) -> io::Result<Vec<Option<Vec<u8>>>> {
        self.machine.shared.devices.contents()
    }

    /// The same data as it is now, to be read later: see [`MmioDevice::freeze_content`].
    ///
    /// # Errors
    /// Why one of them cannot be saved.
    pub fn freeze_device_contents(&mut self) -> io::Result<Vec<Option<FrozenContent>>> {
        self.machine.shared.devices.freeze_contents()
    }

    /// As [`RunningVm::outside_file`].
    #[must_use]
    pub fn outside_file(&self) -> Option<PathBuf> {
        self.machine.shared.devices.outside_file()
    }

    /// As [`RunningVm::hold_discards`].
    pub fn hold_discards(&self) -> HeldDiscards {
        self.machine.shared.devices.discards.hold()
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// [`ResumeError`] when the system refuses to start a thread.
    pub fn resume(self) -> Result<RunningVm, ResumeError> {
        let PausedVm { vcpus, mut machine } = self;
        machine.shared.control.clear_pause();
        machine.shared.devices.resume();
        let mut threads =
            VcpuThreads { control: Arc::clone(&machine.shared.control), handles: Vec::new() };
        for (index, mut vcpu) in vcpus.into_iter().enumerate() {
            vcpu.notify_of_pause();
            let shared = Arc::clone(&machine.shared);
            let run = move || {
                run_loop::run(&mut vcpu, &shared);
                vcpu
            };
            let handle = threads::spawn(ThreadKind::Vcpu, format!("vcpu{index}"), run)
                .map_err(ResumeError)?;
            threads.handles.push(handle);
        }
        // After the vCPUs are started, because they do not wait for this thread.
        if machine.late_registration.is_none() {
            let control = Arc::clone(&machine.shared.control);
            let memory_slots = Arc::clone(&machine.shared.memory_slots);
            machine.late_registration = LateRegistration::start(memory_slots, move |error| {
                control.stop(run_loop::slot_refused(error))
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

    /// The instant at which KVM_RUN returned for the first time, if it did.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.machine.shared.control.first_exit()
    }

    /// Guest accesses so far to memory whose slot was not registered yet: see [`RestoreOptions::first`].
    #[must_use]
    pub fn late_accesses(&self) -> u64 {
        self.machine.shared.memory_slots.late_accesses()
    }
}

impl RunningVm {
    /// Waits until the guest stops, and returns the reason; `None` when `timeout` expires first.
    ///
    /// A guest that has stopped for a reason that it can survive ([`Stop::is_resumable`]) continues after
    /// [`RunningVm::pause`] and [`PausedVm::resume`].
    #[must_use = "the guest may have stopped permanently"]
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
        // After the vCPUs, because they would give the devices new work.
        machine.shared.devices.pause();
        match machine.shared.control.reason() {
            Some(stop) if !stop.is_resumable() => Err(PauseError { stop }),
            _ => Ok(PausedVm { vcpus, machine }),
        }
    }

    /// A file that the guest changes and that is not part of its state: see [`MmioDevice::outside_file`].
    #[must_use]
    pub fn outside_file(&self) -> Option<PathBuf> {
        self.machine.shared.devices.outside_file()
    }

    /// Lets the devices discard no memory while the returned value exists. What a balloon gives back meanwhile keeps
    /// its content, and its memory in use.
    pub fn hold_discards(&self) -> HeldDiscards {
        self.machine.shared.devices.discards.hold()
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

    /// The instant at which KVM_RUN returned for the first time, if it did.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.machine.shared.control.first_exit()
    }

    /// Guest accesses so far to memory whose slot was not registered yet: see [`RestoreOptions::first`].
    #[must_use]
    pub fn late_accesses(&self) -> u64 {
        self.machine.shared.memory_slots.late_accesses()
    }
}

impl Machine {
    fn new(
        kvm: Kvm,
        vm: Arc<VmFd>,
        memory_slots: MemorySlots,
        io_ports: IoPorts,
        devices: Devices,
        memory_layout: Vec<MemoryRange>,
        generation_id_gpa: Option<u64>,
    ) -> Machine {
        let shared = Shared {
            control: Arc::new(Control::default()),
            memory_slots: Arc::new(memory_slots),
            io_ports: Arc::new(Mutex::new(io_ports)),
            devices,
        };
        let shared = Arc::new(shared);
        Machine { late_registration: None, shared, vm, kvm, memory_layout, generation_id_gpa }
    }

    fn attach_devices(&self) -> Result<(), DeviceError> {
        self.shared.devices.attach(&self.vm, self.shared.memory_slots.memory(), &self.handle())
    }

    fn handle(&self) -> VmHandle {
        VmHandle::new(Arc::clone(&self.shared.control), Arc::downgrade(&self.shared.io_ports))
    }

    fn lock_io_ports(&self) -> std::sync::MutexGuard<'_, IoPorts> {
        self.shared.io_ports.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The threads that run vCPUs. Dropping stops and joins them.
struct VcpuThreads {
    control: Arc<Control>,
    handles: Vec<JoinHandle<Vcpu>>,
}

impl VcpuThreads {
    /// Waits for the threads, which were requested to stop. A vCPU whose thread panicked is missing; the thread has
    /// reported that to `control`.
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

/// How much later the clocks of a guest with this state are now.
fn slept_ns(state: &VmState, clock: Clock) -> u64 {
    match clock {
        Clock::Advance if state.saved_unix_ns != 0 => unix_ns().saturating_sub(state.saved_unix_ns),
        Clock::Advance | Clock::Keep => 0,
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
