//! The stored states of devices: their frozen encodings, and states that no device has.

use std::path::Path;

use super::{block, image};
use crate::devices::MmioDevice;
use crate::virtio::{
    BackendState, BalloonState, BlockState, Disk, EventLoop, Fingerprint, Host, MacAddress,
    NetState, OverlayState, QueueRegisters, TransportState, VirtioDevice, VirtioState, VsockState,
};

#[test]
fn impossible_states_are_refused() {
    let image = image();
    let mut driver = block(image.path(), true);
    driver.device.pause();
    let state = driver.device.state();
    let saved = VirtioState::decode(&state).unwrap();
    let event_loop = EventLoop::start().unwrap();
    let changes: [fn(&mut TransportState); 6] = [
        |t| t.queues.clear(),
        |t| t.driver_features |= 1 << 50,
        |t| t.queues[0].size = 3,
        |t| t.queues[0].size = 1 << 20,
        |t| t.queues[0].used = u64::MAX - 3,
        |t| t.queues[0].descriptors += 1,
    ];
    for change in changes {
        let mut transport = saved.transport.clone();
        change(&mut transport);
        let disk = Disk::open(image.path(), true).unwrap();
        let mut device =
            VirtioDevice::restore(&event_loop, transport.clone(), Host::Disk(disk)).unwrap();
        let context = driver.context();
        assert!(device.attach(context).is_err(), "{transport:?}");
    }
    for (at, _) in state.bytes.iter().enumerate() {
        let mut cut = state.clone();
        cut.bytes.truncate(at);
        VirtioState::decode(&cut).unwrap_err();
    }
    let other = crate::state::DeviceState { kind: 4, ..state.clone() };
    VirtioState::decode(&other).unwrap_err();
    VirtioState::decode(&crate::state::DeviceState { version: 2, ..state }).unwrap_err();
}

/// The released encodings of version 1. They may not change.
#[test]
fn the_encodings_are_frozen() {
    for (name, device) in golden_devices() {
        let bytes = std::fs::read(golden_path(name)).expect("a golden file that is there");
        let state = crate::state::DeviceState { kind: device.kind(), version: 1, bytes };
        let decoded = VirtioState::decode(&state).unwrap();
        assert_eq!(decoded, golden_state(device));
        assert_eq!(decoded.encode(), state);
    }
}

/// For a new kind of device: `cargo test -p snapvm-vmm --lib write_golden -- --ignored`. Existing files stay.
#[test]
#[ignore = "writes the golden files that are missing"]
fn write_golden_states() {
    for (name, device) in golden_devices() {
        if !golden_path(name).exists() {
            std::fs::write(golden_path(name), golden_state(device).encode().bytes).unwrap();
        }
    }
}

fn golden_path(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/virtio-{name}-state-v1.bin"))
}

fn golden_devices() -> [(&'static str, BackendState); 6] {
    let mac = MacAddress([2, 0, 0, 0, 0, 0x2a]);
    let balloon = BalloonState { actual_pages: 3, returned_bytes: 4 << 20 };
    [
        ("block", golden_disk()),
        ("rng", BackendState::Rng),
        ("vsock", golden_vsock()),
        ("net", BackendState::Net(NetState { tap: "tap0".into(), mac })),
        ("balloon", BackendState::Balloon(balloon)),
        ("overlay", BackendState::Overlay(golden_overlay())),
    ]
}

fn golden_vsock() -> BackendState {
    BackendState::Vsock(VsockState { guest_cid: 52, path: "/run/guest.vsock".into() })
}

fn golden_disk() -> BackendState {
    let fingerprint = Fingerprint { len: 1 << 20, mtime_ns: -1, sample_crc32: 0x1234_5678 };
    let path = "/images/disk.img".into();
    BackendState::Block(BlockState { path, read_only: true, fingerprint })
}

fn golden_overlay() -> OverlayState {
    let BackendState::Block(disk) = golden_disk() else { panic!("a disk") };
    OverlayState { disk: BlockState { read_only: false, ..disk }, blocks: 5 }
}

fn golden_state(device: BackendState) -> VirtioState {
    let queue = QueueRegisters {
        size: 128,
        descriptors: 0x1_0000_1000,
        available: 0x2000,
        used: 0x3000,
        ready: true,
        next_available: 7,
        next_used: 6,
    };
    let transport = TransportState {
        status: 15,
        interrupt_status: 1,
        driver_features: 1 << 32 | 1 << 9,
        device_features_sel: 2,
        driver_features_sel: 3,
        queue_sel: 4,
        config_generation: 5,
        queues: vec![queue],
    };
    VirtioState { transport, device }
}
