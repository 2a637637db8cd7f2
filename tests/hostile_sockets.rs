//! Hostile clients of each socket: the control socket of a guest, the figures of a page server, the page server, the
//! keeper. Their messages are mutations of good ones, from a fixed seed: `$SNAP_HOSTILE_INPUTS` for each socket.
//!
//! After each group of them, a good client is answered, the guest still runs, the process has not grown, and it has not
//! printed a panic.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use serde_json::Value;

use crate::control::{Vm, ask};
use crate::support::{Sample, needs_vm, signal};
use crate::talking::Talking;

/// After this many inputs, a good client is asked, and the connections are closed.
const GROUP: usize = 50;
/// A hang guard.
const LONG: Duration = Duration::from_secs(60);
/// The process may grow by this: one message of each connection of a group, and threads for them.
const GROWTH_BYTES: u64 = 128 << 20;

fn inputs() -> usize {
    std::env::var("SNAP_HOSTILE_INPUTS").ok().and_then(|inputs| inputs.parse().ok()).unwrap_or(300)
}

/// xorshift64: the same inputs in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }

    /// A message, with one to three mutations; one in eight is not changed.
    fn mutated(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        if self.below(8) == 0 {
            return bytes;
        }
        for _ in 0..=self.below(3) {
            let (at, other) = (self.below(bytes.len()), self.below(bytes.len()));
            let (start, end) = (at.min(other), at.max(other));
            match self.below(8) {
                0 => bytes.truncate(at),
                1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (at % 8)),
                2 => drop(bytes.drain(start..end)),
                3 => {
                    let part = bytes[start..end].repeat(1 + at % 40);
                    bytes.splice(start..start, part);
                }
                4 => drop(bytes.splice(at..at, self.hostile_number().into_bytes())),
                5 => {
                    // A number of the message is replaced.
                    let is_digit = |byte: &u8| byte.is_ascii_digit();
                    if let Some(first) = bytes[at.min(bytes.len())..].iter().position(is_digit) {
                        let first = at + first;
                        let len = bytes[first..].iter().take_while(|byte| is_digit(byte)).count();
                        bytes.splice(first..first + len, self.hostile_number().into_bytes());
                    }
                }
                6 => bytes.extend(std::iter::repeat_n(b'A' + (at % 60) as u8, 1 << self.below(18))),
                _ => bytes.extend_from_slice(seed),
            }
        }
        bytes
    }

    fn hostile_number(&mut self) -> String {
        let numbers =
            ["0", "-1", "4095", "4294967296", "9223372036854775807", "18446744073709551615"];
        let others =
            ["18446744073709551616", "1e999", "0x10", "00000000000000000000001", "9e9", " 5"];
        self.of(&[numbers, others].concat()).to_owned()
    }
}

/// Sends a message in a few parts. The server may refuse it before its end.
fn send(stream: &mut (impl Write + ?Sized), bytes: &[u8], random: &mut Random) {
    let parts = 1 + random.below(4);
    for part in bytes.chunks(bytes.len().div_ceil(parts).max(1)) {
        if stream.write_all(part).is_err() {
            return;
        }
    }
}

/// The most memory that a process has had.
pub(crate) fn peak_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux has it");
    peak.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Sends all inputs by `hostile`, and asks by `good` after each group.
fn storm<T>(process: u32, mut hostile: impl FnMut(&mut Random) -> Option<T>, good: impl Fn()) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    good();
    let before = peak_bytes(process);
    let mut open = Vec::new();
    for number in 1..=inputs() {
        open.extend(hostile(&mut random));
        if number % GROUP == 0 {
            let began = Instant::now();
            good();
            assert!(began.elapsed() < LONG, "a good client waits for {:?}", began.elapsed());
            open.clear();
        }
    }
    let grown = peak_bytes(process).saturating_sub(before);
    assert!(grown <= GROWTH_BYTES, "it has grown by {grown} bytes");
}

/// No path in them is absolute, so no mutation creates a file.
const REQUESTS: [&str; 10] = [
    "GET /vm HTTP/1.1\r\nHost: x\r\n\r\n",
    "PATCH /vm HTTP/1.1\r\nContent-Length: 19\r\n\r\n{\"state\":\"Resumed\"}",
    // Two lengths, a length beside chunks, chunks: how another parser would see a second request in the first.
    "PATCH /vm HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 19\r\n\r\n{\"state\":\"Resumed\"}",
    "PUT /snapshot/create HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    "PUT /snapshot/create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{\r\n0\r\n\r\n",
    "PUT /snapshot/create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 65537\r\n\r\n{\"snapshot_path\":\"x\"}",
    "PUT /snapshot/create HTTP/1.1\r\nContent-Length: 34\r\n\r\n{\"snapshot_path\":\"x\",\"type\":\"live\"}",
    "GET /vm HTTP/1.1\r\n\r\nGET /vm HTTP/1.1\r\n\r\nGET /vm HTTP/1.1\r\n\r\n",
    "GET /metrics HTTP/1.0\r\nHost: \u{1b}[31m\r\nConnection: close\r\n folded: x\r\n\r\n",
    "DELETE /snapshot HTTP/1.1\nContent-Length: 0\n\n",
];

#[test]
fn hostile_clients_of_a_guest() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let mut vm = Vm::booted(folder.path());
    let process = vm.child.as_ref().expect("it runs").id();
    let socket = vm.socket.clone();
    let hostile = |random: &mut Random| {
        let request = random.of(&REQUESTS);
        let mut stream = vm.connect();
        let bytes = random.mutated(request.as_bytes());
        stream.set_write_timeout(Some(LONG)).expect("it can be set");
        send(&mut stream, &bytes, random);
        Some(stream)
    };
    storm(process, hostile, || {
        // The limit of connections may be reached for a moment.
        let (status, state) = ask(&socket, "GET", "/vm", &Value::Null);
        assert!(status == 200 && state["state"].is_string(), "{status} {state}");
    });
    // No mutation pauses it.
    vm.beats(2);
    vm.interrupt();
}

/// A page server with figures, its guest, and the address of the figures.
fn page_server(sample: &Sample) -> (Talking, String) {
    let mut serve = vec!["serve".into(), sample.file.clone().into_os_string(), "--listen".into()];
    serve.extend([sample.folder.path().join("pages").into_os_string()]);
    serve.extend(["--metrics".into(), "0".into()]);
    let mut server = Talking::snap(serve);
    let line = server.prints(&["http://"]);
    let (_, at) = line.split_once("http://").expect("it was looked for");
    let address = at.split("/metrics").next().expect("a first part").to_owned();
    (server, address)
}

fn figures(address: &str) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(LONG)).expect("it can be set");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("it is taken");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

#[test]
fn hostile_clients_of_the_figures() {
    needs_vm!();
    let sample = Sample::small();
    let (server, address) = page_server(&sample);
    let hostile = |random: &mut Random| {
        let request = random.of(&REQUESTS);
        let mut stream = TcpStream::connect(&address).ok()?;
        let bytes = random.mutated(request.as_bytes());
        stream.set_write_timeout(Some(LONG)).expect("it can be set");
        send(&mut stream, &bytes, random);
        Some(stream)
    };
    storm(server.id(), hostile, || figures(&address));
    ends(server);
}

/// The handshakes of Firecracker and of a clone, and a request for the figures.
const HANDSHAKES: [&str; 6] = [
    r#"[{"base_host_virt_addr":139637976727552,"size":67108864,"offset":0,"page_size":4096}]"#,
    r#"[{"base_host_virt_addr":139637976727552,"size":33554432,"offset":0,"page_size_kib":4096},{"base_host_virt_addr":139638010281984,"size":33554432,"offset":33554432,"page_size_kib":4096}]"#,
    "{\"share\":{\"layers\":[\"66b28cba-8ddd-4f9c-9598-f9e0bba3ba2c\"],\"memory_bytes\":67108864}}\n",
    "{\"stats\":{}}\n",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    "[]",
];

/// Descriptors of other kinds than a userfaultfd.
struct Wrong([OwnedFd; 3]);

impl Wrong {
    fn new() -> Self {
        let (reader, _) = std::io::pipe().expect("two descriptors are free");
        let null = File::open("/dev/null").expect("it exists");
        let (socket, _) = UnixStream::pair().expect("two descriptors are free");
        Self([reader.into(), null.into(), socket.into()])
    }

    /// From none to ten of them.
    fn some(&self, random: &mut Random) -> Vec<BorrowedFd<'_>> {
        let count = [0, 1, 1, 1, 2, 10][random.below(6)];
        (0..count).map(|number| self.0[number % 3].as_fd()).collect()
    }
}

fn send_with(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(10))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(descriptors.is_empty() || control.push(SendAncillaryMessage::ScmRights(descriptors)));
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

const CLIENT: &str = "SNAP_HOSTILE_CLIENT";

/// One client of a page server, in a process of its own: a server kills a guest that it refuses, because its faults would
/// never be answered. `$SNAP_HOSTILE_CLIENT` is a seed and the socket.
#[test]
#[ignore = "the other tests start it"]
fn hostile_client() {
    let Ok(client) = std::env::var(CLIENT) else { return };
    let (seed, socket) = client.split_once(' ').expect("a seed and a socket");
    let (mut random, wrong) = (Random(seed.parse().expect("a number")), Wrong::new());
    let handshake = random.of(&HANDSHAKES);
    let mut stream = UnixStream::connect(socket).expect("it listens");
    stream.set_write_timeout(Some(LONG)).expect("it can be set");
    let bytes = random.mutated(handshake.as_bytes());
    let (first, rest) = bytes.split_at(random.below(bytes.len() + 1));
    // An empty message has no descriptors.
    if !first.is_empty() && send_with(&stream, first, &wrong.some(&mut random)).is_ok() {
        send(&mut stream, rest, &mut random);
    }
    // The connection stays open until this process is killed.
    std::thread::sleep(LONG);
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // The server may have killed it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn hostile_clients_of_a_page_server() {
    needs_vm!();
    let sample = Sample::small();
    let (server, address) = page_server(&sample);
    let socket = sample.folder.path().join("pages");
    let share = socket.to_str().expect("text");
    let hostile = |random: &mut Random| {
        let mut client = Command::new(std::env::current_exe().expect("this program"));
        client.args(["--ignored", "--exact", "hostile_sockets::hostile_client"]);
        client.env(CLIENT, format!("{} {share}", random.next() | 1));
        client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Some(Killed(client.spawn().expect("it starts")))
    };
    storm(server.id(), hostile, || {
        figures(&address);
        sample.restore(&["--lazy", "--share", share, "--beats", "1"]).ok();
    });
    ends(server);
}

const OF_SERVERS: [&str; 4] = [
    r#"{"hello":{"version":3,"snapshot":{"layers":["66b28cba-8ddd-4f9c-9598-f9e0bba3ba2c"],"memory_bytes":67108864},"on_error":"kill","path":[47,120]}}"#,
    r#"{"take":{"id":1}}"#,
    r#"{"listen":{"identity":[1,2],"passed":false}}"#,
    r#"{"keep":{"id":1,"shares":false,"connection":null}}"#,
];

#[test]
fn hostile_servers_of_a_keeper() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, wrong) = (folder.path().join("keep"), Wrong::new());
    let mut keeper = Talking::snap(["keep".as_ref(), "--listen".as_ref(), socket.as_os_str()]);
    keeper.prints(&["keeping at"]);
    let hostile = |random: &mut Random| {
        let stream = packets(&socket);
        for _ in 0..=random.below(3) {
            let message = random.of(&OF_SERVERS);
            let bytes = random.mutated(message.as_bytes());
            // A packet that is too long is not sent.
            let _ = send_with(&stream, &bytes, &wrong.some(random));
        }
        Some(stream)
    };
    // A keeper has no figures: it takes another connection, and answers a server of another version.
    storm(keeper.id(), hostile, || {
        let stream = packets(&socket);
        let hello = OF_SERVERS[0].replace("\"version\":3", "\"version\":2");
        send_with(&stream, hello.as_bytes(), &[]).expect("it is taken");
        let mut answer = [0; 4096];
        let received = rustix::net::recv(&stream, &mut answer[..], rustix::net::RecvFlags::empty());
        let (len, _) = received.expect("an answer");
        assert!(len > 0, "the keeper has closed the connection");
    });
    ends(keeper);
}

fn packets(socket: &Path) -> OwnedFd {
    let kind = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    let stream = rustix::net::socket_with(AddressFamily::UNIX, kind.0, kind.1, None);
    let stream = stream.expect("a descriptor is free");
    let address = SocketAddrUnix::new(socket).expect("a short path");
    rustix::net::connect(&stream, &address).expect("it listens");
    let timeout = Some(LONG);
    for direction in [rustix::net::sockopt::Timeout::Recv, rustix::net::sockopt::Timeout::Send] {
        rustix::net::sockopt::set_socket_timeout(&stream, direction, timeout)
            .expect("it can be set");
    }
    stream
}

/// It ends on SIGTERM, and has not printed a panic.
#[track_caller]
fn ends(process: Talking) {
    signal(process.id(), "TERM");
    let ran = process.end();
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}
