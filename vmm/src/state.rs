//! The state of a paused guest, all but its memory, as data that can be stored.
//!
//! [`VmState`] is encoded by bincode with fixed-size little-endian integers. The encoding is frozen: stored
//! states of every version up to [`STATE_VERSION`] stay readable. A change to any type in this module, or to a kernel structure
//! in it, fails to compile (the size asserts below) or fails the golden test; the legal way is a new
//! version next to the old one.

use bincode::Options;
use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use crate::devices::DEVICES_MAX;
use crate::frozen::Frozen;
use crate::layout::{MemoryRange, memory_layout};
use crate::serial::FIFO_BYTES;

/// Tag of an encoded [`VmState`] among other kinds of state: "KVM" and the architecture, x86_64.
pub const STATE_KIND: u32 = u32::from_le_bytes(*b"KVMx");
/// Version of the encoding that [`VmState::encode`] writes.
pub const STATE_VERSION: u32 = 2;
/// Version of what [`PausedVm::device_contents`](crate::PausedVm::device_contents) gives.
pub const DEVICE_CONTENT_VERSION: u32 = 1;
/// The first version, without what [`VmState`] has from [`VmState::rtc`] on.
const STATE_VERSION_1: u32 = 1;
/// More encoded bytes than this are refused unread; a vCPU needs about 12 KiB.
pub const STATE_MAX_BYTES: u64 = 4 << 20;

/// Most vCPUs a state may have.
pub const VCPUS_MAX: usize = 64;
const CPUID_ENTRIES_MAX: usize = 256;
const MSRS_MAX: usize = 1024;
const QUEUED_INPUT_MAX: usize = 64 << 10;
/// Most bytes of one device's state.
pub const DEVICE_STATE_MAX_BYTES: usize = 256 << 10;

/// Everything about a paused guest that is not in its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmState {
    /// Guest RAM this state belongs to.
    pub memory: Vec<MemoryRange>,
    /// The vCPUs, by index.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers, timer and clock that live in the kernel.
    pub chips: ChipState,
    /// The serial port COM1.
    pub com1: Uart,
    /// The real-time clock.
    pub rtc: RtcState,
    /// The host's time of day when `chips.clock` was read, in nanoseconds since 1970; 0: not known.
    pub saved_unix_ns: u64,
    /// Guest physical address of the generation id, if the guest was told of one.
    pub generation_id_gpa: Option<u64>,
    /// The devices in windows of guest physical addresses, by place.
    pub devices: Vec<DeviceState>,
}

/// Version 1 of [`VmState`].
#[derive(Deserialize)]
struct VmStateV1 {
    memory: Vec<MemoryRange>,
    vcpus: Vec<VcpuState>,
    chips: ChipState,
    com1: Uart,
}

/// One vCPU. Each field is named after the KVM_GET_ call it comes from.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the guest's CPUID instruction answers (KVM_SET_CPUID2).
    pub cpuid: Vec<Frozen<kvm_cpuid_entry2>>,
    /// Frequency of the time stamp counter.
    pub tsc_khz: u32,
    /// Segments, control registers, descriptor tables.
    pub sregs: Frozen<kvm_sregs>,
    /// General registers, instruction pointer, flags.
    pub regs: Frozen<kvm_regs>,
    /// Extended control registers: which features XSAVE manages.
    pub xcrs: Frozen<kvm_xcrs>,
    /// x87, SSE, AVX state: the 4 KiB XSAVE area. Features beyond it (AMX) must be asked for with
    /// arch_prctl before a guest can use them, and this crate does not ask.
    pub xsave: Frozen<kvm_xsave>,
    /// Debug registers.
    pub debugregs: Frozen<kvm_debugregs>,
    /// The local APIC.
    pub lapic: Frozen<kvm_lapic_state>,
    /// Model-specific registers in the order in which they are to be set.
    pub msrs: Vec<Frozen<kvm_msr_entry>>,
    /// Running, halted, waiting for a start-up interrupt.
    pub mp_state: Frozen<kvm_mp_state>,
    /// Exceptions, interrupts, NMIs being delivered.
    pub events: Frozen<kvm_vcpu_events>,
}

/// The devices that KVM emulates in the kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChipState {
    /// First 8259A interrupt controller.
    pub pic_master: Frozen<kvm_irqchip>,
    /// Second 8259A interrupt controller.
    pub pic_slave: Frozen<kvm_irqchip>,
    /// I/O APIC.
    pub ioapic: Frozen<kvm_irqchip>,
    /// 8254 timer.
    pub pit: Frozen<kvm_pit_state2>,
    /// The guest's kvm-clock.
    pub clock: Frozen<kvm_clock_data>,
}

/// A 16550A UART, with the input that waits for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are the registers of the 16550A data sheet")]
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

/// The real-time clock: what software can change of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// The register selected.
    pub index: u8,
}

/// A device in a window of guest physical addresses, in an encoding of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// What it is. For virtio devices, the number that virtio gives them (virtio 1.2, 5).
    pub kind: u32,
    /// Version of `bytes`.
    pub version: u32,
    /// Its state, at most [`DEVICE_STATE_MAX_BYTES`].
    pub bytes: Vec<u8>,
}

// Tripwires: the kernel never changes these sizes, and neither may a new version of the bindings.
const _: () = {
    assert!(size_of::<kvm_cpuid_entry2>() == 40);
    assert!(size_of::<kvm_sregs>() == 312);
    assert!(size_of::<kvm_regs>() == 144);
    assert!(size_of::<kvm_xcrs>() == 392);
    assert!(size_of::<kvm_xsave>() == 4096);
    assert!(size_of::<kvm_debugregs>() == 128);
    assert!(size_of::<kvm_lapic_state>() == 1024);
    assert!(size_of::<kvm_msr_entry>() == 16);
    assert!(size_of::<kvm_mp_state>() == 4);
    assert!(size_of::<kvm_vcpu_events>() == 64);
    assert!(size_of::<kvm_irqchip>() == 520);
    assert!(size_of::<kvm_pit_state2>() == 112);
    assert!(size_of::<kvm_clock_data>() == 48);
};

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
        /// What the decoder found.
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

/// Tag of what the device at this place has besides its state, among other kinds of state: "DEV" and the place
/// as a digit.
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
    /// of `bytes`, whatever they say.
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

    /// Guest memory this state belongs to, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory.iter().fold(0, |sum, range| sum.saturating_add(range.len))
    }

    fn validate(&self) -> Result<(), StateError> {
        let memory_bytes = self.memory_bytes();
        if memory_layout(memory_bytes).ok().as_ref() != Some(&self.memory) {
            return Err(StateError::MemoryLayout { memory_bytes });
        }
        let count = |what, found: usize, min, max| {
            if (min..=max).contains(&found) {
                Ok(())
            } else {
                Err(StateError::Count { what, found, min, max })
            }
        };
        count("vCPUs", self.vcpus.len(), 1, VCPUS_MAX)?;
        for vcpu in &self.vcpus {
            count("CPUID entries of a vCPU", vcpu.cpuid.len(), 1, CPUID_ENTRIES_MAX)?;
            count("MSRs of a vCPU", vcpu.msrs.len(), 0, MSRS_MAX)?;
        }
        count("bytes in the serial FIFO", self.com1.fifo.len(), 0, FIFO_BYTES)?;
        count("bytes of queued input", self.com1.queued_input.len(), 0, QUEUED_INPUT_MAX)?;
        count("devices", self.devices.len(), 0, DEVICES_MAX)?;
        for device in &self.devices {
            count("bytes of a device", device.bytes.len(), 0, DEVICE_STATE_MAX_BYTES)?;
        }
        match self.generation_id_gpa {
            Some(gpa) if !self.holds_generation_id(gpa) => Err(StateError::GenerationId { gpa }),
            _ => Ok(()),
        }
    }

    /// Whether 16 bytes at `gpa`, aligned as the guest wants them, are memory.
    fn holds_generation_id(&self, gpa: u64) -> bool {
        let inside = |range: &MemoryRange| range.gpa_range().contains(&gpa);
        gpa.is_multiple_of(16) && self.memory.iter().any(inside)
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
        let VmStateV1 { memory, vcpus, chips, com1 } = old;
        VmState {
            memory,
            vcpus,
            chips,
            com1,
            rtc: RtcState::default(),
            saved_unix_ns: 0,
            generation_id_gpa: None,
            devices: Vec::new(),
        }
    }
}
