//! A reader of the guest's output may stop reading: the guest waits, but can still be snapshotted and ended.

use std::io::{BufRead, BufReader, PipeReader, Write};
use std::process::{Child, Command, Stdio};

use crate::support::{Ran, SNAP, Sample, end_of, needs_vm, signal, snap};

/// All but one of the 16 pages of a pipe. The guest's first byte takes a whole page.
const FULL_BYTES: usize = 15 * 4096;

/// `snap` with these arguments, and the other end of its stdout, which is full.
#[track_caller]
fn stuck(mut command: Command) -> (Child, PipeReader) {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    writer.write_all(&[b'\n'; FULL_BYTES]).expect("it fits");
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    let mut child = command.spawn().expect("snap starts");
    while rustix::io::ioctl_fionread(&reader).expect("it is a pipe") == FULL_BYTES as u64 {
        assert!(child.try_wait().expect("it can be waited for").is_none(), "it has ended");
        std::thread::yield_now();
    }
    (child, reader)
}

#[test]
fn a_guest_without_a_reader_is_snapshotted_and_loses_no_output() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, out) = (folder.path().join("api"), folder.path().join("out.snap"));
    let mut command = Command::new(SNAP);
    command.args(["run", "--memory", "64M", "--work", "8M", "--api"]).arg(&socket);
    let (child, reader) = stuck(command);
    for _ in 0..2 {
        snap(["create", "--force"].iter().map(std::ffi::OsStr::new).chain([
            out.as_os_str(),
            "--vm".as_ref(),
            socket.as_os_str(),
        ]))
        .ok();
    }
    let lines = BufReader::new(reader).lines().map(|line| line.expect("it can be read"));
    let mut printed = lines.filter(|line| !line.is_empty());
    assert!(printed.next().is_some_and(|line| line.starts_with("ready ")));
    for beat in 1..=3 {
        assert_eq!(printed.next(), Some(format!("beat {beat} ok")));
    }
    signal(child.id(), "INT");
    Ran::from(end_of(child)).failed(130, &["interrupted"]);
}

#[test]
fn a_guest_without_a_reader_is_interrupted() {
    needs_vm!();
    let sample = Sample::small();
    let mut command = Command::new(SNAP);
    command.args(["restore", "--lazy"]).arg(&sample.file);
    let (child, _reader) = stuck(command);
    signal(child.id(), "INT");
    Ran::from(end_of(child)).failed(130, &["interrupted"]);
}
