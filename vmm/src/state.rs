//! The state of a paused guest, without its memory, as data that can be stored.
//!
//! [`VmState`] is encoded by bincode with fixed-size little-endian integers. The encoding is frozen: stored states of
//! every version up to [`STATE_VERSION`] stay readable. A change to any type in this module, or to a kernel structure
//! in it, fails to compile (size asserts in `arch`) or fails the golden test. A change needs a new version next to the
//! old one.

#[cfg(test)]
mod tests;

use bincode::Options;
use serde::{Deserialize, Serialize};

use crate::devices::DEVICES_MAX;
use crate::layout::{MemoryRange, memory_layout};
use crate::serial::FIFO_BYTES;

pub use crate::arch::{IrqchipState, RtcState, STATE_KIND, VcpuState};

/// Version of the encoding that [`VmState::encode`] writes.
pub const STATE_VERSION: u32 = 2;
/// Version of what [`PausedVm::device_contents`](crate::PausedVm::device_contents) returns.
pub const DEVICE_CONTENT_VERSION: u32 = 1;
/// The first version, without the fields of [`VmState`] from `rtc` on.
const STATE_VERSION_1: u32 = 1;
/// Most encoded bytes of a state. A vCPU needs about 12 KiB.
pub const STATE_MAX_BYTES: u64 = 4 << 20;

/// Most vCPUs a state may have.
pub const VCPUS_MAX: usize = 64;
const QUEUED_INPUT_MAX: usize = 64 << 10;
/// Most bytes of one device's state.
pub const DEVICE_STATE_MAX_BYTES: usize = 256 << 10;

/// Everything about a paused guest that is not in its memory.
///
/// Its content depends on the architecture and grows with each version of the encoding, so it can only be read
/// by the functions below.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmState {
    /// Guest RAM that this state belongs to.
    pub(crate) memory: Vec<MemoryRange>,
    /// The vCPUs, by index.
    pub(crate) vcpus: Vec<VcpuState>,
    /// Interrupt controllers, timer and clock that KVM emulates in the kernel.
    pub(crate) irqchip: IrqchipState,
    /// The serial port.
    pub(crate) serial: Uart,
    /// The real-time clock.
    pub(crate) rtc: RtcState,
    /// The host's time of day when `irqchip.clock` was read, in nanoseconds since 1970; 0: not known.
    pub(crate) saved_unix_ns: u64,
    /// Guest physical address of the generation id, if the guest has one.
    pub(crate) generation_id_gpa: Option<u64>,
    /// The devices in windows of guest physical addresses, by their index.
    pub(crate) devices: Vec<DeviceState>,
}

/// Version 1 of [`VmState`].
#[derive(Deserialize)]
struct VmStateV1 {
    memory: Vec<MemoryRange>,
    vcpus: Vec<VcpuState>,
    irqchip: IrqchipState,
    serial: Uart,
}

/// A 16550A UART, with its queued input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are the registers of the 16550A data sheet")]
#[non_exhaustive]
pub struct Uart {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// Received and not yet read by the guest, at most 64 bytes.
    pub fifo: Vec<u8>,
    /// Input that did not fit into the FIFO yet.
    pub queued_input: Vec<u8>,
}

/// The state of a device in a window of guest physical addresses. Each kind of device has its own encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The kind of device. For virtio devices, the number in the specification (virtio 1.2, 5).
    pub kind: u32,
    /// Version of `bytes`.
    pub version: u32,
    /// Its state, at most [`DEVICE_STATE_MAX_BYTES`].
    pub bytes: Vec<u8>,
}

/// Bytes that are not a [`VmState`] this version can use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The state is of another VMM or another architecture.
    #[error("state of kind {found:#010x}, expected {STATE_KIND:#010x}")]
    Kind {
        /// The kind found.
        found: u32,
    },
    /// The state was written by a version that this one does not know.
    #[error("state of version {found}, expected {STATE_VERSION_1} to {STATE_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Longer than [`STATE_MAX_BYTES`].
    #[error("state of {found} bytes, expected at most {STATE_MAX_BYTES}")]
    TooLong {
        /// The length found.
        found: u64,
    },
    /// The bytes do not decode.
    #[error("state of {len} bytes does not decode")]
    Malformed {
        /// Length of the state in bytes.
        len: usize,
        /// The error of the decoder.
        #[source]
        source: bincode::Error,
    },
    /// A list is longer, or shorter, than any guest's.
    #[error("state with {found} {what}, expected {min} to {max}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// The number found.
        found: usize,
        /// Smallest number allowed.
        min: usize,
        /// Largest number allowed.
        max: usize,
    },
    /// The generation id is not at an aligned address in memory.
    #[error("state with a generation id at gpa {gpa:#x}, expected a multiple of 16 in memory")]
    GenerationId {
        /// The address found.
        gpa: u64,
    },
    /// The memory ranges are not the layout of any memory size.
    #[error("state with memory ranges that no guest of {memory_bytes} bytes has")]
    MemoryLayout {
        /// Sum of the ranges' lengths.
        memory_bytes: u64,
    },
}

/// Tag of a device's content besides its state, among other kinds of state: "DEV" and the device's index as a digit.
#[must_use]
pub fn device_content_kind(place: usize) -> Option<u32> {
    let digit =
        u8::try_from(place).ok().filter(|&place| usize::from(place) < crate::DEVICES_MAX)?;
    Some(u32::from_le_bytes([b'D', b'E', b'V', b'0' + digit]))
}

impl VmState {
    /// Encodes the state, as kind [`STATE_KIND`] and version [`STATE_VERSION`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // Plain data into memory: bincode fails only for sequences of unknown length, of which there
        // are none here, and above its limit, which is not set for encoding.
        #[expect(clippy::expect_used, reason = "see above")]
        bincode::options().with_fixint_encoding().serialize(self).expect("plain data encodes")
    }

    /// Decodes and validates bytes of the given kind and version. Memory use is bounded by the length
    /// of `bytes`, also for hostile bytes.
    ///
    /// # Errors
    /// [`StateError`] when kind or version are not this crate's, when the bytes do not decode to their
    /// very end, or when a count or the memory layout is impossible.
    pub fn decode(kind: u32, version: u32, bytes: &[u8]) -> Result<VmState, StateError> {
        if kind != STATE_KIND {
            return Err(StateError::Kind { found: kind });
        }
        if !(STATE_VERSION_1..=STATE_VERSION).contains(&version) {
            return Err(StateError::Version { found: version });
        }
        if bytes.len() as u64 > STATE_MAX_BYTES {
            return Err(StateError::TooLong { found: bytes.len() as u64 });
        }
        let state = if version == STATE_VERSION_1 {
            decode_exactly::<VmStateV1>(bytes)?.into()
        } else {
            decode_exactly::<VmState>(bytes)?
        };
        state.validate()?;
        Ok(state)
    }

    /// The guest RAM that this state belongs to.
    #[must_use]
    pub fn memory(&self) -> &[MemoryRange] {
        &self.memory
    }

    /// The vCPUs, by index.
    #[must_use]
    pub fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }

    /// The vCPUs, to change them before a restore: for example to remove a CPU feature.
    #[must_use]
    pub fn vcpus_mut(&mut self) -> &mut [VcpuState] {
        &mut self.vcpus
    }

    /// The devices that KVM emulates in the kernel.
    #[must_use]
    pub fn irqchip(&self) -> &IrqchipState {
        &self.irqchip
    }

    /// The serial port.
    #[must_use]
    pub fn serial(&self) -> &Uart {
        &self.serial
    }

    /// Guest physical address of the generation id, if the guest has one.
    #[must_use]
    pub fn generation_id_gpa(&self) -> Option<u64> {
        self.generation_id_gpa
    }

    /// The devices in windows of guest physical addresses, by their index.
    #[must_use]
    pub fn devices(&self) -> &[DeviceState] {
        &self.devices
    }

    /// Guest memory that this state belongs to, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory.iter().fold(0, |sum, range| sum.saturating_add(range.len))
    }

    fn validate(&self) -> Result<(), StateError> {
        let memory_bytes = self.memory_bytes();
        if memory_layout(memory_bytes).ok().as_ref() != Some(&self.memory) {
            return Err(StateError::MemoryLayout { memory_bytes });
        }
        count("vCPUs", self.vcpus.len(), 1, VCPUS_MAX)?;
        self.vcpus.iter().try_for_each(VcpuState::validate)?;
        count("bytes in the serial FIFO", self.serial.fifo.len(), 0, FIFO_BYTES)?;
        count("bytes of queued input", self.serial.queued_input.len(), 0, QUEUED_INPUT_MAX)?;
        count("devices", self.devices.len(), 0, DEVICES_MAX)?;
        for device in &self.devices {
            count("bytes of a device", device.bytes.len(), 0, DEVICE_STATE_MAX_BYTES)?;
        }
        match self.generation_id_gpa {
            Some(gpa) if !self.holds_generation_id(gpa) => Err(StateError::GenerationId { gpa }),
            _ => Ok(()),
        }
    }

    /// Whether 16 bytes at `gpa`, with the alignment that the guest needs, are memory.
    fn holds_generation_id(&self, gpa: u64) -> bool {
        let inside = |range: &MemoryRange| range.gpa_range().contains(&gpa);
        gpa.is_multiple_of(16) && self.memory.iter().any(inside)
    }
}

/// Checks the length of a list.
pub(crate) fn count(
    what: &'static str,
    found: usize,
    min: usize,
    max: usize,
) -> Result<(), StateError> {
    match (min..=max).contains(&found) {
        true => Ok(()),
        false => Err(StateError::Count { what, found, min, max }),
    }
}

fn decode_exactly<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, StateError> {
    bincode::options()
        .with_fixint_encoding()
        .with_limit(STATE_MAX_BYTES)
        .deserialize(bytes)
        .map_err(|source| StateError::Malformed { len: bytes.len(), source })
}

impl From<VmStateV1> for VmState {
    fn from(old: VmStateV1) -> VmState {
        let VmStateV1 { memory, vcpus, irqchip, serial } = old;
        VmState {
            memory,
            vcpus,
            irqchip,
            serial,
            rtc: RtcState::default(),
            saved_unix_ns: 0,
            generation_id_gpa: None,
            devices: Vec::new(),
        }
    }
}
