//! `snap serve` through the program: its socket, and clones that share memory. Firecracker's handshake is tested with
//! the library.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::json;
use snapfmt::{PageEntry, PageIndex, Snapshot};

use crate::failing_restores::damage_later_half;
use crate::support::{Ran, SNAP, Sample, end_of, needs_vm, restore, signal, snap, start};
use crate::talking::Talking;

/// A listening server, and its later lines on stderr.
pub(crate) struct Serving {
    server: Child,
    pub(crate) socket: PathBuf,
    first: String,
    lines: Receiver<String>,
}

impl Serving {
    pub(crate) fn start(sample: &Sample) -> Serving {
        Serving::with(sample, &[])
    }

    fn with(sample: &Sample, options: &[&str]) -> Serving {
        let socket = sample.folder.path().join("pages.sock");
        let mut command = Command::new(SNAP);
        command.arg("serve").arg(&sample.file).arg("--listen").arg(&socket).args(options);
        let mut server = start(command);
        let mut lines = BufReader::new(server.stderr.take().expect("a pipe")).lines();
        let first = lines.next().expect("it prints a line").expect("text");
        assert!(first.starts_with("serving "), "{first}");
        let (sender, received) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Serving { server, socket, first, lines: received }
    }

    /// Restores a guest that shares its pages by this server.
    #[track_caller]
    fn restore(&self, file: &Path, options: &[&str]) -> Ran {
        let share = ["--lazy", "--share", self.socket.to_str().expect("text")];
        restore(file, &[&share, options].concat())
    }

    /// The next line with this text.
    #[track_caller]
    fn prints(&self, what: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(60)).expect("another line");
            if line.contains(what) {
                return line;
            }
        }
    }

    #[track_caller]
    pub(crate) fn end(self, signal_name: &str) -> Option<i32> {
        signal(self.server.id(), signal_name);
        end_of(self.server).status.code()
    }
}

#[test]
fn the_socket_is_private_kept_and_replaced() {
    needs_vm!();
    let sample = Sample::small();
    let serving = Serving::start(&sample);
    let socket = serving.socket.clone();
    let mode = socket.symlink_metadata().expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    snap(["serve".as_ref(), sample.file.as_os_str(), "--listen".as_ref(), socket.as_os_str()])
        .failed(1, &["pages.sock: a server is listening there"]);
    // Figures, by the same socket.
    let mut stream = UnixStream::connect(&socket).expect("it listens");
    std::io::Write::write_all(&mut stream, b"{\"stats\":{}}\n").expect("it is taken");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).expect("an answer");
    assert_eq!(line, "[]\n");
    assert_eq!(serving.end("TERM"), Some(130));
    assert!(!socket.exists());

    // A server that was killed leaves its socket; the next one takes it over.
    Serving::start(&sample).end("KILL");
    assert!(socket.exists());
    assert_eq!(Serving::start(&sample).end("INT"), Some(130));
}

#[test]
fn a_socket_can_be_given_to_other_users_who_are_allowed() {
    needs_vm!();
    let sample = Sample::small();
    let socket = sample.folder.path().join("pages.sock");
    let refused = |owner: &str, why: &str| {
        let mut command = Command::new(SNAP);
        command.arg("serve").arg(&sample.file).arg("--listen").arg(&socket);
        command.args(["--socket-owner", owner]);
        crate::support::run(command).failed(if owner == "4321" { 1 } else { 2 }, &[why]);
        assert!(!socket.exists());
    };
    refused("4321", "user 4321, who is not served: add --allow-uid 4321");
    refused("me", "id -u NAME");
    let serving = Serving::with(&sample, &["--socket-mode", "0666", "--allow-gid", "4322"]);
    let mode = socket.symlink_metadata().expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    assert_eq!(serving.end("TERM"), Some(130));
    if rustix::process::geteuid().is_root() {
        let owner = ["--allow-uid", "4321", "--socket-owner", "4321:4322"];
        let serving = Serving::with(&sample, &owner);
        let found = socket.symlink_metadata().expect("it is there");
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (4321, 4322, 0o600));
        assert_eq!(serving.end("TERM"), Some(130));
    }
}

/// What systemd does: it listens, passes the socket as descriptor 3, and waits for READY=1.
#[test]
fn a_service_manager_passes_the_socket_and_is_notified() {
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let (socket, notified) = (folder.join("pages.sock"), folder.join("notify.sock"));
    let manager = UnixListener::bind(&socket).expect("it binds");
    let notices = UnixDatagram::bind(&notified).expect("it binds");
    notices.set_read_timeout(Some(Duration::from_secs(60))).expect("it can be set");
    let abstract_name = format!("snap-notify-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&abstract_name).expect("it is short");
    let abstract_notices = UnixDatagram::bind_addr(&address).expect("the name is free");
    abstract_notices.set_read_timeout(Some(Duration::from_secs(60))).expect("it can be set");
    let start = |options: &str, notified: &OsStr| {
        // The shell keeps its process id, which LISTEN_PID must be.
        let script = format!(r#"LISTEN_PID=$$ exec "{SNAP}" serve "$0" {options} 3<&0 </dev/null"#);
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(&sample.file);
        command.env("LISTEN_FDS", "1").env("NOTIFY_SOCKET", notified);
        command
            .stdin(OwnedFd::from(manager.try_clone().expect("a duplicate")))
            .stderr(Stdio::piped());
        command
    };
    let keep = folder.join("keep.sock");
    let mut keeper = Talking::snap([OsStr::new("keep"), OsStr::new("--listen"), keep.as_os_str()]);
    keeper.prints(&["keeping at"]);
    let kept = format!("--keep \"{}\"", keep.display());
    let mut state = [0; 64];
    let (notified, abstract_name) =
        (notified.as_os_str(), OsString::from(format!("@{abstract_name}")));
    for (options, notified, notices) in [
        ("", notified, &notices),
        (&*kept, notified, &notices),
        ("", &abstract_name, &abstract_notices),
        ("--jail strict", notified, &notices),
        ("--jail strict", &abstract_name, &abstract_notices),
    ] {
        let mut server = start(options, notified).spawn().expect("it starts");
        let len = notices.recv(&mut state).expect("it is ready");
        assert_eq!(&state[..len], b"READY=1");
        let share = ["--lazy", "--share", socket.to_str().expect("text"), "--beats", "1"];
        restore(&sample.file, &share).ok();
        signal(server.id(), "TERM");
        assert_eq!(server.wait().expect("it ends").code(), Some(130));
        // The next one gets it.
        assert!(socket.exists());
        UnixStream::connect(&socket).expect("the manager still listens");
    }
    let both = start("--listen other.sock", notified).output().expect("it starts");
    assert_eq!(both.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&both.stderr).contains("has passed a socket already"));
    let neither = snap(["serve", sample.file.to_str().expect("text")]);
    neither.failed(1, &["--listen SOCKET"]);
}

/// It is set in the process of a service manager.
const MANAGER: &str = "SNAP_SERVICE_MANAGER";

/// A service manager that gives its socket a relative name, and then runs the server as this process.
#[test]
#[ignore = "the test below starts it, in the folder of the socket"]
fn service_manager_in_a_folder() {
    if std::env::var_os(MANAGER).is_none() {
        return;
    }
    let listener = UnixListener::bind("pages.sock").expect("it binds");
    let script = r#"LISTEN_PID=$$ exec "$SNAP" serve guest.snap --keep keep.sock 3<&0 </dev/null"#;
    let mut command = Command::new("sh");
    command.args(["-c", script]).env("SNAP", SNAP).env("LISTEN_FDS", "1");
    let error = command.stdin(OwnedFd::from(listener)).exec();
    panic!("sh: {error}");
}

#[test]
fn a_passed_socket_with_a_relative_name_is_given_to_a_keeper() {
    // The jail ended the server, which asked for its working folder.
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let keep = folder.join("keep.sock");
    let mut keeper = Talking::snap([OsStr::new("keep"), OsStr::new("--listen"), keep.as_os_str()]);
    keeper.prints(&["keeping at"]);
    let mut manager = Command::new(std::env::current_exe().expect("this program"));
    manager.args(["--exact", "serving::service_manager_in_a_folder", "--ignored", "--nocapture"]);
    manager.current_dir(folder).env(MANAGER, "1");
    let mut server = Talking::start(manager);
    server.prints(&["serving "]);
    keeper.prints(&["connected"]);
    server.interrupt();
    keeper.interrupt();
}

#[test]
fn a_folder_of_snapshots_is_served_while_files_come_and_go() {
    needs_vm!();
    let sample = Sample::small();
    let (files, sockets) = (sample.folder.path().join("files"), sample.folder.path().join("at"));
    for folder in [&files, &sockets] {
        std::fs::create_dir(folder).expect("it can be created");
    }
    // As every program that writes a snapshot does: it appears when it is complete.
    let add = |name: &str| {
        let hidden = files.join(".new");
        std::fs::copy(&sample.file, &hidden).expect("it can be copied");
        std::fs::rename(&hidden, files.join(name)).expect("it can be renamed");
    };
    let runs = |socket: &str| {
        let socket = sockets.join(socket);
        let share = ["--lazy", "--share", socket.to_str().expect("text"), "--beats", "1"];
        restore(&sample.file, &share).ok();
    };
    let command = |at: &Path| {
        let mut command = Command::new(SNAP);
        command.arg("serve").arg(&files).arg("--listen").arg(at);
        command
    };
    let file = files.join("file");
    crate::support::run(command(&file)).failed(1, &["is a folder: --listen must be a folder"]);
    add("a.snap");
    std::fs::write(files.join("notes"), "").expect("it can be written");
    let mut server = start(command(&sockets));
    let mut lines = BufReader::new(server.stderr.take().expect("a pipe")).lines();
    let mut prints = |what: &str| loop {
        let line = lines.next().expect("another line").expect("text");
        if line.contains(what) {
            return;
        }
    };
    prints("/a.sock");
    prints("serving 1 snapshots of");
    runs("a.sock");
    add("b.c.snap");
    prints("/b.c.sock");
    runs("b.c.sock");
    // A file that cannot be served disturbs no other, and is reported once.
    std::fs::write(files.join("d.snap"), "no snapshot").expect("it can be written");
    prints("d.snap is not served");
    std::fs::remove_file(files.join("a.snap")).expect("it can be removed");
    let begun = Instant::now();
    while sockets.join("a.sock").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the socket is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
    runs("b.c.sock");
    // Another file of the same name.
    add("b.c.snap");
    prints("/b.c.sock");
    runs("b.c.sock");
    signal(server.id(), "TERM");
    assert_eq!(end_of(server).status.code(), Some(130));
    assert_eq!(std::fs::read_dir(&sockets).expect("it is there").count(), 0);
}

/// The number in "ended after N faults".
fn faults(line: &str) -> u64 {
    let mut fields = line.split(' ').skip_while(|field| *field != "after");
    fields.nth(1).and_then(|number| number.parse().ok()).expect(line)
}

#[test]
fn clones_share_what_one_of_them_has_touched() {
    needs_vm!();
    let sample = Sample::small();
    let eager = sample.restore(&["--beats", "3", "--hash"]).ok().report();
    let serving = Serving::start(&sample);
    let first = serving.restore(&sample.file, &["--beats", "3", "--hash"]).ok().report();
    assert_eq!(first["mode"], "shared");
    assert_eq!((&first["beats"], &first["bad_beats"]), (&eager["beats"], &eager["bad_beats"]));
    assert_eq!(first["memory_sha256"], eager["memory_sha256"]);
    let first_faults = faults(&serving.prints("ended after"));

    // All at the same time; each writes to its memory, and none sees that of another.
    let clones = std::env::var("SNAP_TEST_CLONES").map_or(4, |n| n.parse().expect("a number"));
    let each = |_| {
        let mut command = Command::new(SNAP);
        command.arg("restore").arg(&sample.file).arg("--lazy").arg("--share").arg(&serving.socket);
        start({
            command.args(["--beats", "3", "--hash", "--report", "json"]);
            command
        })
    };
    let running: Vec<_> = (0..clones).map(each).collect();
    for clone in running {
        let report = Ran::from(end_of(clone)).ok().report();
        assert_eq!(report["bad_beats"], 0);
        assert_eq!(report["memory_sha256"], eager["memory_sha256"]);
        // Zero pages are each clone's own; the others need no message.
        let later_faults = faults(&serving.prints("ended after"));
        assert!(later_faults < first_faults, "{later_faults} after {first_faults}");
    }
    assert_eq!(serving.end("TERM"), Some(130));
}

/// The number of pages in the memory that clones share.
fn shared_pages(serving: &Serving) -> u64 {
    let files = std::fs::read_dir(format!("/proc/{}/fd", serving.server.id())).expect("it lives");
    let files = files.map(|file| file.expect("proc").path());
    let shared = |file: &PathBuf| {
        std::fs::read_link(file).is_ok_and(|to| to.to_string_lossy().contains("snapshot-pages"))
    };
    let file = files.filter(shared).last();
    file.map_or(0, |file| file.metadata().expect("it is open").blocks() * 512 / 4096)
}

/// A clone that sends its request and then disconnects.
fn ask_and_leave(serving: &Serving, snapshot: &Snapshot) {
    let header = snapshot.header();
    let wanted = json!({"layers": [header.id.to_string()], "memory_bytes": header.memory_bytes});
    let mut stream = UnixStream::connect(&serving.socket).expect("it listens");
    writeln!(stream, "{}", json!({"share": wanted})).expect("it is taken");
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).expect("an answer");
    assert!(answer.contains("accepted"), "{answer}");
}

/// Pages of the working set are loaded with the first clone, before it touches them.
#[test]
fn the_working_set_is_loaded_before_clones_touch_it() {
    needs_vm!();
    let sample = Sample::small();
    let (file, trained) = (&sample.file, sample.folder.path().join("trained.snap"));
    let text = |path: &Path| path.to_str().expect("text").to_owned();
    snap(["train", &text(file), "--beats", "2", "--runs", "1", "-o", &text(&trained)]).ok();
    let snapshot = Snapshot::open(&trained).expect("it opens");
    let stored = |page: &u32| {
        let entry = snapshot.entry(PageIndex(*page)).expect("an entry");
        matches!(entry, PageEntry::Data { .. })
    };
    let set = snapshot.working_set().expect("it is whole").expect("it has one");
    let of_set = set.runs().iter().flat_map(|run| run.first.0..run.first.0 + run.pages);
    let hot = of_set.filter(stored).count() as u64;
    let all = (0..snapshot.header().pages() as u32).filter(stored).count() as u64;
    assert!(hot < all, "{hot} of {all}");

    let sample = Sample { file: trained, ..sample };
    let mut first_clone_faults = Vec::new();
    for (prefetch, pages) in [("off", 0), ("hot", hot), ("all", all)] {
        let serving = Serving::with(&sample, &["--prefetch", prefetch]);
        ask_and_leave(&serving, &snapshot);
        let began = Instant::now();
        while shared_pages(&serving) < pages {
            let have = shared_pages(&serving);
            assert!(began.elapsed() < Duration::from_secs(60), "{prefetch}: {have} of {pages}");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(shared_pages(&serving), pages, "{prefetch}");
        let report = serving.restore(&sample.file, &["--beats", "2"]).ok().report();
        assert_eq!((&report["beats"], &report["bad_beats"]), (&json!(2), &json!(0)));
        first_clone_faults.push(faults(&serving.prints("faults")));
        assert_eq!(serving.end("TERM"), Some(130));
    }
    let [off, hot, all] = first_clone_faults[..] else { panic!("{first_clone_faults:?}") };
    // The rest are zero pages, of which each clone has its own.
    assert!(hot < off / 4 && all < off / 4, "{off}, {hot} and {all} faults");
}

#[test]
fn a_clone_of_another_snapshot_is_refused() {
    needs_vm!();
    let (sample, other) = (Sample::small(), Sample::small());
    let serving = Serving::start(&sample);
    serving
        .restore(&other.file, &["--beats", "1"])
        .failed(1, &["the page server refuses: the client requests snapshot"]);
    serving.restore(&sample.file, &["--beats", "1"]).ok();
    let missing = other.folder.path().join("missing");
    let share = ["--lazy", "--share", missing.to_str().expect("text")];
    restore(&sample.file, &share).failed(1, &["cannot share memory", "connect"]);
    serving.end("TERM");
}

#[test]
fn a_clone_whose_server_has_ended_stops_with_a_message() {
    needs_vm!();
    let sample = Sample::small();
    let serving = Serving::start(&sample);
    let mut command = Command::new(SNAP);
    command.arg("restore").arg(&sample.file).arg("--lazy").arg("--share").arg(&serving.socket);
    let mut clone = start(command);
    let mut beats = BufReader::new(clone.stdout.take().expect("a pipe"));
    let mut line = String::new();
    beats.read_line(&mut line).expect("it runs");
    assert!(line.contains("ok"), "{line}");
    let rest = std::thread::spawn(move || {
        let mut rest = String::new();
        beats.read_to_string(&mut rest).map(|_| rest)
    });
    serving.end("KILL");
    Ran::from(end_of(clone)).failed(5, &["guest stopped", "the page server has ended"]);
    let rest = rest.join().expect("no panic").expect("text");
    assert!(!rest.contains("BAD"), "{rest}");
}

#[test]
fn a_damaged_page_stops_the_clone_with_its_cause() {
    needs_vm!();
    let sample = Sample::small();
    damage_later_half(&sample);
    let serving = Serving::start(&sample);
    serving
        .restore(&sample.file, &["--beats", "3"])
        .failed(5, &["guest stopped", "guest.snap", "checksum expected"]);
    serving.end("TERM");
}

#[test]
fn figures_are_served_over_http() {
    needs_vm!();
    let sample = Sample::small();
    let serving = Serving::with(&sample, &["--metrics", "0"]);
    let (_, at) = serving.first.split_once("http://").expect("it has the address");
    let address = at.trim_end().strip_suffix("/metrics").expect("the path").to_owned();
    serving.restore(&sample.file, &["--beats", "2"]).ok();
    serving.prints("ended after");
    let ask = |request: &str| {
        let mut stream = std::net::TcpStream::connect(&address).expect("it listens");
        let host = if request.ends_with("/other-site") { "example.com" } else { "localhost" };
        // In one part: a request that is refused early would break off otherwise.
        let request = format!("{request} HTTP/1.1\r\nHost: {host}\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("it is taken");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let figures = ask("GET /metrics");
    assert!(figures.starts_with("HTTP/1.1 200 OK\r\n"), "{figures}");
    assert!(figures.contains("\nsnap_guests 0\n"), "{figures}");
    assert!(figures.contains("\nsnap_guests_total 1\n"), "{figures}");
    assert!(!figures.contains("\nsnap_faults_total 0\n"), "{figures}");
    assert!(ask("GET /").starts_with("HTTP/1.1 404"));
    assert!(ask("GET /other-site").starts_with("HTTP/1.1 403"));
    assert!(ask("POST /metrics").starts_with("HTTP/1.1 405"));
    assert!(ask("").starts_with("HTTP/1.1 400"));
    assert_eq!(serving.end("TERM"), Some(130));
}

#[test]
fn a_bad_file_is_not_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("x.snap");
    std::fs::write(&file, "nothing").expect("it can be written");
    let socket = folder.path().join("s");
    snap(["serve".as_ref(), file.as_os_str(), "--listen".as_ref(), socket.as_os_str()])
        .failed(3, &["x.snap"]);
    assert!(!socket.exists());
}
