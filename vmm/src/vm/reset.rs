//! Puts a paused guest back to an earlier state, in place.

use std::io;
use std::ops::Range;

use super::{Clock, PausedVm, slept_ns};
use crate::arch::VcpuError;
use crate::control::Stop;
use crate::devices::DeviceError;
use crate::error::KvmError;
use crate::generation;
use crate::state::VmState;

/// A guest that could not be put back to an earlier state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// The state is not one of this guest.
    #[error("the state is of a guest with {expected} {what}, and this one has {found}")]
    Mismatch {
        /// What is counted.
        what: &'static str,
        /// The number in the state.
        expected: u64,
        /// The number in the guest.
        found: u64,
    },
    /// The devices are not those of the state.
    #[error(transparent)]
    Devices(DeviceError),
    /// The guest has stopped for a reason that it cannot survive.
    #[error("the guest cannot be reset: {stop}")]
    Stopped {
        /// Why it stopped.
        stop: Stop,
    },
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// This host does not take the state of a vCPU.
    #[error("vCPU {index} cannot be reset")]
    Vcpu {
        /// Number of the vCPU.
        index: usize,
        /// The error.
        #[source]
        source: VcpuError,
    },
    /// A device does not take its state.
    #[error("device {index} cannot be reset")]
    Device {
        /// Its place in the list.
        index: usize,
        /// The error of the device.
        #[source]
        source: io::Error,
    },
    /// The guest's generation id could not be changed.
    #[error("cannot write a new generation id into guest memory")]
    GenerationId(#[source] io::Error),
}

impl PausedVm {
    /// Whether [`PausedVm::reset`] can put the guest into this state.
    ///
    /// # Errors
    /// [`ResetError::Mismatch`], [`ResetError::Devices`] and [`ResetError::Stopped`]
    pub fn check_reset(&self, state: &VmState) -> Result<(), ResetError> {
        if let Some(stop) = self.breakdown() {
            return Err(ResetError::Stopped { stop });
        }
        let own_bytes = self.machine.memory_layout.iter().map(|range| range.len).sum();
        for (what, expected, found) in [
            ("vCPUs", state.vcpus.len() as u64, self.vcpus.len() as u64),
            ("bytes of memory", state.memory_bytes(), own_bytes),
        ] {
            if expected != found {
                return Err(ResetError::Mismatch { what, expected, found });
            }
        }
        self.machine.shared.devices.check_kinds(&state.devices).map_err(ResetError::Devices)
    }

    /// Puts the vCPUs and devices into `state`, as a restore does, and renews the generation id. The caller has put back
    /// the guest's memory before. `contents` are those of the devices, by their index:
    /// [`PausedVm::device_contents`]. Connections of a vsock are closed. Taps, disks and sockets stay connected.
    ///
    /// # Errors
    /// [`ResetError`]. After an error, other than those of [`PausedVm::check_reset`], the guest is in neither state, and
    /// is stopped permanently.
    pub fn reset(
        &mut self,
        state: &VmState,
        contents: &[Option<Vec<u8>>],
        clock: Clock,
    ) -> Result<(), ResetError> {
        self.check_reset(state)?;
        let put_back = self.put_back(state, contents, clock);
        if let Err(error) = &put_back {
            let cause = std::error::Error::source(error);
            let cause = cause.map_or_else(String::new, |cause| format!(": {cause}"));
            self.handle().fail(format!("the guest was not reset: {error}{cause}"));
        }
        put_back
    }

    fn put_back(
        &mut self,
        state: &VmState,
        contents: &[Option<Vec<u8>>],
        clock: Clock,
    ) -> Result<(), ResetError> {
        let machine = &self.machine;
        let slept_ns = slept_ns(state, clock);
        for ((index, vcpu), saved) in self.vcpus.iter().enumerate().zip(&state.vcpus) {
            vcpu.reset(saved, slept_ns, index == 0)
                .map_err(|source| ResetError::Vcpu { index, source })?;
        }
        // As for a restore, the interrupt controllers' state comes after that of the vCPUs.
        state.irqchip.restore(&machine.vm, slept_ns)?;
        machine.lock_io_ports().reset(&machine.vm, &state.serial, &state.rtc);
        machine
            .shared
            .devices
            .reset(&state.devices, contents)
            .map_err(|(index, source)| ResetError::Device { index, source })?;
        if let Some(gpa) = state.generation_id_gpa {
            generation::renew(&machine.shared.memory_slots, gpa)
                .map_err(ResetError::GenerationId)?;
            generation::notify(&machine.vm)?;
        }
        Ok(())
    }

    /// The guest physical addresses of the pages that were written to or discarded since the guest was restored, or since
    /// they were taken last. They ascend. `None` if they are not recorded:
    /// [`RestoreOptions::record_writes`](super::RestoreOptions::record_writes).
    ///
    /// # Errors
    /// KVM's log cannot be read.
    pub fn written(&mut self) -> Result<Option<Vec<Range<u64>>>, KvmError> {
        self.machine.shared.memory_slots.written()
    }

    /// As [`PausedVm::written`], and forgets them.
    ///
    /// # Errors
    /// KVM's log cannot be read.
    pub fn take_written(&mut self) -> Result<Option<Vec<Range<u64>>>, KvmError> {
        self.machine.shared.memory_slots.take_written()
    }
}
