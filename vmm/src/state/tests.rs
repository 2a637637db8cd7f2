//! The encoding of a guest's state is frozen, and decodes hostile bytes without harm.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use proptest::prelude::*;
use serde::de::value::{BytesDeserializer, Error};

use super::*;
use crate::Frozen;

/// A released state of version 1. It stays readable.
const GOLDEN_V1: &[u8] = include_bytes!("../../tests/golden/vm-state-v1.bin");
/// One of version 2.
const GOLDEN_V2: &[u8] = include_bytes!("../../tests/golden/vm-state-v2.bin");

/// A structure whose every byte differs from its neighbours.
fn pattern<T: for<'de> Deserialize<'de>>(seed: u8) -> Frozen<T> {
    let bytes: Vec<u8> =
        (0..size_of::<T>()).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    Frozen::deserialize(BytesDeserializer::<Error>::new(&bytes)).unwrap()
}

fn example() -> VmState {
    let vcpu = |seed: u8| VcpuState {
        cpuid: (0..3).map(|i| pattern::<kvm_cpuid_entry2>(seed + i)).collect(),
        tsc_khz: 2_596_140,
        sregs: pattern::<kvm_sregs>(seed + 3),
        regs: pattern::<kvm_regs>(seed + 4),
        xcrs: pattern::<kvm_xcrs>(seed + 5),
        xsave: pattern::<kvm_xsave>(seed + 6),
        debugregs: pattern::<kvm_debugregs>(seed + 7),
        lapic: pattern::<kvm_lapic_state>(seed + 8),
        msrs: (9..14).map(|i| pattern::<kvm_msr_entry>(seed + i)).collect(),
        mp_state: pattern::<kvm_mp_state>(seed + 14),
        events: pattern::<kvm_vcpu_events>(seed + 15),
    };
    VmState {
        memory: memory_layout(4 << 30).unwrap(),
        vcpus: vec![vcpu(0), vcpu(100)],
        irqchip: IrqchipState {
            pic_master: pattern::<kvm_irqchip>(40),
            pic_slave: pattern::<kvm_irqchip>(41),
            ioapic: pattern::<kvm_irqchip>(42),
            pit: pattern::<kvm_pit_state2>(43),
            clock: pattern::<kvm_clock_data>(44),
        },
        serial: Uart {
            baud_divisor_low: 1,
            baud_divisor_high: 2,
            interrupt_enable: 3,
            interrupt_identification: 4,
            line_control: 5,
            line_status: 6,
            modem_control: 7,
            modem_status: 8,
            scratch: 9,
            fifo: b"typed".to_vec(),
            queued_input: b"ahead".to_vec(),
        },
        rtc: RtcState { index: 0x32 },
        saved_unix_ns: 0x1122_3344_5566_7788,
        generation_id_gpa: Some(0xf_0000),
        devices: vec![
            DeviceState { kind: 2, version: 1, bytes: b"a disk".to_vec() },
            DeviceState { kind: 4, version: 9, bytes: Vec::new() },
        ],
    }
}

fn decode(bytes: &[u8]) -> Result<VmState, StateError> {
    VmState::decode(STATE_KIND, STATE_VERSION, bytes)
}

/// Writes the golden file of a NEW version: `cargo test -p snapvm-vmm state::tests -- --ignored`.
/// The file of a version that was released never changes.
#[test]
#[ignore = "writes the golden file"]
fn write_golden() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/vm-state-v2.bin");
    std::fs::write(path, example().encode()).unwrap();
}

#[test]
fn version_2_is_written_and_read_without_a_change() {
    assert_eq!((STATE_KIND, STATE_VERSION), (0x784d_564b, 2));
    assert!(example().encode() == GOLDEN_V2, "the encoding of version 2 has changed");
    assert!(decode(GOLDEN_V2).unwrap().encode() == GOLDEN_V2);
}

/// Version 2 appends to version 1, so that the fields of version 1 are the beginning of version 2.
#[test]
fn version_1_is_read_without_a_change() {
    let state = VmState::decode(STATE_KIND, 1, GOLDEN_V1).unwrap();
    assert_eq!((state.rtc.index, state.saved_unix_ns, state.generation_id_gpa), (0, 0, None));
    assert!(state.devices.is_empty());
    assert!(state.encode().starts_with(GOLDEN_V1));
    let longer = [GOLDEN_V1, &[0]].concat();
    let error = VmState::decode(STATE_KIND, 1, &longer).unwrap_err();
    assert!(matches!(error, StateError::Malformed { .. }));
}

#[test]
fn foreign_kinds_and_versions_are_named() {
    let error = VmState::decode(7, STATE_VERSION, GOLDEN_V2).unwrap_err();
    assert_eq!(error.to_string(), "state of kind 0x00000007, expected 0x784d564b");
    for version in [0, 3] {
        let error = VmState::decode(STATE_KIND, version, GOLDEN_V2).unwrap_err();
        assert_eq!(error.to_string(), format!("state of version {version}, expected 1 to 2"));
    }
}

#[test]
fn every_truncation_and_any_extension_is_refused() {
    for len in 0..GOLDEN_V2.len() {
        assert!(matches!(decode(&GOLDEN_V2[..len]), Err(StateError::Malformed { .. })), "{len}");
    }
    let longer = [GOLDEN_V2, &[0]].concat();
    assert!(matches!(decode(&longer), Err(StateError::Malformed { .. })));
    let huge = vec![0; STATE_MAX_BYTES as usize + 1];
    assert!(matches!(decode(&huge), Err(StateError::TooLong { .. })));
}

/// kvm-bindings alone would pad a short structure with zeros and cut a long one.
#[test]
fn structures_of_another_size_are_refused() {
    let regs = [0u8; 144];
    for len in [0, 143] {
        let bytes = BytesDeserializer::<Error>::new(&regs[..len]);
        let error = Frozen::<kvm_regs>::deserialize(bytes).unwrap_err();
        assert!(error.to_string().contains("the 144 bytes of"), "{error}");
    }
    let long = [0u8; 145];
    assert!(Frozen::<kvm_regs>::deserialize(BytesDeserializer::<Error>::new(&long)).is_err());
}

#[test]
fn impossible_contents_are_named() {
    let refused = |change: fn(&mut VmState)| {
        let mut state = example();
        change(&mut state);
        decode(&state.encode()).unwrap_err().to_string()
    };
    assert_eq!(refused(|s| s.vcpus.clear()), "state with 0 vCPUs, expected 1 to 64");
    assert_eq!(
        refused(|s| s.memory[1].gpa += 4096),
        "state with memory ranges that no guest of 4294967296 bytes has"
    );
    assert_eq!(
        refused(|s| s.memory[0].len = u64::MAX),
        "state with memory ranges that no guest of 18446744073709551615 bytes has"
    );
    assert_eq!(
        refused(|s| s.serial.fifo = vec![0; 65]),
        "state with 65 bytes in the serial FIFO, expected 0 to 64"
    );
    let device = DeviceState { kind: 2, version: 1, bytes: Vec::new() };
    let mut state = example();
    state.devices = vec![device; 9];
    let error = decode(&state.encode()).unwrap_err();
    assert_eq!(error.to_string(), "state with 9 devices, expected 0 to 8");
    assert_eq!(
        refused(|s| s.devices[0].bytes = vec![0; (256 << 10) + 1]),
        "state with 262145 bytes of a device, expected 0 to 262144"
    );
    for gpa in [0xf_0008u64, 3 << 30, u64::MAX - 15] {
        let mut state = example();
        state.generation_id_gpa = Some(gpa);
        let error = decode(&state.encode()).unwrap_err().to_string();
        assert!(error.starts_with("state with a generation id at gpa"), "{error}");
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = decode(&bytes);
    }

    /// A changed state that still decodes encodes to the changed bytes: nothing is guessed or dropped.
    #[test]
    fn mutations_are_refused_or_kept(
        changes in proptest::collection::vec((0..GOLDEN_V2.len(), any::<u8>()), 1..8),
    ) {
        let mut bytes = GOLDEN_V2.to_vec();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if let Ok(state) = decode(&bytes) {
            prop_assert!(state.encode() == bytes);
        }
    }
}
