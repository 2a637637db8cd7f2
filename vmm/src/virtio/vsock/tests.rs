//! The socket device as a driver and programs of the host see it, friendly ones and hostile ones.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::packet::*;
use super::*;
use crate::devices::MmioDevice;
use crate::virtio::fake_driver::*;
use crate::virtio::{EventLoop, Host, VirtioDevice, VirtioState};

const CID: u64 = 52;
/// Buffers for packets to the guest: one of [`ROOM`] bytes at each place.
const RECEIVED: u64 = 0x2_0000;
const ROOM: u32 = 0x1000;
const PACKET: u64 = 0x8000;
const EVENT: u64 = 0xf000;
/// What the guest can keep.
const GUEST_BUFFER: u32 = 256 << 10;

/// A guest with its vsock.
struct Guest {
    driver: Driver,
    path: PathBuf,
    _folder: tempfile::TempDir,
    /// Packets taken from the used ring of the first queue.
    taken: u16,
    offered: u16,
    /// Bytes of the last connection that the guest has taken: each connection has its own credit.
    forwarded: u32,
}

impl Guest {
    fn new() -> Guest {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let host = VsockHost::bind(CID, &path).unwrap();
        let event_loop = EventLoop::start().unwrap();
        let device = VirtioDevice::create(&event_loop, Host::Vsock(host)).unwrap();
        let mut driver = Driver::attach(device, memory());
        driver.start_queues(3);
        let mut guest = Guest { driver, path, _folder: folder, taken: 0, offered: 0, forwarded: 0 };
        (0..8).for_each(|_| guest.give_buffer());
        guest
    }

    /// A buffer for one packet to the guest.
    fn give_buffer(&mut self) {
        let head = self.offered % 8;
        let at = RECEIVED + u64::from(head) * u64::from(ROOM);
        self.driver.offer_in(0, head, &[(at, ROOM, WRITE)]);
        self.offered += 1;
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let bytes = [header.to_bytes(), data.to_vec()].concat();
        self.driver.memory.write_slice(&bytes, GuestAddress(PACKET)).unwrap();
        let count = self.driver.used_in(1) + 1;
        self.driver.offer_in(1, 0, &[(PACKET, bytes.len() as u32, 0)]);
        self.driver.wait_used_in(1, count);
    }

    fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: GUEST_BUFFER,
            fwd_cnt: self.forwarded,
        }
    }

    fn send_op(&mut self, ports: Ports, op: Op) {
        self.send(self.header(ports, op), &[]);
    }

    fn send_data(&mut self, ports: Ports, data: &[u8]) {
        self.send(Header { len: data.len() as u32, ..self.header(ports, Op::Data) }, data);
    }

    fn shut_down(&mut self, ports: Ports, flags: u32) {
        self.send(Header { flags, ..self.header(ports, Op::Shutdown) }, &[]);
    }

    /// The next packet to the guest; its buffer is offered again.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.taken += 1;
        while self.driver.used_in(0) < self.taken {
            assert_eq!(self.driver.wait_for_interrupt(), 1);
        }
        let slot = u64::from(self.taken - 1) % u64::from(QUEUE_SIZE);
        let used = GuestAddress(USED + 4 + 8 * slot);
        let [head, len]: [u32; 2] = self.driver.memory.read_obj(used).unwrap();
        let mut bytes = vec![0; len as usize];
        let at = RECEIVED + u64::from(head) * u64::from(ROOM);
        self.driver.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let data = bytes.split_off(HEADER_BYTES);
        let header = Header::parse(bytes.as_slice().try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, STREAM));
        assert_eq!(header.len as usize, data.len());
        self.forwarded = self.forwarded.wrapping_add(header.len);
        self.give_buffer();
        (header, data)
    }

    fn receive_op(&mut self, op: Op) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// A connection that the guest requested, and the host's end of it.
    fn connect_to_host(&mut self, guest: u32) -> (Ports, UnixStream) {
        self.forwarded = 0;
        let ports = Ports { host: 77, guest };
        let listener = UnixListener::bind(port_path(&self.path, 77)).unwrap();
        self.send_op(ports, Op::Request);
        let header = self.receive_op(Op::Response);
        assert_eq!((header.src_port, header.dst_port), (77, guest));
        let (stream, _) = listener.accept().unwrap();
        std::fs::remove_file(port_path(&self.path, 77)).unwrap();
        (ports, stream)
    }

    /// A connection that a program of the host requested.
    fn connect_to_guest(&mut self, port: u32) -> (Ports, UnixStream) {
        self.forwarded = 0;
        let mut stream = UnixStream::connect(&self.path).unwrap();
        write!(stream, "CONNECT {port}\nearly").unwrap();
        let header = self.receive_op(Op::Request);
        assert_eq!(header.dst_port, port);
        let ports = Ports { host: header.src_port, guest: port };
        self.send_op(ports, Op::Response);
        let greeting = format!("OK {}\n", ports.host);
        let mut found = vec![0; greeting.len()];
        stream.read_exact(&mut found).unwrap();
        assert_eq!(found, greeting.as_bytes());
        assert_eq!(self.receive().1, b"early", "what came with the greeting");
        (ports, stream)
    }
}

fn port_path(path: &Path, port: u32) -> PathBuf {
    format!("{}_{port}", path.display()).into()
}

fn at_end(stream: &mut UnixStream) -> bool {
    // A connection that is closed with something unread in it is reset.
    match stream.read(&mut [0]) {
        Ok(len) => len == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_program_of_the_host_and_the_guest_talk() {
    let mut guest = Guest::new();
    assert_eq!((guest.driver.get(0x100), guest.driver.get(0x104)), (CID as u32, 0));
    let mode = std::fs::metadata(&guest.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (ports, mut stream) = guest.connect_to_guest(1024);
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(guest.receive().1, b"to the guest");
    guest.send_data(ports, b"to the host");
    let mut found = [0; 11];
    stream.read_exact(&mut found).unwrap();
    assert_eq!(&found, b"to the host");
    // The host's program goes: what it wrote still comes, then the end, which the guest confirms.
    stream.write_all(b"last").unwrap();
    drop(stream);
    assert_eq!(guest.receive().1, b"last");
    let mut header = guest.receive_op(Op::Shutdown);
    if header.flags == NO_MORE_SENT {
        // Seen in two steps.
        header = guest.receive_op(Op::Shutdown);
    }
    assert_eq!(header.flags, NO_MORE_SENT | NO_MORE_RECEIVED);
    guest.send_op(ports, Op::Reset);
    // The connection does not exist any more.
    guest.send_data(ports, b"?");
    guest.receive_op(Op::Reset);
}

#[test]
fn the_guest_connects_to_whoever_listens() {
    let mut guest = Guest::new();
    let (ports, mut stream) = guest.connect_to_host(9);
    guest.send_data(ports, b"hello");
    // Half of it is closed; the other half stays open.
    guest.shut_down(ports, NO_MORE_SENT);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    stream.write_all(b"bye").unwrap();
    assert_eq!(guest.receive().1, b"bye");
    guest.shut_down(ports, NO_MORE_SENT | NO_MORE_RECEIVED);
    guest.receive_op(Op::Reset);
    assert!(stream.write_all(b"nobody").is_err());
    // There is no listener.
    guest.send_op(Ports { host: 78, guest: 9 }, Op::Request);
    let refused = guest.receive_op(Op::Reset);
    assert_eq!((refused.src_port, refused.dst_port), (78, 9));
}

#[test]
fn data_waits_for_credit_both_ways() {
    let mut guest = Guest::new();
    let (ports, mut stream) = guest.connect_to_host(9);
    // The guest takes ten bytes, then no more until it sends more credit.
    let small = Header { buf_alloc: 10, ..guest.header(ports, Op::CreditUpdate) };
    guest.send(small, &[]);
    stream.write_all(&[7; 25]).unwrap();
    assert_eq!(guest.receive().1, [7; 10]);
    guest.receive_op(Op::CreditRequest);
    let more = Header { buf_alloc: 20, fwd_cnt: 10, ..small };
    guest.send(more, &[]);
    assert_eq!(guest.receive().1, [7; 15]);
    guest.send_op(ports, Op::CreditRequest);
    assert_eq!(guest.receive_op(Op::CreditUpdate).buf_alloc, 64 << 10);

    // The host does not read: what its socket takes is forwarded, the rest waits, within the credit.
    let (mut sent, mut forwarded) = (0u32, 0u32);
    let bytes: Vec<u8> = (0..4096u32).map(|index| (index / 7) as u8).collect();
    while sent.wrapping_sub(forwarded) + 4096 <= 64 << 10 {
        guest.send_data(ports, &bytes);
        sent += 4096;
        guest.send_op(ports, Op::CreditRequest);
        // An update of the device's own may come before the answer.
        forwarded = guest.receive_op(Op::CreditUpdate).fwd_cnt;
    }
    let mut found = vec![0; sent as usize];
    stream.read_exact(&mut found).unwrap();
    assert!(found.chunks(4096).all(|chunk| chunk == bytes));
    while forwarded != sent {
        forwarded = guest.receive_op(Op::CreditUpdate).fwd_cnt;
        if forwarded != sent {
            guest.send_op(ports, Op::CreditRequest);
        }
    }
}

#[test]
fn more_than_the_credit_ends_the_connection() {
    let mut guest = Guest::new();
    let (ports, mut stream) = guest.connect_to_host(9);
    let bytes = [1; 4096];
    // Without looking at the credit: at some point the socket takes no more, then 64 KiB wait.
    let mut ended = false;
    while !ended {
        guest.send_data(ports, &bytes);
        while guest.driver.used_in(0) > guest.taken {
            ended |= guest.receive().0.op == Op::Reset;
        }
    }
    while !at_end(&mut stream) {}
    assert_eq!(guest.driver.stop(), None);
}

#[test]
fn a_guest_that_claims_nonsense_gets_no_data() {
    let mut guest = Guest::new();
    let (ports, mut stream) = guest.connect_to_host(9);
    let nonsense =
        Header { buf_alloc: 5, fwd_cnt: 1 << 31, ..guest.header(ports, Op::CreditUpdate) };
    guest.send(nonsense, &[]);
    stream.write_all(b"data").unwrap();
    guest.receive_op(Op::CreditRequest);
    let right = Header { buf_alloc: 5, fwd_cnt: 0, ..nonsense };
    guest.send(right, &[]);
    assert_eq!(guest.receive().1, b"data");
}

#[test]
fn packets_that_belong_to_nothing_are_refused() {
    let mut guest = Guest::new();
    let (ports, mut stream) = guest.connect_to_host(9);
    let header = guest.header(Ports { host: 5, guest: 6 }, Op::Data);
    for wrong in [
        header,
        Header { op: Op::Response, ..header },
        Header { op: Op::Other(9), ..header },
        Header { kind: 2, op: Op::Request, ..header },
        Header { dst_cid: 7, op: Op::Request, ..header },
        Header { op: Op::Shutdown, flags: 3, ..header },
    ] {
        let at = GuestAddress(RECEIVED + u64::from(guest.taken % 8) * u64::from(ROOM));
        guest.send(wrong, &[]);
        guest.taken += 1;
        while guest.driver.used_in(0) < guest.taken {
            guest.driver.wait_for_interrupt();
        }
        let mut bytes = [0; HEADER_BYTES];
        guest.driver.memory.read_slice(&mut bytes, at).unwrap();
        let refusal = Header::parse(&bytes);
        assert_eq!(refusal, wrong.refusal(), "{wrong:?}");
        guest.give_buffer();
    }
    // A reset is not answered, because two ends would answer each other endlessly.
    guest.send_op(Ports { host: 5, guest: 6 }, Op::Reset);
    // What makes no sense in a connection ends it.
    guest.send_op(ports, Op::Other(9));
    guest.receive_op(Op::Reset);
    assert!(at_end(&mut stream));
    for greeting in ["CONNECT x\n", "HELLO\n", "CONNECT 5000000000\n", "CONNECT 00000000000000001"]
    {
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        stream.write_all(greeting.as_bytes()).unwrap();
        assert!(at_end(&mut stream), "{greeting}");
    }
}

#[test]
fn bad_packets_break_only_the_device() {
    let mut guest = Guest::new();
    let long = Header { len: 100, ..guest.header(Ports { host: 1, guest: 1 }, Op::Data) };
    guest.driver.memory.write_slice(&long.to_bytes(), GuestAddress(PACKET)).unwrap();
    type Chain<'a> = &'a [(u64, u32, u16)];
    let attacks: [(u32, Chain<'_>); 4] = [
        (1, &[(PACKET, 43, 0)]),
        (1, &[(PACKET, 44 + 99, 0)]),
        (0, &[(RECEIVED, 44, WRITE)]),
        (0, &[(RECEIVED, 20, WRITE)]),
    ];
    for (queue, chain) in attacks {
        guest.driver.start_queues(3);
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        writeln!(stream, "CONNECT 1").unwrap();
        if queue == 1 {
            // The device has the connection when it asks the guest: one that still waits at the socket outlives the
            // reset. (Of the other queue it looks at buffers only when it has something for them.)
            guest.driver.offer_in(0, 0, &[(RECEIVED, ROOM, WRITE)]);
            guest.driver.wait_used_in(0, 1);
        }
        guest.driver.offer_in(queue, 0, chain);
        // Not only that of the request.
        while guest.driver.wait_for_interrupt() & 2 == 0 {}
        assert_eq!(guest.driver.get(STATUS), 15 | NEEDS_RESET);
        // The driver's reset ends all connections.
        guest.driver.set(STATUS, 0);
        assert!(at_end(&mut stream));
    }
    assert_eq!(guest.driver.stop(), None);
}

/// 64 refusals wait; then packets do, until there are buffers. None is lost.
#[test]
fn a_guest_without_buffers_is_not_remembered_for_ever() {
    let mut guest = Guest::new();
    let wrong = guest.header(Ports { host: 5, guest: 6 }, Op::Data);
    guest.driver.memory.write_slice(&wrong.to_bytes(), GuestAddress(PACKET)).unwrap();
    guest.driver.start_queues(3);
    for count in 1..=REFUSALS_MAX as u16 {
        guest.driver.offer_in(1, 0, &[(PACKET, 44, 0)]);
        guest.driver.wait_used_in(1, count);
    }
    guest.driver.offer_in(1, 0, &[(PACKET, 44, 0)]);
    // In the order of the devices' thread, after the packet above.
    guest.driver.offer_in(0, 0, &[(RECEIVED, ROOM, WRITE)]);
    guest.driver.wait_used_in(0, 1);
    guest.driver.wait_used_in(1, REFUSALS_MAX as u16 + 1);
}

#[test]
fn too_many_connections_are_closed() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> =
        (0..CONNECTIONS_MAX).map(|_| UnixStream::connect(&guest.path).unwrap()).collect();
    let mut late = UnixStream::connect(&guest.path).unwrap();
    assert!(at_end(&mut late));
    // One goes, and there is room for another.
    let mut first = streams.remove(0);
    first.write_all(b"!\n").unwrap();
    assert!(at_end(&mut first));
    guest.connect_to_guest(3);
}

#[test]
fn a_restored_guest_gets_a_reset_of_its_connections() {
    let mut guest = Guest::new();
    let (old, mut stream) = guest.connect_to_guest(1024);
    guest.driver.offer_in(2, 0, &[(EVENT, 4, WRITE)]);
    guest.driver.device.pause();
    let state = guest.driver.device.state();
    let (memory, path) = (Arc::clone(&guest.driver.memory), guest.path.clone());
    let saved = VirtioState::decode(&state).unwrap();
    assert_eq!(saved.encode(), state);
    let BackendState::Vsock(vsock) = &saved.device else { panic!("{saved:?}") };
    assert_eq!((vsock.guest_cid, &vsock.path), (CID, &path));
    let taken = VsockHost::bind(CID, &path).unwrap_err();
    assert!(matches!(taken, VsockError::Exists { .. }), "{taken}");
    let Guest { driver, _folder, taken, offered, forwarded, .. } = guest;
    drop(driver);
    assert!(at_end(&mut stream));
    assert!(!path.exists(), "the socket's name stays");

    let host = VsockHost::bind(CID + 1, &path).unwrap();
    let event_loop = EventLoop::start().unwrap();
    memory.write_obj(u32::MAX, GuestAddress(EVENT)).unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    writeln!(stream, "CONNECT 5").unwrap();
    let device = VirtioDevice::restore(&event_loop, saved.transport, Host::Vsock(host)).unwrap();
    let driver = Driver::attach(device, Arc::clone(&memory));
    let mut guest = Guest { driver, path, _folder, taken, offered, forwarded };
    assert_eq!(guest.driver.wait_used_in(2, 1), (0, 4));
    assert_eq!(memory.read_obj::<u32>(GuestAddress(EVENT)).unwrap(), 0);
    assert_eq!(guest.driver.get(0x100), CID as u32 + 1);
    assert_eq!(guest.driver.used_in(0), guest.taken, "a connection before the notice is taken");
    // The driver has handled it and offers the buffer again: now the waiting connection is made.
    guest.driver.offer_in(2, 0, &[(EVENT, 4, WRITE)]);
    guest.taken += 1;
    while guest.driver.used_in(0) < guest.taken {
        guest.driver.wait_for_interrupt();
    }
    assert_eq!(guest.driver.used_in(2), 1);
    // Packets of the old connection, and with the old context id, are refused.
    guest.send_data(old, b"?");
    guest.driver.wait_used_in(0, guest.taken + 1);
}

#[test]
fn a_reset_closes_connections_and_the_socket_stays() {
    let mut guest = Guest::new();
    guest.driver.offer_in(2, 0, &[(EVENT, 4, WRITE)]);
    guest.driver.device.pause();
    let state = guest.driver.device.state();
    let mut before = vec![0; BROKEN_GPA as usize];
    guest.driver.memory.read_slice(&mut before, GuestAddress(0)).unwrap();
    let (taken, offered, forwarded) = (guest.taken, guest.offered, guest.forwarded);
    guest.driver.device.resume();
    for _ in 0..3 {
        let (_, mut stream) = guest.connect_to_guest(1024);
        let (_, mut other) = guest.connect_to_guest(1025);
        guest.driver.device.pause();
        guest.driver.memory.write_slice(&before, GuestAddress(0)).unwrap();
        guest.driver.device.reset(&state, None).unwrap();
        guest.driver.drop_interrupts();
        (guest.taken, guest.offered, guest.forwarded) = (taken, offered, forwarded);
        guest.driver.device.resume();
        assert!(at_end(&mut stream));
        assert!(at_end(&mut other));
        // The driver gets the event, and offers its buffer again.
        assert_eq!(guest.driver.wait_used_in(2, 1), (0, 4));
        guest.driver.offer_in(2, 0, &[(EVENT, 4, WRITE)]);
    }
    assert!(guest.path.exists());
    guest.connect_to_guest(1024);
}

#[test]
fn vsocks_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        assert!(matches!(VsockHost::bind(cid, &path), Err(VsockError::Cid { .. })));
    }
    let long = folder.path().join("x".repeat(100));
    assert!(matches!(VsockHost::bind(3, &long), Err(VsockError::Name { .. })));
    let nowhere = folder.path().join("none/vsock");
    assert!(matches!(VsockHost::bind(3, &nowhere), Err(VsockError::Io { what: "bind", .. })));
    std::fs::write(&path, "").unwrap();
    assert!(matches!(VsockHost::bind(3, &path), Err(VsockError::Exists { .. })));
}
