//! A VM with its memory: paused or running.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm::{PauseError, ResumeError, Stop, VmHandle};

use crate::memory::VmMemory;

/// A paused VM. [`Vm::snapshot`] and [`Vm::snapshot_layer`] write it to a file.
pub struct Vm {
    // Fields drop in this order: all vCPUs end before the pager of the memory does.
    pub(crate) machine: vmm::PausedVm,
    pub(crate) memory: Arc<VmMemory>,
}

/// A running VM.
pub struct RunningVm {
    pub(crate) machine: vmm::RunningVm,
    pub(crate) memory: Arc<VmMemory>,
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
    /// The VM's memory. A clone of the `Arc` keeps the pager running after the VM was dropped.
    #[must_use]
    pub fn memory(&self) -> &Arc<VmMemory> {
        &self.memory
    }

    /// A handle that pauses or stops the VM from other threads.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        self.machine.handle()
    }

    /// The number of vCPUs.
    #[must_use]
    pub fn vcpu_count(&self) -> usize {
        self.machine.vcpu_count()
    }

    /// The guest's generation id, if it has one: see [`vmm::PausedVm::generation_id`].
    ///
    /// # Errors
    /// Its page cannot be read.
    pub fn generation_id(&self) -> io::Result<Option<[u8; 16]>> {
        self.machine.generation_id()
    }

    /// The reason why the VM cannot be resumed, if there is one.
    #[must_use]
    pub fn breakdown(&self) -> Option<Stop> {
        self.machine.breakdown()
    }

    /// When a vCPU first entered the guest.
    #[must_use]
    pub fn first_entry(&self) -> Option<Instant> {
        self.machine.first_entry()
    }

    /// When a vCPU first left the guest.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.machine.first_exit()
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// [`ResumeError`] if the thread of a vCPU cannot be started. The VM is dropped then.
    pub fn resume(self) -> Result<RunningVm, ResumeError> {
        let Self { machine, memory } = self;
        Ok(RunningVm { machine: machine.resume()?, memory })
    }
}

impl RunningVm {
    /// The VM's memory. A clone of the `Arc` keeps the pager running after the VM was dropped.
    #[must_use]
    pub fn memory(&self) -> &Arc<VmMemory> {
        &self.memory
    }

    /// A handle that pauses or stops the VM from other threads.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        self.machine.handle()
    }

    /// When a vCPU first entered the guest.
    #[must_use]
    pub fn first_entry(&self) -> Option<Instant> {
        self.machine.first_entry()
    }

    /// When a vCPU first left the guest.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.machine.first_exit()
    }

    /// Waits until the guest stops, for at most `timeout`. `None`: the guest still runs.
    #[allow(
        clippy::must_use_candidate,
        reason = "callers also use it to let the guest run for a time"
    )]
    pub fn wait(&self, timeout: Option<Duration>) -> Option<Stop> {
        self.machine.wait(timeout)
    }

    /// Pauses all vCPUs. A vCPU that waits for a page is paused when the page is installed.
    ///
    /// # Errors
    /// [`PauseError`] if the guest has stopped and cannot be resumed. The VM is dropped then.
    pub fn pause(self) -> Result<Vm, PauseError> {
        let Self { machine, memory } = self;
        Ok(Vm { machine: machine.pause()?, memory })
    }
}
