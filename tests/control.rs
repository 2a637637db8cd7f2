//! The control socket of a running guest, and `snap create --vm`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::failing_restores::damage_later_half;
use crate::support::{Ran, SNAP, Sample, end_of, names, needs_vm, restore, signal, snap};

/// A hang guard.
const LONG: Duration = Duration::from_secs(60);

/// A guest that runs with a control socket; it is killed when this is dropped.
pub(crate) struct Vm {
    pub(crate) child: Option<Child>,
    lines: std::io::Lines<BufReader<ChildStdout>>,
    pub(crate) socket: PathBuf,
}

impl Vm {
    /// `snap ARGS --api FOLDER/api`; the guest runs when this returns.
    #[track_caller]
    pub(crate) fn start(folder: &Path, args: &[&str]) -> Vm {
        let mut vm = Vm::start_paused(folder, args);
        // The guest runs when it has printed something.
        vm.beats(1);
        vm
    }

    /// As above, for a guest that prints nothing yet.
    pub(crate) fn start_paused(folder: &Path, args: &[&str]) -> Vm {
        let socket = folder.join("api");
        let mut command = Command::new(SNAP);
        command.args(args).arg("--api").arg(&socket).stdin(Stdio::null());
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("snap starts");
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        Vm { child: Some(child), lines, socket }
    }

    #[track_caller]
    pub(crate) fn booted(folder: &Path) -> Vm {
        Vm::start(folder, &["run", "--memory", "64M", "--work", "8M"])
    }

    /// Reads a number of beats of the guest, all of which are ok.
    #[track_caller]
    pub(crate) fn beats(&mut self, count: usize) {
        let mut seen = 0;
        while seen < count {
            let line = self.lines.next().map(|line| line.expect("it can be read"));
            match line.as_deref() {
                Some(line) if line.starts_with("beat ") => {
                    assert!(line.ends_with(" ok"), "{line}");
                    seen += 1;
                }
                Some(_) => {}
                None => panic!("the guest has ended: {}", self.end().stderr),
            }
        }
    }

    /// The next line that the guest has written.
    #[track_caller]
    pub(crate) fn line(&mut self) -> String {
        match self.lines.next() {
            Some(line) => line.expect("it can be read"),
            None => panic!("the guest has ended: {}", self.end().stderr),
        }
    }

    pub(crate) fn connect(&self) -> UnixStream {
        connected(&self.socket)
    }

    /// One request: the status, and the JSON of the answer.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        ask(&self.socket, method, path, body)
    }

    /// Resumes the guest, unless the process has ended or ends before it answers.
    pub(crate) fn resume_if_alive(&self) {
        let request = "PATCH /vm HTTP/1.1\r\nConnection: close\r\nContent-Length: 19\r\n\r\n{\"state\":\"Resumed\"}";
        let resumed = UnixStream::connect(&self.socket).and_then(|mut stream| {
            stream.write_all(request.as_bytes())?;
            stream.read_to_string(&mut String::new())
        });
        drop(resumed);
    }

    fn state(&self) -> Value {
        self.ask("GET", "/vm", &Value::Null).1["state"].take()
    }

    #[track_caller]
    pub(crate) fn set(&self, state: &str) {
        assert_eq!(self.ask("PATCH", "/vm", &json!({ "state": state })).0, 204);
    }

    /// `snap create OUT --vm SOCKET`.
    pub(crate) fn create(&self, out: &Path, options: &[&str]) -> Ran {
        let args = ["create".as_ref(), out.as_os_str(), "--vm".as_ref(), self.socket.as_os_str()];
        snap(args.into_iter().chain(options.iter().map(std::ffi::OsStr::new)))
    }

    /// Waits for its end, and reads the rest of its output.
    pub(crate) fn end(&mut self) -> Ran {
        let child = self.child.take().expect("it ends once");
        let rest: Vec<_> = self.lines.by_ref().map_while(Result::ok).collect();
        let mut ran = Ran::from(end_of(child));
        ran.stdout = rest.join("\n");
        ran
    }

    /// The control socket answers before the guest has its first state.
    #[track_caller]
    pub(crate) fn wait_until_paused(&self) {
        let began = Instant::now();
        while self.state() != "Paused" {
            assert!(began.elapsed() < LONG, "it is {}", self.state());
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    pub(crate) fn interrupt(mut self) {
        signal(self.child.as_ref().expect("it runs").id(), "INT");
        self.end().failed(130, &["interrupted"]);
        assert!(!self.socket.exists());
    }
}

/// As [`Vm::ask`], of a guest that another process has started.
pub(crate) fn ask(socket: &Path, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    let mut stream = connected(socket);
    stream.write_all(request.as_bytes()).expect("it can be sent");
    answer(stream)
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Connects to a socket that will soon exist and listen.
#[track_caller]
fn connected(socket: &Path) -> UnixStream {
    let began = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(began.elapsed() < LONG, "{}: {error}", socket.display()),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn answer(mut stream: UnixStream) -> (u16, Value) {
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer comes");
    let (head, body) = text.split_once("\r\n\r\n").expect(&text);
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect(head);
    (status, serde_json::from_str(body).unwrap_or_default())
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

/// Restores it eagerly and lazily; it continues.
#[track_caller]
fn continues(file: &Path) {
    for mode in [&["--lazy", "--beats", "2"][..], &["--beats", "2"]] {
        let report = restore(file, mode).ok().report();
        assert_eq!((&report["beats"], &report["bad_beats"]), (&json!(2), &json!(0)));
    }
}

#[test]
fn a_guest_is_paused_and_resumed() {
    needs_vm!();
    let folder = folder();
    let mut vm = Vm::booted(folder.path());
    let mode = vm.socket.metadata().expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (status, state) = vm.ask("GET", "/", &Value::Null);
    assert_eq!((status, &state["state"]), (200, &json!("Running")), "{state}");
    assert_eq!((&state["app_name"], &state["memory_bytes"]), (&json!("snap"), &json!(64 << 20)));
    // The same request again has no effect.
    for _ in 0..2 {
        vm.set("Paused");
        assert_eq!(vm.state(), "Paused");
    }
    for _ in 0..2 {
        vm.set("Resumed");
        assert_eq!(vm.state(), "Running");
    }
    vm.beats(2);
    vm.set("Paused");
    // A paused guest can be interrupted.
    vm.interrupt();
}

/// A guest that waits to be resumed finds its working set loaded, under any load of the machine.
#[test]
fn a_guest_waits_while_its_working_set_is_loaded() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "32M"]);
    let trained = sample.folder.path().join("trained.snap");
    let file = trained.to_str().expect("a plain name");
    let args = ["train", sample.file.to_str().expect("a plain name"), "--beats", "1", "-o", file];
    snap(args).ok();
    let folder = folder();
    let faults = |prefetch: &str| {
        let args = ["restore", "--lazy", file, "--prefetch", prefetch, "--paused", "--beats", "1"];
        let mut vm = Vm::start_paused(folder.path(), &[&args[..], &["--report", "json"]].concat());
        vm.wait_until_paused();
        let began = Instant::now();
        let pager = |vm: &Vm| vm.ask("GET", "/stats", &Value::Null).1["pager"].take();
        while pager(&vm)["prefetch"] == "running" {
            assert!(began.elapsed() < LONG, "{}", pager(&vm));
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!((vm.state(), &pager(&vm)["faults"]), (json!("Paused"), &json!(0)));
        let loaded = pager(&vm)["installed"]["prefetched"].as_u64().expect("a number");
        vm.set("Resumed");
        let report = vm.end().ok().report();
        assert_eq!((&report["beats"], &report["bad_beats"]), (&json!(1), &json!(0)));
        (report["pager"]["faults"].as_u64().expect("a number"), loaded)
    };
    let (without, with) = (faults("off"), faults("hot"));
    assert_eq!(without.1, 0);
    // A beat reads a quarter of the 8192 pages.
    assert!(with.1 > 1500, "{with:?}");
    assert!(with.0 * 20 <= without.0, "{with:?}, {without:?} without");
    // A guest that no client resumes can be interrupted.
    let vm = Vm::start_paused(folder.path(), &["restore", file, "--paused"]);
    vm.wait_until_paused();
    vm.interrupt();
    snap(["restore", file, "--paused"]).failed(2, &["--api"]);
}

#[test]
fn a_running_guest_is_snapshotted_and_continues() {
    needs_vm!();
    let folder = folder();
    let mut vm = Vm::booted(folder.path());
    let file = folder.path().join("now.snap");
    let made = vm.create(&file, &["--json", "--codec", "lz4"]).ok().json();
    assert_eq!(made["parent_id"], Value::Null);
    assert_eq!(vm.state(), "Running");
    vm.beats(2);
    continues(&file);
    // Again, to the same name.
    vm.create(&file, &[]).failed(1, &["now.snap exists; give --force"]);
    vm.set("Paused");
    vm.create(&file, &["--force"]).ok();
    assert_eq!(vm.state(), "Paused");
    continues(&file);
    let diff = folder.path().join("diff.snap");
    vm.create(&diff, &["--diff"]).failed(1, &["was not restored from a snapshot"]);
    vm.set("Resumed");
    vm.beats(1);
    let last = folder.path().join("last.snap");
    vm.create(&last, &["--stop"]).ok();
    let ended = vm.end().ok();
    assert!(ended.stderr.contains("snapshotted and stopped"), "{}", ended.stderr);
    continues(&last);
    assert_eq!(names(folder.path()), ["last.snap", "now.snap"]);
}

/// A guest that was restored in each mode, snapshotted whole and as a layer at the same moment: both have the same
/// memory, both continue, and so does the guest.
#[test]
fn a_restored_guest_is_snapshotted_whole_and_as_a_layer() {
    needs_vm!();
    let sample = Sample::small();
    let base = sample.file.to_str().expect("a plain name");
    for mode in [&["--lazy"][..], &["--lazy", "--populate", "full"], &[]] {
        let folder = folder();
        let args: Vec<_> = ["restore", base].iter().chain(mode).copied().collect();
        let mut vm = Vm::start(folder.path(), &args);
        vm.set("Paused");
        let (whole, layer) = (folder.path().join("whole.snap"), folder.path().join("layer.snap"));
        vm.create(&whole, &[]).ok();
        let made = vm.create(&layer, &["--diff", "--json"]).ok().json();
        assert!(made["parent_id"].is_string(), "{made}");
        let diff = snap(["diff".as_ref(), whole.as_os_str(), layer.as_os_str(), "--json".as_ref()]);
        let diff = diff.ok().json();
        assert_eq!(diff["differing_pages"], 0, "{mode:?}: {diff}");
        vm.set("Resumed");
        vm.beats(2);
        continues(&whole);
        continues(&layer);
        // The file from which the guest runs is not replaced.
        vm.create(&sample.file, &["--force"]).failed(1, &["is the input, or a parent of it"]);
        vm.interrupt();
    }
}

#[test]
fn a_clone_with_shared_pages_is_snapshotted_too() {
    needs_vm!();
    let sample = Sample::small();
    let base = sample.file.to_str().expect("a plain name");
    let folder = folder();
    let socket = folder.path().join("serve");
    let server = serve(base, &socket);
    let share = socket.to_str().expect("a plain name");
    let mut vm = Vm::start(folder.path(), &["restore", "--lazy", "--share", share, base]);
    vm.set("Paused");
    let (whole, layer) = (folder.path().join("whole.snap"), folder.path().join("layer.snap"));
    vm.create(&whole, &[]).ok();
    vm.create(&layer, &["--diff"]).ok();
    let args = ["diff".as_ref(), whole.as_os_str(), layer.as_os_str(), "--json".as_ref()];
    let diff = snap(args).ok().json();
    assert_eq!(diff["differing_pages"], 0, "{diff}");
    vm.set("Resumed");
    vm.beats(2);
    continues(&whole);
    continues(&layer);
    vm.interrupt();
    signal(server.id(), "INT");
    end_of(server);
}

/// `snap serve` of a file, ready for connections.
fn serve(file: &str, socket: &Path) -> Child {
    let mut server = Command::new(SNAP);
    server.args(["serve", file, "--listen"]).arg(socket);
    let server = crate::support::start(server);
    // A client that has disconnected.
    drop(connected(socket));
    server
}

/// A server, and a clone of its guest that waits to be resumed.
fn waiting_clone(folder: &Path, sample: &Sample) -> (Child, Vm) {
    let base = sample.file.to_str().expect("a plain name");
    let socket = folder.join("serve");
    let server = serve(base, &socket);
    let share = socket.to_str().expect("a plain name");
    let args = ["restore", "--lazy", "--share", share, base, "--paused"];
    let vm = Vm::start_paused(folder, &args);
    vm.wait_until_paused();
    (server, vm)
}

#[test]
fn a_waiting_clone_ends_with_its_server() {
    needs_vm!();
    let sample = Sample::small();
    let folder = folder();
    let (server, mut vm) = waiting_clone(folder.path(), &sample);
    signal(server.id(), "KILL");
    end_of(server);
    vm.end().failed(5, &["guest stopped", "the page server has ended"]);
}

/// A snapshot of a clone loads all of its pages. An unreadable one ends the snapshot, and the guest, with its cause.
#[test]
fn a_clone_with_a_damaged_page_is_not_snapshotted() {
    needs_vm!();
    let sample = Sample::small();
    damage_later_half(&sample);
    let folder = folder();
    let (server, mut vm) = waiting_clone(folder.path(), &sample);
    vm.create(&folder.path().join("whole.snap"), &[]).failed(1, &["cannot read guest memory"]);
    vm.end().failed(5, &["guest stopped", "checksum expected"]);
    assert_eq!(names(folder.path()), ["serve"]);
    signal(server.id(), "INT");
    end_of(server);
}

#[test]
fn impossible_requests_are_refused() {
    needs_vm!();
    let folder = folder();
    let vm = Vm::booted(folder.path());
    let other = snap(["run".as_ref(), "--api".as_ref(), vm.socket.as_os_str()]);
    other.failed(1, &["cannot listen at", "a server is listening there"]);
    let missing = folder.path().join("missing");
    let out = folder.path().join("out.snap");
    let args = ["create".as_ref(), out.as_os_str(), "--vm".as_ref(), missing.as_os_str()];
    snap(args).failed(1, &["cannot ask the guest at", "missing", "No such file"]);
    let elsewhere = Path::new("/nonexistent/out.snap");
    vm.create(elsewhere, &[]).failed(1, &["cannot create /nonexistent/out.snap"]);
    vm.create(&out, &["--when", "after:1s"]).failed(2, &["cannot be used with"]);
    for arg in [["--memory", "64M"], ["--kernel", "k"], ["--from", "b"]] {
        vm.create(&out, &arg).failed(2, &["cannot be used with"]);
    }
    assert_eq!(names(folder.path()), ["api"]);
    vm.interrupt();
}

/// Clients that send nothing, garbage, or half of a request, more of them than the limit of connections.
#[test]
fn hostile_clients_delay_no_others() {
    needs_vm!();
    let folder = folder();
    let mut vm = Vm::booted(folder.path());
    let mut half: Vec<UnixStream> = Vec::new();
    for n in 0..40 {
        let mut stream = vm.connect();
        let sent: &[u8] = match n % 4 {
            0 => b"",
            1 => b"PATCH /vm HTTP/1.1\r\nContent-Len",
            2 => b"PUT /snapshot/create HTTP/1.1\r\nContent-Length: 60000\r\n\r\n{",
            _ => &[0xff; 20000],
        };
        // It may have been disconnected already.
        let _ = stream.write_all(sent);
        half.push(stream);
        if n % 10 == 9 {
            assert_eq!(vm.state(), "Running");
        }
    }
    vm.beats(2);
    vm.set("Paused");
    vm.set("Resumed");
    let (status, fault) = vm.ask("PUT", "/snapshot/create", &json!({ "snapshot_path": "x" }));
    assert_eq!(status, 400);
    assert!(fault["fault_message"].as_str().expect("a text").contains("relative"), "{fault}");
    let address = json!({ "snapshot_path": "s3://bucket/guest" });
    let (status, fault) = vm.ask("PUT", "/snapshot/create", &address);
    assert_eq!(status, 400);
    assert!(fault["fault_message"].as_str().expect("a text").contains("address"), "{fault}");
    vm.interrupt();
}

/// A client that disconnects in the middle leaves no file, and the guest continues.
#[test]
fn a_client_that_disconnects_gets_no_file() {
    needs_vm!();
    let folder = folder();
    let mut vm = Vm::start(folder.path(), &["run", "--memory", "512M", "--work", "384M"]);
    let out = folder.path().join("out.snap");
    // Long enough to be cancelled: seconds, with this level.
    let body = json!({ "snapshot_path": out, "codec": "zstd", "level": 19, "threads": 1 });
    let body = body.to_string();
    let mut client = vm.connect();
    let head = "PUT /snapshot/create HTTP/1.1\r\nContent-Length: ";
    let request = format!("{head}{}\r\n\r\n{body}", body.len());
    client.write_all(request.as_bytes()).expect("it can be sent");
    while vm.ask("GET", "/vm", &Value::Null).1["storing"].is_null() {
        thread::yield_now();
    }
    // Other clients get the error that it is busy, immediately.
    let (status, fault) = vm.ask("PATCH", "/vm", &json!({ "state": "Paused" }));
    assert_eq!((status, &fault["fault_message"]), (409, &json!("the guest is being snapshotted")));
    drop(client);
    while !vm.ask("GET", "/vm", &Value::Null).1["storing"].is_null() {
        thread::yield_now();
    }
    vm.beats(1);
    assert_eq!(names(folder.path()), ["api"]);
    vm.interrupt();
}

/// Pages that it has not written are only in the image.
#[test]
fn a_guest_that_runs_from_a_raw_image_is_snapshotted_whole() {
    needs_vm!();
    let sample = Sample::small();
    let folder = folder();
    let (image, stored) = (folder.path().join("memory.raw"), folder.path().join("now.snap"));
    let file = sample.file.to_str().expect("a plain name");
    let raw = image.to_str().expect("a plain name");
    snap(["export", file, "--format", "raw", "-o", raw]).ok();
    let mut vm = Vm::start(folder.path(), &["restore", file, "--image", raw]);
    vm.beats(1);
    vm.create(&stored, &[]).ok();
    vm.beats(1);
    std::fs::File::options()
        .write(true)
        .open(&image)
        .expect("it opens")
        .set_len(64 << 20)
        .expect("touched");
    let mixed = folder.path().join("mixed.snap");
    vm.create(&mixed, &[]).failed(1, &["memory.raw", "was changed after it was opened"]);
    assert!(!mixed.exists());
    // The run fails, too.
    signal(vm.child.as_ref().expect("it runs").id(), "INT");
    vm.end().failed(1, &["may have run from two images"]);
    let report = restore(&stored, &["--beats", "2"]).ok().report();
    assert_eq!((&report["beats"], &report["bad_beats"]), (&json!(2), &json!(0)));
}
