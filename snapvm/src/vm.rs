//! A VM with its memory: paused or running.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm::{PauseError, ResumeError, Stop, VmHandle};

use crate::memory::VmMemory;

/// A paused VM. It is written to a snapshot by [`Vm::snapshot`] and [`Vm::snapshot_layer`].
pub struct Vm {
    // Fields drop in this order: no vCPU is left when the memory's service ends.
    pub(crate) machine: vmm::PausedVm,
    pub(crate) memory: Arc<VmMemory>,
}

/// A running VM.
pub struct RunningVm {
    machine: vmm::RunningVm,
    memory: Arc<VmMemory>,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl fmt::Debug for RunningVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningVm").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Vm {
    /// Its memory. A clone of the `Arc` keeps the pager at work after the VM was dropped.
    #[must_use]
    pub fn memory(&self) -> &Arc<VmMemory> {
        &self.memory
    }

    /// Pauses and stops the VM from other threads.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        self.machine.handle()
    }

    /// How many vCPUs it has.
    #[must_use]
    pub fn vcpu_count(&self) -> usize {
        self.machine.vcpu_count()
    }

    /// Why it cannot be resumed, if it cannot.
    #[must_use]
    pub fn breakdown(&self) -> Option<Stop> {
        self.machine.breakdown()
    }

    /// When a vCPU first entered the guest.
    #[must_use]
    pub fn first_entry(&self) -> Option<Instant> {
        self.machine.first_entry()
    }

    /// When a vCPU first left it.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.machine.first_exit()
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// [`ResumeError`]: there is no thread for a vCPU. The VM is dropped.
    pub fn resume(self) -> Result<RunningVm, ResumeError> {
        let Self { machine, memory } = self;
        Ok(RunningVm { machine: machine.resume()?, memory })
    }
}

impl RunningVm {
    /// Its memory. A clone of the `Arc` keeps the pager at work after the VM was dropped.
    #[must_use]
    pub fn memory(&self) -> &Arc<VmMemory> {
        &self.memory
    }

    /// Pauses and stops the VM from other threads.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        self.machine.handle()
    }

    /// When a vCPU first entered the guest.
    #[must_use]
    pub fn first_entry(&self) -> Option<Instant> {
        self.machine.first_entry()
    }

    /// When a vCPU first left it.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.machine.first_exit()
    }

    /// Waits until the guest stops, at most so long. `None`: it still runs.
    #[allow(clippy::must_use_candidate, reason = "often just a time to let the guest run")]
    pub fn wait(&self, timeout: Option<Duration>) -> Option<Stop> {
        self.machine.wait(timeout)
    }

    /// Pauses all vCPUs. A vCPU that waits for a page is paused when the page has arrived.
    ///
    /// # Errors
    /// [`PauseError`]: the guest has stopped in a way that it cannot be resumed from. The VM is dropped.
    pub fn pause(self) -> Result<Vm, PauseError> {
        let Self { machine, memory } = self;
        Ok(Vm { machine: machine.pause()?, memory })
    }
}
