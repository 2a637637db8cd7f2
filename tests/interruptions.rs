//! Ctrl-C, SIGKILL and a full disk: every command ends, and leaves no files.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{
    Ran, SNAP, Sample, end_of, names, needs_vm, run, signal, skip, snap, start, wait_for_handlers,
};

#[test]
fn ctrl_c_ends_a_run_cleanly() {
    needs_vm!();
    let sample = Sample::small();
    for mode in [&[][..], &["--lazy"]] {
        let mut command = Command::new(SNAP);
        command.arg("restore").arg(&sample.file).args(mode);
        let mut child = start(command);
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut line = String::new();
        while !line.starts_with("beat ") {
            line.clear();
            assert!(stdout.read_line(&mut line).expect("output is text") > 0);
        }
        signal(child.id(), "INT");
        std::io::copy(&mut stdout, &mut std::io::sink()).expect("it can be read to its end");
        Ran::from(end_of(child)).failed(130, &["interrupted", "first instruction"]);
    }
}

#[test]
fn a_signal_in_the_first_moments_is_not_lost() {
    // A signal between the creation of the guest and its first instruction was lost once, and the guest then ran
    // forever.
    needs_vm!();
    let sample = Sample::small();
    for moment in 0..40 {
        let mut command = Command::new(SNAP);
        command.args(["restore", "--lazy"]).arg(&sample.file);
        let child = start(command);
        std::thread::sleep(Duration::from_micros(500 * moment));
        // Not SIGINT: background jobs of a script are started with it ignored, and `snap` handles it only after its
        // first millisecond.
        signal(child.id(), "TERM");
        let ended = end_of(child);
        // Before the handlers are installed, the signal itself ends the process.
        assert!(matches!(ended.status.code(), Some(130) | None), "{ended:?}");
    }
}

#[test]
fn a_reader_that_closes_the_pipe_ends_the_run_without_a_panic() {
    needs_vm!();
    let sample = Sample::small();
    for args in ["restore --lazy \"$FILE\"", "info \"$FILE\"", "pages \"$FILE\""] {
        let script = format!("\"$SNAP\" {args} | head -n 1");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).env("SNAP", SNAP).env("FILE", &sample.file);
        let ran = run(command).ok();
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    }
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    needs_vm!();
    let sample = Sample::small();
    let mut command = Command::new("sh");
    command.args(["-c", "\"$SNAP\" restore \"$FILE\" --beats 3 > /dev/full"]);
    command.env("SNAP", SNAP).env("FILE", &sample.file);
    run(command).failed(1, &["cannot write the guest's output", "No space left"]);
}

#[test]
fn ctrl_c_while_creating_leaves_nothing() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("a.snap");
    let mut command = Command::new(SNAP);
    // A slow one: level 19 takes seconds.
    command.arg("create").arg(&out).args(["--memory", "256M", "--work", "192M", "--level", "19"]);
    let child = start(command);
    wait_for_handlers(child.id());
    std::thread::sleep(Duration::from_millis(700));
    signal(child.id(), "INT");
    Ran::from(end_of(child)).failed(130, &["interrupted"]);
    assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
}

/// The number of kills: `SNAP_KILLS`, by default few.
fn kills() -> u32 {
    let asked = std::env::var("SNAP_KILLS").ok().and_then(|kills| kills.parse().ok());
    asked.unwrap_or(30)
}

/// Runs a command that writes `out`, which does not exist, and kills it at moments spread over its duration. Each time
/// `out` must be absent or whole, and no other file may be left.
fn kill_at_many_moments(folder: &Path, out: &Path, command: impl Fn() -> Command) {
    let before = names(folder);
    let begun = Instant::now();
    run(command()).ok();
    let takes = begun.elapsed();
    std::fs::remove_file(out).expect("it was written");
    let (kills, mut whole) = (kills(), 0);
    for moment in 0..kills {
        let child = start(command());
        std::thread::sleep(takes * moment / kills);
        // It may have ended by then.
        let _ = Command::new("kill").arg("-KILL").arg(child.id().to_string()).output();
        end_of(child);
        if out.exists() {
            whole += 1;
            snap(["verify".as_ref(), out.as_os_str()]).ok();
            std::fs::remove_file(out).expect("it can be removed");
        }
        assert_eq!(names(folder), before, "after kill {moment} of {kills}");
    }
    assert!(whole < kills, "no kill came in time");
}

#[test]
fn a_kill_while_creating_leaves_no_file_or_a_whole_one() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("a.snap");
    kill_at_many_moments(folder.path(), &out, || {
        let mut command = Command::new(SNAP);
        command.arg("create").arg(&out).args(["--memory", "64M", "--work", "32M"]);
        command
    });
}

#[test]
fn a_kill_while_flattening_leaves_no_file_or_a_whole_one() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "32M"]);
    let out = sample.folder.path().join("flat.snap");
    kill_at_many_moments(sample.folder.path(), &out, || {
        let mut command = Command::new(SNAP);
        command.arg("flatten").arg(&sample.file).arg("-o").arg(&out);
        command
    });
}

#[test]
fn a_kill_while_replacing_keeps_the_old_file_or_the_new_one() {
    needs_vm!();
    let sample = Sample::small();
    let before = std::fs::read(&sample.file).expect("it can be read");
    for moment in 0..15 {
        let mut command = Command::new(SNAP);
        command.arg("create").arg(&sample.file);
        command.args(["--force", "--memory", "64M", "--work", "32M"]);
        let child = start(command);
        std::thread::sleep(Duration::from_millis(moment * 15));
        let _ = Command::new("kill").arg("-KILL").arg(child.id().to_string()).output();
        end_of(child);
        if std::fs::read(&sample.file).expect("it can be read") != before {
            snap(["verify".as_ref(), sample.file.as_os_str()]).ok();
            std::fs::write(&sample.file, &before).expect("it can be written");
        }
    }
}

#[test]
fn an_existing_file_is_kept_unless_forced() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("a.snap");
    std::fs::write(&out, b"mine").expect("it can be written");
    let name = out.to_string_lossy();
    let create = ["create", &*name, "--memory", "32M", "--work", "4M"];
    snap(create).failed(1, &["a.snap exists", "--force"]);
    assert_eq!(std::fs::read(&out).expect("it can be read"), b"mine");
    snap(create.into_iter().chain(["--force"])).ok();
    snap(["verify", &*name]).ok();
    assert_eq!(names(folder.path()), ["a.snap"]);
}

#[test]
fn a_disk_that_fills_up_is_named_and_has_no_file() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let ran = on_small_disk(
        folder.path(),
        "\"$SNAP\" create \"$DISK/a.snap\" --work 32M; \
        code=$?; ls -A \"$DISK\"; df --output=iused \"$DISK\" | tail -n 1; exit $code",
    );
    let Some(ran) = ran else { return };
    let listing = ran.stdout.clone();
    ran.failed(1, &["a.snap", "No space left on device", "write"]);
    // Only the folder's own inode.
    assert_eq!(listing.trim(), "1", "left behind: {listing}");
}

/// Runs a script with a file system of 4 MiB at `$DISK`, if this user may mount one.
fn on_small_disk(disk: &Path, script: &str) -> Option<Ran> {
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c", script]);
        command.env("DISK", disk).env("SNAP", SNAP);
        command
    };
    let mount = "mount -t tmpfs -o size=4m none \"$DISK\"";
    if unshare(mount).output().is_ok_and(|output| output.status.success()) {
        return Some(run(unshare(&format!("{mount} && {script}"))));
    }
    skip("a_disk_that_fills_up_is_named_and_has_no_file", "this user may not mount a tmpfs");
    None
}
