//! `snap serve` from outside: its socket's life, and clones that share memory. Firecracker's handshake is tested
//! with the library.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::support::{Ran, SNAP, Sample, end_of, needs_vm, restore, signal, snap, start};

/// A server that listens, and what it says from then on.
struct Serving {
    server: Child,
    socket: PathBuf,
    first: String,
    says: Receiver<String>,
}

impl Serving {
    fn start(sample: &Sample) -> Serving {
        Serving::with(sample, &[])
    }

    fn with(sample: &Sample, options: &[&str]) -> Serving {
        let socket = sample.folder.path().join("pages.sock");
        let mut command = Command::new(SNAP);
        command.arg("serve").arg(&sample.file).arg("--listen").arg(&socket).args(options);
        let mut server = start(command);
        let mut lines = BufReader::new(server.stderr.take().expect("a pipe")).lines();
        let first = lines.next().expect("it says something").expect("text");
        assert!(first.starts_with("serving "), "{first}");
        let (told, says) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = told.send(line);
            }
        });
        Serving { server, socket, first, says }
    }

    /// Restores a guest that shares its pages by this server.
    #[track_caller]
    fn restore(&self, file: &Path, options: &[&str]) -> Ran {
        let share = ["--lazy", "--share", self.socket.to_str().expect("text")];
        restore(file, &[&share, options].concat())
    }

    /// What it says next that has this in it.
    #[track_caller]
    fn says(&self, what: &str) -> String {
        loop {
            let line = self.says.recv_timeout(Duration::from_secs(60)).expect("it says more");
            if line.contains(what) {
                return line;
            }
        }
    }

    #[track_caller]
    fn end(self, signal_name: &str) -> Option<i32> {
        signal(self.server.id(), signal_name);
        end_of(self.server).status.code()
    }
}

#[test]
fn the_socket_is_private_held_and_given_up() {
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

    // A server that was killed leaves its socket behind; the next one takes it.
    Serving::start(&sample).end("KILL");
    assert!(socket.exists());
    assert_eq!(Serving::start(&sample).end("INT"), Some(130));
}

/// The number in "ended after N faults".
fn faults(line: &str) -> u64 {
    let mut words = line.split(' ').skip_while(|word| *word != "after");
    words.nth(1).and_then(|number| number.parse().ok()).expect(line)
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
    let first_faults = faults(&serving.says("ended after"));

    // All at once; each writes to its memory, and none sees that of another.
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
        // Zero pages are each clone's own; of the others there is no word.
        let later_faults = faults(&serving.says("ended after"));
        assert!(later_faults < first_faults, "{later_faults} after {first_faults}");
    }
    assert_eq!(serving.end("TERM"), Some(130));
}

#[test]
fn a_clone_of_another_snapshot_is_refused() {
    needs_vm!();
    let (sample, other) = (Sample::small(), Sample::small());
    let serving = Serving::start(&sample);
    serving
        .restore(&other.file, &["--beats", "1"])
        .failed(1, &["the page server refuses: the client wants snapshot"]);
    serving.restore(&sample.file, &["--beats", "1"]).ok();
    let nobody = other.folder.path().join("nobody");
    let share = ["--lazy", "--share", nobody.to_str().expect("text")];
    restore(&sample.file, &share).failed(1, &["cannot share memory", "connect"]);
    serving.end("TERM");
}

#[test]
fn a_clone_whose_server_is_gone_stops_and_says_so() {
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
    Ran::from(end_of(clone)).failed(5, &["guest stopped", "the page server is gone"]);
    let rest = rest.join().expect("no panic").expect("text");
    assert!(!rest.contains("BAD"), "{rest}");
}

#[test]
fn a_damaged_page_stops_the_clone_with_its_cause() {
    needs_vm!();
    let sample = Sample::small();
    let chunks = crate::failing_restores::chunks(&sample);
    let mut bytes = std::fs::read(&sample.file).expect("it can be read");
    for offset in &chunks[chunks.len() / 2..] {
        bytes[*offset as usize + 200] ^= 0x10;
    }
    std::fs::write(&sample.file, bytes).expect("it can be written");
    let serving = Serving::start(&sample);
    serving
        .restore(&sample.file, &["--beats", "3"])
        .failed(5, &["guest stopped", "guest.snap", "checksum expected"]);
    serving.end("TERM");
}

#[test]
fn figures_are_told_over_http() {
    needs_vm!();
    let sample = Sample::small();
    let serving = Serving::with(&sample, &["--metrics", "0"]);
    let (_, at) = serving.first.split_once("http://").expect("it says where");
    let address = at.trim_end().strip_suffix("/metrics").expect("the path").to_owned();
    serving.restore(&sample.file, &["--beats", "2"]).ok();
    serving.says("ended after");
    let ask = |path: &str| {
        let mut stream = std::net::TcpStream::connect(&address).expect("it listens");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").expect("it is taken");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let figures = ask("/metrics");
    assert!(figures.starts_with("HTTP/1.1 200 OK\r\n"), "{figures}");
    assert!(figures.contains("\nsnap_guests 0\n"), "{figures}");
    assert!(figures.contains("\nsnap_guests_total 1\n"), "{figures}");
    assert!(!figures.contains("\nsnap_faults_total 0\n"), "{figures}");
    assert!(ask("/").starts_with("HTTP/1.1 404"));
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
