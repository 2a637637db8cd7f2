//! A guest as a state machine of two types: [`PausedVm`] and [`RunningVm`].

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::bus::Bus;
use crate::chips;
use crate::console::Console;
use crate::control::{Control, Stop, VmHandle};
use crate::error::KvmError;
use crate::host::{self, ProbeError};
use crate::kick;
use crate::layout::{LayoutError, MemoryRange, memory_layout};
use crate::memslots::{LatePlugger, Memslots};
use crate::payload::{Payload, PayloadError};
use crate::run_loop::{self, Shared};
use crate::serial::Com1;
use crate::state::VmState;
use crate::vcpu::{Vcpu, VcpuError};

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
    /// A fresh guest of one vCPU, about to run the first instruction of `payload`.
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
        let ranges = checked_layout(&memory, None)?;
        let touched = payload.load(&memory, &ranges)?;
        kick::install_signal_handlers().map_err(BootError::Signals)?;
        let kvm = host::open_kvm()?;
        let vm = Arc::new(host::create_vm(&kvm)?);
        let memslots = Memslots::plug_first(Arc::clone(&vm), memory, Some(&touched))?;
        chips::create(&vm)?;
        let vcpu = Vcpu::boot(&kvm, &vm, 0)?;
        let com1 = Com1::new(Arc::clone(&vm));
        let machine = Machine::new(kvm, vm, memslots, Bus::new(com1, Box::new(console)), ranges);
        Ok(PausedVm { vcpus: vec![vcpu], machine })
    }

    /// The guest of `state`, with what `memory` holds or comes to hold.
    ///
    /// Nothing here reads guest memory, so its pages may still be on their way.
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
        let ranges = checked_layout(&memory, Some(&state.memory))?;
        kick::install_signal_handlers().map_err(RestoreError::Signals)?;
        let kvm = host::open_kvm()?;
        let vm = Arc::new(host::create_vm(&kvm)?);
        // Memory first: after KVM_CREATE_IRQCHIP each slot waits for a grace period, which takes
        // milliseconds.
        let memslots = Memslots::plug_first(Arc::clone(&vm), memory, options.first.as_deref())?;
        // Then the interrupt controllers, without which vCPUs get no LAPIC.
        chips::create(&vm)?;
        // The vCPUs with all of their state, CPUID from the state: asking KVM what it supports
        // (KVM_GET_SUPPORTED_CPUID) takes half as long as all of the rest.
        let vcpus = state
            .vcpus
            .iter()
            .zip(0u8..)
            .map(|(vcpu, index)| {
                Vcpu::restore(&vm, index, vcpu)
                    .map_err(|source| RestoreError::Vcpu { index: index.into(), source })
            })
            .collect::<Result<Vec<_>, _>>()?;
        // The chips' state at the end: it may deliver interrupts to LAPICs, and it starts clocks.
        chips::restore(&vm, &state.chips)?;
        let com1 = Com1::restore(Arc::clone(&vm), &state.com1);
        let machine = Machine::new(kvm, vm, memslots, Bus::new(com1, Box::new(console)), ranges);
        Ok(PausedVm { vcpus, machine })
    }

    /// The guest's state, all but its memory.
    ///
    /// # Errors
    /// [`SaveError`] when a KVM call fails, or when the guest has broken down while it was paused.
    pub fn state(&mut self) -> Result<VmState, SaveError> {
        if let Some(stop) = self.machine.shared.control.reason().filter(|s| !s.is_resumable()) {
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
        Ok(VmState {
            memory: machine.memory_layout.clone(),
            vcpus,
            chips: chips::state(&machine.vm)?,
            com1: machine.lock_bus().com1().state(),
        })
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// [`ResumeError`] when the system gives no thread.
    pub fn resume(self) -> Result<RunningVm, ResumeError> {
        let PausedVm { vcpus, mut machine } = self;
        machine.shared.control.clear_pause();
        let mut threads =
            VcpuThreads { control: Arc::clone(&machine.shared.control), handles: Vec::new() };
        for (index, mut vcpu) in vcpus.into_iter().enumerate() {
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
}

impl Machine {
    fn new(
        kvm: Kvm,
        vm: Arc<VmFd>,
        memslots: Memslots,
        bus: Bus,
        memory_layout: Vec<MemoryRange>,
    ) -> Machine {
        let shared = Shared {
            control: Arc::new(Control::default()),
            memslots: Arc::new(memslots),
            bus: Arc::new(Mutex::new(bus)),
        };
        Machine { late_plugger: None, shared: Arc::new(shared), vm, kvm, memory_layout }
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
