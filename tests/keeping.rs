//! `snap keep`: servers that die, and guests that continue.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::support::{Ran, SNAP, Sample, end_of, needs_vm, signal, snap, start};

/// A running command, and its lines on stderr.
struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    fn start(command: Command) -> Running {
        let mut child = start(command);
        let lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let (sender, received) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Running { child, lines: received }
    }

    fn keeper(folder: &Path, options: &[&str]) -> Running {
        let mut command = Command::new(SNAP);
        command.arg("keep").arg("--listen").arg(keeper_socket(folder)).args(options);
        let keeper = Running::start(command);
        keeper.prints("keeping at");
        keeper
    }

    fn server(sample: &Sample) -> Running {
        let folder = sample.folder.path();
        let mut command = Command::new(SNAP);
        command.arg("serve").arg(&sample.file).arg("--listen").arg(folder.join("pages.sock"));
        command.arg("--keep").arg(keeper_socket(folder));
        let server = Running::start(command);
        server.prints("serving ");
        server
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
    fn end(self, signal_name: &str) -> Option<i32> {
        signal(self.child.id(), signal_name);
        end_of(self.child).status.code()
    }
}

fn keeper_socket(folder: &Path) -> PathBuf {
    folder.join("keep.sock")
}

#[test]
fn a_keeper_reports_servers_and_their_ends() {
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let socket = keeper_socket(folder);
    let pages = folder.join("pages.sock");
    let (file, pages) = (sample.file.to_str().expect("text"), pages.to_str().expect("text"));
    let keep = socket.to_str().expect("text");
    snap(["serve", file, "--listen", pages, "--keep", keep])
        .failed(1, &["the keeper: cannot connect to the keeper"]);
    let keeper = Running::keeper(folder, &[]);
    snap(["keep", "--listen", keep]).failed(1, &["keep.sock: a server is listening there"]);
    let server = Running::server(&sample);
    keeper.prints("connected");
    server.end("KILL");
    keeper.prints("has ended, 0 guests wait");
    let server = Running::server(&sample);
    assert_eq!(server.end("TERM"), Some(130));
    keeper.prints("has ended, 0 guests wait");
    assert_eq!(keeper.end("TERM"), Some(130));
    assert!(!socket.exists());
}

/// A guest that shares its memory, and its output; each line is checked.
struct Clone {
    child: Child,
    beats: Receiver<String>,
}

impl Clone {
    fn start(file: &Path, socket: &Path) -> Clone {
        let mut command = Command::new(SNAP);
        command.arg("restore").arg(file).arg("--lazy").arg("--share").arg(socket);
        let mut child = start(command);
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let (sender, beats) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Clone { child, beats }
    }

    /// All its output is right, and more comes.
    #[track_caller]
    fn continues(&mut self) {
        let before: Vec<_> = self.beats.try_iter().collect();
        let next = (0..2).map(|_| self.beats.recv_timeout(Duration::from_secs(60)));
        for line in before.into_iter().map(Ok).chain(next) {
            let line = line.expect("another line");
            assert!(line.ends_with(" ok"), "{line}");
        }
    }
}

/// The server is killed repeatedly under guests that share its memory; they continue, and do not notice.
#[test]
fn clones_continue_when_their_server_is_killed() {
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let keeper = Running::keeper(folder, &[]);
    let mut server = Running::server(&sample);
    let mut clones: Vec<_> =
        (0..3).map(|_| Clone::start(&sample.file, &folder.join("pages.sock"))).collect();
    for _ in 0..3 {
        server.prints("are served");
    }
    for _ in 0..5 {
        server.end("KILL");
        keeper.prints("has ended, 3 guests wait");
        server = Running::server(&sample);
        keeper.prints("has taken over 3 guests");
    }
    clones.iter_mut().for_each(Clone::continues);
    for clone in clones {
        signal(clone.child.id(), "INT");
        Ran::from(end_of(clone.child)).failed(130, &["interrupted"]);
    }
    assert_eq!(server.end("TERM"), Some(130));
    assert_eq!(keeper.end("TERM"), Some(130));
}
