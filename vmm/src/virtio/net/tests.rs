//! The network device with a pair of datagram sockets in the place of a tap: a frame for each read or write too.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::control::Stop;
use crate::devices::MmioDevice;
use crate::virtio::fake_driver::*;
use crate::virtio::{EventLoop, Host, VirtioDevice, VirtioState};

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 0x2a]);
const SENT: u64 = 0x8000;
const RECEIVED: u64 = 0xa000;

fn tap() -> (Tap, UnixDatagram) {
    let (tap, host) = Tap::stand_in();
    host.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    (tap, host)
}

fn net() -> (Driver, UnixDatagram) {
    let (tap, host) = tap();
    let event_loop = EventLoop::start().unwrap();
    let device = VirtioDevice::create(&event_loop, Host::Net(tap, MAC)).unwrap();
    let mut driver = Driver::attach(device, memory());
    driver.start_queues(2);
    (driver, host)
}

/// Sends a frame with this header before it, and waits until its buffer is back.
fn send(driver: &mut Driver, header: &[u8], frame: &[u8]) {
    let bytes = [header, frame].concat();
    driver.memory.write_slice(&bytes, GuestAddress(SENT)).unwrap();
    let count = driver.used_in(1) + 1;
    let split = 20.min(bytes.len() as u32);
    let rest = bytes.len() as u32 - split;
    driver.offer_in(1, 0, &[(SENT, split, 0), (SENT + u64::from(split), rest, 0)]);
    driver.wait_used_in(1, count);
}

fn bytes(driver: &Driver, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    driver.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

#[test]
fn frames_go_both_ways() {
    let (mut driver, host) = net();
    assert_eq!((driver.get(0x08), driver.get(0x100)), (1, 2));
    assert_eq!(driver.get(0x104), 0x2a00);
    // The header can have any content: it never reaches the tap.
    send(&mut driver, &[0xff; 12], &[7; 60]);
    let mut frame = [0; 2000];
    assert_eq!(host.recv(&mut frame).unwrap(), 60);
    assert_eq!(frame[..60], [7; 60]);

    // Two frames before there is a buffer; they wait in the tap.
    host.send(&[1; 100]).unwrap();
    host.send(&[2; 1514]).unwrap();
    driver.offer_in(0, 0, &[(RECEIVED, 1526, WRITE)]);
    assert_eq!(driver.wait_used_in(0, 1), (0, 112));
    assert_eq!(bytes(&driver, RECEIVED, 112), [&HEADER[..], &[1; 100]].concat());
    driver.offer_in(0, 1, &[(RECEIVED, 12, WRITE), (RECEIVED + 12, 1600, WRITE)]);
    assert_eq!(driver.wait_used_in(0, 2), (1, 1526));
    assert_eq!(bytes(&driver, RECEIVED + 12, 1514), [2; 1514]);
    // Then a buffer before there is a frame.
    driver.offer_in(0, 0, &[(RECEIVED, 1526, WRITE)]);
    host.send(&[3; 14]).unwrap();
    assert_eq!(driver.wait_used_in(0, 3), (0, 26));
}

#[test]
fn invalid_frames_are_dropped() {
    let (mut driver, host) = net();
    send(&mut driver, &[0; 12], &[7; 13]);
    // More than any frame has: in two buffers of one chain that overlap.
    let count = driver.used_in(1) + 1;
    driver.offer_in(1, 0, &[(SENT, 0x9000, 0), (SENT, 0x9000, 0)]);
    driver.wait_used_in(1, count);
    send(&mut driver, &[0; 12], &[8; 14]);
    let mut frame = [0; 2000];
    assert_eq!(host.recv(&mut frame).unwrap(), 14);
    // Longer than the guest's buffer: cut off, and no byte behind it is written.
    driver.memory.write_slice(&[0xee; 64], GuestAddress(RECEIVED)).unwrap();
    driver.offer_in(0, 0, &[(RECEIVED, 40, WRITE)]);
    host.send(&[9; 100]).unwrap();
    assert_eq!(driver.wait_used_in(0, 1), (0, 40));
    assert_eq!(bytes(&driver, RECEIVED + 39, 2), [9, 0xee]);
    // The other end is closed: frames are lost, and the guest continues.
    drop(host);
    send(&mut driver, &[0; 12], &[8; 14]);
    assert_eq!(driver.stop(), None);
}

#[test]
fn hostile_buffers_break_only_the_device() {
    let (mut driver, host) = net();
    type Chain<'a> = &'a [(u64, u32, u16)];
    let attacks: [(u32, Chain<'_>); 6] = [
        (1, &[(SENT, 11, 0)]),
        (1, &[(SENT, 60, 0), (SENT, 4, WRITE)]),
        (0, &[(RECEIVED, 11, WRITE)]),
        (0, &[(RECEIVED, 12, WRITE)]),
        (0, &[(RECEIVED, 25, WRITE)]),
        (0, &[(SENT, 4, 0), (RECEIVED, 1526, WRITE)]),
    ];
    for (queue, chain) in attacks {
        host.send(&[1; 60]).unwrap();
        driver.offer_in(queue, 0, chain);
        assert_eq!(driver.wait_for_interrupt(), 2, "{queue} {chain:?}");
        assert_eq!(driver.get(STATUS), 15 | NEEDS_RESET);
        driver.start_queues(2);
    }
    driver.offer_in(0, 0, &[(RECEIVED, 1526, WRITE)]);
    assert_eq!(driver.wait_used_in(0, 1), (0, 72), "it works after a reset");
    driver.offer_in(0, 0, &[(BROKEN_GPA, 1526, WRITE)]);
    let stop = driver.wait_for_stop();
    assert_eq!(stop, Stop::MemoryError { gpa: Some(BROKEN_GPA + 12), host_addr: None });
}

#[test]
fn a_restored_guest_gets_new_frames() {
    let (mut driver, host) = net();
    driver.offer_in(0, 0, &[(RECEIVED, 1526, WRITE)]);
    driver.device.pause();
    host.send(&[1; 60]).unwrap();
    let state = driver.device.state();
    let memory = Arc::clone(&driver.memory);
    drop(driver);
    let saved = VirtioState::decode(&state).unwrap();
    assert_eq!(saved.encode(), state);
    let BackendState::Net(net) = &saved.device else { panic!("{saved:?}") };
    assert_eq!((net.tap.as_str(), net.mac), ("tap0", MAC));

    let (tap, host) = tap();
    host.send(&[2; 60]).unwrap();
    let event_loop = EventLoop::start().unwrap();
    let other = MacAddress([2, 0, 0, 0, 0, 0x2b]);
    let device = VirtioDevice::restore(&event_loop, saved.transport, Host::Net(tap, other));
    let mut driver = Driver::attach(device.unwrap(), memory);
    assert_eq!(driver.wait_used_in(0, 1), (0, 72));
    assert_eq!(bytes(&driver, RECEIVED + 12, 60), [2; 60]);
    assert_eq!(driver.get(0x104), 0x2b00);
}

#[test]
fn addresses_are_of_one_interface() {
    assert_eq!("02:00:00:00:00:2a".parse(), Ok(MAC));
    assert_eq!(MAC.to_string(), "02:00:00:00:00:2a");
    for bad in ["", "02:00:00:00:00", "02:00:00:00:00:2a:00", "01:00:00:00:00:00", "0:0:0:0:0:1"] {
        assert_eq!(bad.parse::<MacAddress>(), Err(MacError), "{bad}");
    }
    assert_eq!("00:00:00:00:00:00".parse::<MacAddress>(), Err(MacError));
    let random = MacAddress::random().unwrap();
    assert!(random.is_unicast() && random.0[0] & 2 == 2, "{random}");
}

#[test]
fn impossible_taps_are_named() {
    for name in ["", "a-name-too-long-", "tap/0", "tap 0", "tap%d"] {
        assert!(matches!(Tap::open(name), Err(TapError::Name { .. })), "{name}");
    }
    assert!(matches!(Tap::open("snap-none"), Err(TapError::Missing { .. })));
}
