//! Why a guest cannot be booted, restored, saved, resumed or paused.

use std::io;

use crate::arch::VcpuError;
use crate::control::Stop;
use crate::devices::DeviceError;
use crate::error::KvmError;
use crate::host::ProbeError;
use crate::layout::{LayoutError, MemoryRange};
use crate::payload::PayloadError;
use crate::state::VCPUS_MAX;

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
    /// The memory given does not have the layout of [`memory_layout`](crate::memory_layout).
    #[error(transparent)]
    Memory(#[from] MemoryMismatch),
    /// The guest's generation id could not be written.
    #[error("cannot write a generation id into guest memory")]
    GenerationId(#[source] io::Error),
    /// A guest cannot have this number of vCPUs.
    #[error("{found} vCPUs, expected 1 to {VCPUS_MAX}")]
    Cpus {
        /// The requested number.
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
        /// The error.
        #[source]
        source: VcpuError,
    },
    /// The signal handlers could not be installed.
    #[error("sigaction failed")]
    Signals(#[source] io::Error),
}

/// Guest memory with regions at unexpected addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryMismatch {
    /// No guest has this much.
    #[error(transparent)]
    Size(#[from] LayoutError),
    /// The regions have other addresses or other lengths.
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
    /// The guest stopped for a reason that it cannot survive, so its state must not be kept.
    #[error("the guest cannot be saved: {stop}")]
    Stopped {
        /// Why it stopped.
        stop: Stop,
    },
}

/// A guest that could not be resumed.
#[derive(Debug, thiserror::Error)]
#[error("cannot start a thread of the guest")]
pub struct ResumeError(#[source] pub(super) io::Error);

/// A guest that could not be paused, because it had stopped permanently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest cannot continue: {stop}")]
#[non_exhaustive]
pub struct PauseError {
    /// Why it stopped.
    pub stop: Stop,
}
