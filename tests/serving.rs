//! `snap serve` from outside: its socket's life. What it serves is tested with the library.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

use crate::support::{SNAP, Sample, end_of, needs_vm, signal, snap, start};

/// Starts a server and waits until it listens.
fn serving(sample: &Sample) -> (Child, std::path::PathBuf) {
    let socket = sample.folder.path().join("pages.sock");
    let mut command = Command::new(SNAP);
    command.arg("serve").arg(&sample.file).arg("--listen").arg(&socket);
    let mut child = start(command);
    let mut line = String::new();
    let stderr = child.stderr.take().expect("a pipe");
    let mut stderr = BufReader::new(stderr);
    stderr.read_line(&mut line).expect("it says something");
    assert!(line.starts_with("serving "), "{line}");
    // What comes later is read to its end, so that the server can go on talking.
    std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
    (child, socket)
}

#[test]
fn the_socket_is_private_held_and_given_up() {
    needs_vm!();
    let sample = Sample::small();
    let (server, socket) = serving(&sample);
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
    signal(server.id(), "TERM");
    assert_eq!(end_of(server).status.code(), Some(130));
    assert!(!socket.exists());

    // A server that was killed leaves its socket behind; the next one takes it.
    let (server, _) = serving(&sample);
    signal(server.id(), "KILL");
    end_of(server);
    assert!(socket.exists());
    let (server, _) = serving(&sample);
    signal(server.id(), "INT");
    assert_eq!(end_of(server).status.code(), Some(130));
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
