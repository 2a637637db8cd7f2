//! `snap import -` and `snap export -o -`: memory through pipes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

use crate::import_export::{GIB, MIB, PAGE, Place, assert_same};
use crate::support::{Ran, SNAP, end_of, run, signal, skip, snap};

/// A shell's command line, in which $SNAP is the program and the current folder is the place.
#[track_caller]
fn shell(place: &Place, script: &str) -> Ran {
    let mut command = Command::new("bash");
    command.args(["-c", &format!("set -o pipefail; {script}")]).env("SNAP", SNAP);
    command.current_dir(place.0.path());
    run(command)
}

fn pages(place: &Place, file: &str) -> serde_json::Value {
    snap(["info", "--json", &place.text(file)]).ok().json()["pages"].clone()
}

#[test]
fn an_image_goes_through_pipes_bit_for_bit() {
    let place = Place::new();
    // Zeros at both ends and in between; and the last block is not a whole one.
    let len = 3 * MIB + 5 * PAGE;
    let image = place.image("image", len, &[MIB - PAGE, MIB, 3 * MIB, 3 * MIB + PAGE]);
    place.import(&image, &[]).ok();
    let ran = shell(&place, "cat image | $SNAP import - -o b.snap --json").ok();
    assert_eq!((&ran.json()["memory_bytes"], &ran.json()["source"]), (&len.into(), &"raw".into()));
    snap(["verify", &place.text("b.snap")]).ok();
    assert_eq!(pages(&place, "a.snap"), pages(&place, "b.snap"));
    // Only the bytes are on stdout, and through a pipe they are the same as in a file.
    for format in ["raw", "elf"] {
        place.export(format, format).ok();
        let to = format!("$SNAP export b.snap --format {format} -o - ");
        shell(&place, &format!("{to} | cmp - {format} && {to} > out")).ok();
        assert_same(&place.path(format), &place.path("out"));
    }
    // From one process to the other.
    let ran = shell(&place, "$SNAP export a.snap --format raw -o - | $SNAP import - -qo c.snap");
    assert_eq!((&*ran.stdout, &*ran.stderr), ("", ""));
    assert_eq!(pages(&place, "a.snap"), pages(&place, "c.snap"));
    assert!(!place.path("-").exists());
}

#[test]
fn a_layer_and_scattered_memory_are_streamed_whole() {
    let place = Place::new();
    let image = place.image("image", 8 * MIB, &[0, MIB, 7 * MIB]);
    let regions = ["--region", "0:3M", "--region", "1G:5M"];
    place.import(&image, &regions).ok();
    let other = place.image("other", 8 * MIB, &[0, 5 * MIB]);
    let whole = place.text("whole.snap");
    std::fs::rename(place.path("a.snap"), place.path("base.snap")).expect("it is there");
    place.import(&other, &regions).ok();
    let (file, base) = (place.text("a.snap"), place.text("base.snap"));
    snap(["rebase", &file, "--onto", &base, "-o", &whole]).ok();
    shell(&place, "$SNAP export whole.snap --format raw -o - | cmp - other").ok();
}

/// Zeros of a pipe are only read: they take no disk space, and are not stored.
#[test]
fn zeros_of_a_pipe_become_holes() {
    let place = Place::new();
    let image = place.image("image", GIB, &[512 * MIB]);
    // On a file system that could not hold them.
    let script = "mkdir small && mount -t tmpfs -o size=1m none small || exit 77; \
                  cat image | $SNAP import - -o small/b.snap && cp small/b.snap b.snap";
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", script]).env("SNAP", SNAP);
    let ran = run({
        command.current_dir(place.0.path());
        command
    });
    if ran.code == Some(77) || ran.stderr.contains("unshare") {
        return skip("zeros_of_a_pipe_become_holes", "this user may not mount a tmpfs");
    }
    ran.ok();
    shell(&place, "$SNAP export b.snap --format raw -o - | cmp - image").ok();
    drop(image);
}

#[test]
fn stdin_that_is_a_file_is_read_from_its_position() {
    let place = Place::new();
    place.image("image", 4 * MIB, &[0, PAGE, 2 * MIB]);
    shell(&place, "$SNAP import - -o a.snap < image").ok();
    place.export("raw", "out").ok();
    assert_same(&place.path("image"), &place.path("out"));
    shell(&place, "(dd bs=4096 count=1 of=first status=none; $SNAP import - -o b.snap) < image")
        .ok();
    shell(&place, "$SNAP export b.snap --format raw -o - | cat first - | cmp - image").ok();
    shell(&place, "$SNAP import - -o image --force < image").failed(1, &["image is the input"]);
}

#[test]
fn files_that_cannot_be_streams_are_refused() {
    let place = Place::new();
    place.image("image", 4 * MIB, &[0]);
    shell(&place, "$SNAP import image -o -").failed(1, &["./-", "stdout"]);
    place.import(&place.path("image"), &[]).ok();
    for args in [
        "flatten a.snap",
        "rebase a.snap --onto a.snap",
        "optimize a.snap",
        "train a.snap --beats 1",
        "create",
    ] {
        let ran = shell(&place, &format!("$SNAP {args} -o -"));
        assert_eq!(ran.stdout, "");
        ran.failed(1, &["./-", "stdout"]);
    }
    for format in ["firecracker", "cloud-hypervisor"] {
        let ran = shell(&place, &format!("$SNAP export a.snap --format {format} -o -"));
        ran.failed(1, &["a folder of files"]);
    }
    let messages = "stdout is the input, or a parent of it";
    shell(&place, "$SNAP export a.snap --format raw -o - >> a.snap").failed(1, &[messages]);
    snap(["verify", &place.text("a.snap")]).ok();
    shell(&place, "$SNAP import - -o b.snap < /dev/null").failed(3, &["stdin is empty"]);
    shell(&place, "head -c 5000 image | $SNAP import - -o b.snap")
        .failed(3, &["5000 bytes", "stdin"]);
    shell(&place, "cat a.snap | $SNAP import - -o b.snap").failed(3, &["is a snapshot already"]);
    assert_eq!(crate::support::names(place.0.path()), ["a.snap", "image"]);
    // A reader that stops early has not got all bytes.
    let cut = "($SNAP export a.snap --format raw -o -; echo code $? >&2) | head -c 10 | wc -c";
    let ran = shell(&place, cut);
    assert_eq!(ran.stdout.trim(), "10");
    assert!(ran.stderr.contains("cannot write all of it to stdout: Broken pipe"), "{}", ran.stderr);
    assert!(ran.stderr.contains("code 1"), "{}", ran.stderr);
}

#[test]
fn a_terminal_is_refused_as_a_stream() {
    let place = Place::new();
    place.image("image", MIB, &[0]);
    place.import(&place.path("image"), &[]).ok();
    // `script` runs a command on a separate terminal, and returns its exit code.
    let script = |args: &str| {
        let mut command = Command::new("script");
        command.args(["-qec", &format!("{SNAP} {args}"), "/dev/null"]);
        command.current_dir(place.0.path()).stdin(Stdio::null());
        command.output()
    };
    for (args, messages) in [
        ("export a.snap --format raw -o -", "stdout is a terminal"),
        ("import - -o b.snap", "stdin is a terminal"),
    ] {
        match script(args) {
            Err(error) => {
                return skip("a_terminal_is_refused_as_a_stream", &format!("script: {error}"));
            }
            Ok(output) => {
                let ran = Ran::from(output);
                assert!(ran.stdout.contains(messages), "{}{}", ran.stdout, ran.stderr);
                assert!(!ran.stdout.contains("page at"), "{}", ran.stdout);
                assert_eq!(ran.code, Some(1));
            }
        }
    }
}

/// A process whose stdin or stdout is a pipe of this test.
fn piped(place: &Place, args: &[&str]) -> Child {
    let mut command = Command::new(SNAP);
    command.args(args).current_dir(place.0.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("snap starts")
}

#[track_caller]
fn prints_and_ends_by_ctrl_c(mut child: Child, what: &str) {
    let mut line = String::new();
    let stderr = child.stderr.as_mut().expect("a pipe");
    BufReader::new(stderr).read_line(&mut line).expect("it prints a line");
    assert_eq!(line, format!("snap: waiting for {what} (no time limit; Ctrl-C ends it)\n"));
    signal(child.id(), "INT");
    // Its stdout is not read: that would let it continue.
    let stdout = child.stdout.take();
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    drop(stdout);
}

/// No program writes, or none reads: the wait is reported, and Ctrl-C ends it.
#[test]
fn a_stalled_stream_is_reported_and_interrupted() {
    let place = Place::new();
    place.image("image", 8 * MIB, &[0]);
    place.import(&place.path("image"), &[]).ok();
    let mut child = piped(&place, &["import", "-", "-o", "b.snap"]);
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(&[7; 5000]).expect("it is taken");
    prints_and_ends_by_ctrl_c(child, "data on stdin");
    drop(stdin);
    let child = piped(&place, &["export", "a.snap", "--format", "raw", "-o", "-"]);
    prints_and_ends_by_ctrl_c(child, "stdout to be read");
    assert_eq!(crate::support::names(place.0.path()), ["a.snap", "image"]);
}

/// A stream that is not memory is refused by its first bytes, however long the rest takes.
#[test]
fn a_stream_of_another_format_is_refused_at_its_start() {
    let place = Place::new();
    let mut child = piped(&place, &["import", "-", "-o", "b.snap"]);
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(b"\x7fELF\x02\x01\x01\0").expect("it is taken");
    let ran = Ran::from(end_of(child));
    ran.failed(3, &["stdin is an ELF file"]);
    drop(stdin);
}

/// A Firecracker snapshot whose memory comes through a pipe.
#[test]
fn memory_of_a_firecracker_snapshot_may_come_through_a_pipe() {
    let place = Place::new();
    place.image("mem", 4 * MIB, &[0, 2 * MIB]);
    let mut state = 0x0710_1984_8664_0000_u64.to_le_bytes().to_vec();
    state.extend([1; 1000]);
    std::fs::write(place.path("state"), state).expect("it is written");
    shell(&place, "cat mem | $SNAP import - --vmstate state -o a.snap").ok();
    place.export("firecracker", "out").ok();
    assert_same(&place.path("mem"), &place.path("out/memory"));
    let mut bytes = Vec::new();
    File::open(place.path("out/vmstate"))
        .and_then(|mut f| f.read_to_end(&mut bytes))
        .expect("it is there");
    assert_eq!(bytes.len(), 1008);
}
