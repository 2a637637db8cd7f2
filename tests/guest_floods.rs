//! Guests that flood their host: the serial port, virtqueues, connections of a vsock. The memory of the process stays
//! bounded, and its control socket answers.

use std::fs;
use std::io::Read;
use std::ops::RangeBounds;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control::ask;
use crate::hostile_sockets::peak_bytes;
use crate::kernel;
use crate::support::{SNAP, needs_vm, signal};
use crate::virtio_guest::{AVAILABLE, DESCRIPTORS, DEVICE, USED, WRITE, set, start};

/// The control socket answers within this time, and a pause takes at most as long.
const PROMPTLY: Duration = Duration::from_secs(1);
/// How long each guest floods.
const FLOOD: Duration = Duration::from_secs(2);
/// The process may grow by this during the flood: threads of the control socket, and the few pages that the guest touches.
const GROWTH_BYTES: u64 = 8 << 20;
/// A hang guard.
const LONG: Duration = Duration::from_secs(60);

const COUNT: u32 = 0x34_0000;
const BUFFER: u32 = 0x35_0000;

/// An endless loop of `body`; each 64 rounds it prints a dot.
fn endless(body: &[u8]) -> Vec<u8> {
    let mut code = body.to_vec();
    // inc dword [COUNT]; test byte [COUNT], 63; jnz to the start
    code.extend([&[0xff, 0x05][..], &COUNT.to_le_bytes()].concat());
    code.extend([&[0xf6, 0x05][..], &COUNT.to_le_bytes(), &[63]].concat());
    let back = |code: &[u8], len: usize| (-((code.len() + len) as i32)).to_le_bytes();
    let to = back(&code, 6);
    code.extend([&[0x0f, 0x85][..], &to].concat());
    // mov dx, 0x3f8; mov al, '.'; out dx, al; jmp to the start
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee]);
    let to = back(&code, 5);
    code.extend([&[0xe9][..], &to].concat());
    code
}

/// Offers one buffer again and again. A guest that is `patient` waits until the device has returned it.
fn requests(queue: u32, buffer: (u32, u32, u32), before: &[u8], patient: bool) -> Vec<u8> {
    let (gpa, len, flags) = buffer;
    let descriptor = [(0, gpa), (4, 0), (8, len), (12, flags)];
    let descriptor = descriptor.map(|(offset, value)| set(DESCRIPTORS + offset, value)).concat();
    // inc word [available index]; notify
    let mut body = before.to_vec();
    body.extend([&[0x66, 0xff, 0x05][..], &(AVAILABLE + 2).to_le_bytes()].concat());
    body.extend(set(DEVICE + 0x50, queue));
    if patient {
        // 1: mov ax, [available index]; cmp ax, [used index]; jne 1b
        body.extend([&[0x66, 0xa1][..], &(AVAILABLE + 2).to_le_bytes()].concat());
        body.extend([&[0x66, 0x3b, 0x05][..], &(USED + 2).to_le_bytes()].concat());
        body.extend([0x75, 0xf1]);
    }
    [descriptor, endless(&body)].concat()
}

/// Each guest takes a CPU or two: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

struct Flooding {
    _alone: MutexGuard<'static, ()>,
    folder: tempfile::TempDir,
    child: Option<Child>,
    printed: Arc<AtomicU64>,
}

impl Flooding {
    /// Boots a guest with this code. Its output is read; FOLDER stands for the folder.
    fn start(folder: tempfile::TempDir, code: &[u8], options: &str) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let path = folder.path().display().to_string();
        fs::write(folder.path().join("kernel"), kernel::elf(code, true, 0)).expect("written");
        let line = format!("run --memory 32M --api FOLDER/api --kernel FOLDER/kernel {options}");
        let mut command = Command::new(SNAP);
        command.args(line.split_whitespace().map(|word| word.replace("FOLDER", &path)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("snap starts");
        let mut output = child.stdout.take().expect("it is piped");
        let printed = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&printed);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = output.read(&mut bytes) {
                count.fetch_add(len as u64, Ordering::SeqCst);
            }
        });
        Self { _alone: alone, folder, child: Some(child), printed }
    }

    fn printed(&self) -> u64 {
        self.printed.load(Ordering::SeqCst)
    }

    /// Checks the process while its guest floods. `printed` is how many bytes the guest may have printed at the end: at
    /// least as many as a flood has, and of a guest that has to wait for its host at most as many as it had room for.
    #[track_caller]
    fn stays_bounded(mut self, expected: impl RangeBounds<u64>) {
        let socket = self.folder.path().join("api");
        let process = self.child.as_ref().expect("it runs").id();
        let began = Instant::now();
        while self.printed() == 0 || !socket.exists() {
            assert!(began.elapsed() < LONG, "the guest prints nothing: {}", self.end());
            std::thread::sleep(Duration::from_millis(5));
        }
        let before = peak_bytes(process);
        let began = Instant::now();
        let mut state = "Paused";
        while began.elapsed() < FLOOD {
            prompt(&socket, "GET", "/vm", &Value::Null);
            prompt(&socket, "GET", "/stats", &Value::Null);
            prompt(&socket, "PATCH", "/vm", &json!({ "state": state }));
            state = if state == "Paused" { "Resumed" } else { "Paused" };
            std::thread::sleep(Duration::from_millis(100));
        }
        let grown = peak_bytes(process).saturating_sub(before);
        assert!(grown <= GROWTH_BYTES, "it has grown by {grown} bytes");
        let printed = self.printed();
        assert!(expected.contains(&printed), "{printed} bytes are printed");
        signal(process, "INT");
        let error = self.end();
        assert!(error.contains("interrupted") && !error.contains("panicked"), "{error}");
    }

    /// What it has printed on stderr. It is killed if it does not end.
    fn end(&mut self) -> String {
        let Some(child) = self.child.take() else { return String::new() };
        String::from_utf8_lossy(&crate::support::end_of(child).stderr).into_owned()
    }
}

impl Drop for Flooding {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[track_caller]
fn prompt(socket: &Path, method: &str, path: &str, body: &Value) {
    let began = Instant::now();
    let (status, answer) = ask(socket, method, path, body);
    assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
    assert!(began.elapsed() < PROMPTLY, "{method} {path} took {:?}", began.elapsed());
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// Bytes one by one, and 64 KiB with one instruction; no line has an end.
#[test]
fn of_the_serial_port() {
    needs_vm!();
    // mov dx, 0x3f8; mov al, 'x'; 1: out dx, al; jmp 1b
    let single = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd];
    Flooding::start(folder(), &single, "").stays_bounded(10_000..);
    // mov dx, 0x3f8; 1: mov esi, LOAD_GPA; mov ecx, 0x10000; rep outsb; jmp 1b
    let [a, b, c, d] = kernel::LOAD_GPA.to_le_bytes();
    let many = [0x66, 0xba, 0xf8, 0x03, 0xbe, a, b, c, d, 0xb9, 0, 0, 1, 0, 0xf3, 0x6e, 0xeb, 0xf2];
    Flooding::start(folder(), &many, "").stays_bounded(10_000..);
}

/// Free pages that are reported again and again; an available ring that runs ahead of its size.
#[test]
fn of_a_balloon() {
    needs_vm!();
    let (reporting, queue) = (1 << 5, 2);
    let range = (BUFFER, 64 << 10, WRITE);
    for (patient, least) in [(true, 10), (false, 1)] {
        let code = [start(reporting, queue), requests(queue, range, &[], patient)].concat();
        Flooding::start(folder(), &code, "--balloon").stays_bounded(least..);
    }
}

/// Random bytes without an end, and notifications without requests.
#[test]
fn of_a_queue_for_random_bytes() {
    needs_vm!();
    for (patient, least) in [(true, 10), (false, 1)] {
        let code = [start(0, 0), requests(0, (BUFFER, 64 << 10, WRITE), &[], patient)].concat();
        Flooding::start(folder(), &code, "--rng").stays_bounded(least..);
    }
    let notify = [start(0, 0), endless(&set(DEVICE + 0x50, 0))].concat();
    Flooding::start(folder(), &notify, "--rng").stays_bounded(10..);
}

/// A request for a connection from port 1000 of the guest to port 1234 of the host.
fn connection_request() -> Vec<u8> {
    let words = [3, 0, 2, 0, 1000, 1234, 0, 1 | 1 << 16, 0, 64 << 10, 0];
    (0..).zip(words).flat_map(|(at, word)| set(BUFFER + 4 * at, word)).collect()
}

/// A guest that sends packets. It gives the device no buffers for answers, so the device has to keep or drop them.
fn packets(before: &[u8], patient: bool) -> Vec<u8> {
    let sent = requests(1, (BUFFER, 44, 0), before, patient);
    [start(0, 1), connection_request(), sent].concat()
}

/// Connections that are opened and reset, that stay open, and that nothing on the host accepts.
#[test]
fn of_vsock_connections() {
    needs_vm!();
    // xor byte [op], 2: a request, a reset, and so on. The first one is a reset.
    let again = [&[0x80, 0x35][..], &(BUFFER + 30).to_le_bytes(), &[2]].concat();
    // inc dword [source port]
    let more = [&[0xff, 0x05][..], &(BUFFER + 16).to_le_bytes()].concat();
    // A dot is 64 rounds: 256 connections and 64 refusals, which the guest has to take, are 5 dots.
    for (before, accepts, patient, dots) in [
        (&again, true, true, 6..=u64::MAX),
        (&more, true, true, 1..=5),
        (&more, false, true, 1..=5),
        (&more, true, false, 1..=u64::MAX),
    ] {
        let folder = folder();
        let listener = UnixListener::bind(folder.path().join("vsock_1234")).expect("it is free");
        let kept = listener.try_clone().expect("a descriptor is free");
        if accepts {
            std::thread::spawn(move || {
                let mut open = Vec::new();
                for stream in listener.incoming().flatten() {
                    open.push(stream);
                    if open.len() > 512 {
                        open.clear();
                    }
                }
            });
        }
        let code = packets(before, patient);
        Flooding::start(folder, &code, "--vsock 3,FOLDER/vsock").stays_bounded(dots);
        drop(kept);
    }
}
