//! `snap checkpoint`: a chain of live snapshots of a guest that runs on.

use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::control::Vm;
use crate::live::{memory_of, runs};
use crate::support::{Ran, SNAP, Sample, end_of, names, needs_vm, signal, snap};

/// A `snap checkpoint` that runs.
struct Checkpoints {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    folder: PathBuf,
}

impl Checkpoints {
    fn start(vm: &Vm, folder: &Path, options: &[&str]) -> Checkpoints {
        let mut command = Command::new(SNAP);
        command.arg("checkpoint").arg("--vm").arg(&vm.socket).arg("-o").arg(folder).arg("--json");
        command.args(options).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("snap starts");
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        Checkpoints { child, lines, folder: folder.to_owned() }
    }

    /// The next event; `None` at the end.
    fn event(&mut self) -> Option<Value> {
        let line = self.lines.next()?.expect("it can be read");
        Some(serde_json::from_str(&line).expect("each line is JSON"))
    }

    /// Waits for the next event of this kind.
    #[track_caller]
    fn wait_for(&mut self, kind: &str) -> Value {
        loop {
            let event = self.event().expect("there is one more");
            // The test itself snapshots the guest, too.
            let busy = event["error"].as_str().is_some_and(|error| error.ends_with("snapshotted"));
            assert!(busy || event["event"] != "failed", "{event}");
            if event["event"] == kind {
                return event;
            }
        }
    }

    fn end(self) -> std::process::Output {
        end_of(self.child)
    }

    /// Ctrl-C.
    fn interrupt(self) {
        signal(self.child.id(), "INT");
        let ended = self.end();
        assert_eq!(ended.status.code(), Some(130), "{}", String::from_utf8_lossy(&ended.stderr));
    }
}

/// The checkpoint of this number.
fn at(folder: &Path, number: u64) -> PathBuf {
    format!("{}@{number}", folder.display()).into()
}

fn is_merged(name: &str) -> bool {
    name.contains("merged")
}

/// Twenty checkpoints, of which the last four are kept. Each is whole, and the guest runs on.
#[test]
fn a_guest_is_checkpointed_twenty_times() {
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_str().expect("text");
    let guests: [&[&str]; 3] = [
        &["run", "--memory", "64M", "--work", "8M"],
        &["restore", file],
        &["restore", file, "--lazy", "--populate", "off"],
    ];
    for guest in guests {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut vm = Vm::start(folder.path(), guest);
        let out = folder.path().join("checkpoints");
        let options = ["--every", "50ms", "--keep", "4", "--count", "20", "--merge-at", "5"];
        let mut run = Checkpoints::start(&vm, &out, &options);
        let (mut last, mut merged, mut most_parents) = (0, 0, 0);
        while let Some(event) = run.event() {
            match event["event"].as_str() {
                Some("checkpoint") => {
                    last += 1;
                    assert_eq!(event["number"], last, "{event}");
                    most_parents = most_parents.max(event["parents"].as_u64().expect("a number"));
                    vm.beats(1);
                }
                Some("merged") => merged += 1,
                Some("removed") => {}
                _ => panic!("{event}"),
            }
        }
        assert!(run.end().status.success());
        assert_eq!(last, 20);
        assert!(merged >= 2 && most_parents < 15, "{merged} {most_parents}");
        vm.beats(2);
        let (layers, checkpoints): (Vec<_>, Vec<_>) =
            names(&out).into_iter().partition(|name| is_merged(name));
        let kept: Vec<_> = (17..=20).map(|number| format!("{number:06}.snap")).collect();
        assert!(checkpoints.ends_with(&kept), "{checkpoints:?} {layers:?}");
        for number in 17..=20 {
            snap([Path::new("verify"), &at(&out, number)]).ok();
            runs(&at(&out, number));
        }
        assert!(memory_of(&out) == memory_of(&at(&out, 20)));
        runs(&out);
        snap([Path::new("info"), &at(&out, 2)]).failed(1, &["has no checkpoint 2", "to 20"]);
        vm.interrupt();
    }
}

/// A checkpoint has the same pages as a snapshot of the paused guest, and one that does not run changes nothing.
#[test]
fn a_checkpoint_equals_a_snapshot_of_the_paused_guest() {
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_str().expect("text");
    let guests: [&[&str]; 3] = [
        &["run", "--memory", "64M", "--work", "8M"],
        &["restore", file],
        &["restore", file, "--lazy", "--populate", "full"],
    ];
    for guest in guests {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut vm = Vm::start(folder.path(), guest);
        let out = folder.path().join("checkpoints");
        let options = ["--every", "20ms", "--keep", "2", "--merge-at", "4", "--if-changed"];
        let mut run = Checkpoints::start(&vm, &out, &options);
        for round in 0..5 {
            run.wait_for("checkpoint");
            run.wait_for("checkpoint");
            vm.beats(1);
            vm.set("Paused");
            run.wait_for("unchanged");
            let paused = folder.path().join("paused.snap");
            vm.create(&paused, &["--force"]).ok();
            run.wait_for("unchanged");
            let same = memory_of(&run.folder) == memory_of(&paused);
            assert!(same, "round {round} of {guest:?}");
            vm.set("Resumed");
        }
        run.interrupt();
        vm.beats(2);
        runs(&out);
        vm.interrupt();
    }
}

/// Whatever ends the one that makes checkpoints, or the guest, the newest whole one restores, and the folder can be
/// continued.
#[test]
fn a_killed_process_leaves_whole_checkpoints() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("checkpoints");
    let options = ["--every", "10ms", "--keep", "3", "--merge-at", "3"];
    let mut last = 0;
    for round in 0..6 {
        let mut vm = Vm::booted(folder.path());
        let mut run = Checkpoints::start(&vm, &out, &options);
        let first = run.wait_for("checkpoint")["number"].as_u64().expect("a number");
        assert!(first > last, "{first} {last}");
        (0..round).for_each(|_| drop(run.wait_for("checkpoint")));
        thread::sleep(Duration::from_millis(17 * round));
        match round % 2 {
            0 => {
                run.child.kill().expect("it runs");
                assert!(!run.end().status.success());
                // The guest is unharmed.
                vm.beats(2);
                vm.interrupt();
            }
            _ => {
                vm.child.as_mut().expect("it runs").kill().expect("it runs");
                let ended = run.end();
                assert_eq!(ended.status.code(), Some(1), "{ended:?}");
                drop(vm);
            }
        }
        runs(&out);
        let hidden = |name: &String| name.starts_with('.');
        assert!(!names(&out).iter().any(hidden), "{:?}", names(&out));
        let numbers = names(&out).into_iter().filter(|name| !is_merged(name));
        last = numbers.filter_map(|name| name.get(..6)?.parse().ok()).max().expect("there is one");
        assert!(last >= first);
    }
    // Only the newest ones are kept, also of earlier runs.
    let vm = Vm::booted(folder.path());
    let run = Checkpoints::start(&vm, &out, &["--every", "10ms", "--keep", "1", "--count", "2"]);
    assert!(run.end().status.success());
    let expected = [last + 1, last + 2].map(|number| format!("{number:06}.snap"));
    assert_eq!(names(&out), expected, "the newest one is on the other one");
    // A damaged one is passed over, and said so.
    std::fs::write(out.join(&expected[1]), "damaged").expect("it is written");
    let info = snap([Path::new("info"), &out]).ok();
    assert!(info.stderr.contains(&expected[0]), "{}", info.stderr);
    vm.interrupt();
}

#[test]
fn one_process_writes_to_a_folder_and_ctrl_c_ends_it() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut vm = Vm::booted(folder.path());
    let out = folder.path().join("checkpoints");
    let mut run = Checkpoints::start(&vm, &out, &["--every", "1h", "--keep", "1"]);
    run.wait_for("checkpoint");
    let another = Checkpoints::start(&vm, &out, &["--every", "1s", "--keep", "1"]).end();
    let error = String::from_utf8_lossy(&another.stderr).into_owned();
    assert!(
        another.status.code() == Some(1) && error.contains("another snap checkpoint"),
        "{error}"
    );
    run.interrupt();
    assert_eq!(names(&out), ["000001.snap"]);
    vm.beats(2);
    // A snapshot of another kind is possible: then a new chain begins.
    vm.create(&folder.path().join("live.snap"), &["--live"]).ok();
    vm.beats(1);
    let never = folder.path().join("api-of-none");
    snap([
        "checkpoint".as_ref(),
        "--vm".as_ref(),
        never.as_os_str(),
        "--every".as_ref(),
        "1s".as_ref(),
        "--keep".as_ref(),
        "1".as_ref(),
        "-o".as_ref(),
        out.as_os_str(),
    ])
    .failed(1, &["cannot ask the guest"]);
    vm.interrupt();
}

/// The request of a checkpoint, by the control socket.
fn ask(vm: &Vm, out: &Path, checkpoint: &Value) -> (u16, Value) {
    let body = json!({ "snapshot_path": out, "type": "live", "checkpoint": checkpoint });
    vm.ask("PUT", "/snapshot/create", &body)
}

/// What a failed checkpoint would have had is in the next one.
#[test]
fn a_checkpoint_that_fails_loses_no_change() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut vm = Vm::booted(folder.path());
    let path = |name: &str| folder.path().join(name);
    let (status, first) = ask(&vm, &path("1.snap"), &json!({ "track_ms": 60000 }));
    assert_eq!(status, 200, "{first}");
    let next = json!({ "parent": path("1.snap"), "track_ms": 60000 });
    for _ in 0..3 {
        vm.beats(2);
        let (status, fault) = ask(&vm, &path("no-folder/2.snap"), &next);
        assert_eq!(status, 500, "{fault}");
    }
    vm.beats(1);
    vm.set("Paused");
    let (status, second) = ask(&vm, &path("2.snap"), &next);
    assert_eq!((status, &second["parent_id"]), (200, &first["id"]), "{second}");
    vm.create(&path("paused.snap"), &[]).ok();
    assert!(memory_of(&path("2.snap")) == memory_of(&path("paused.snap")));
    // It is not the last one any more: its changes would not be enough.
    let (status, other) = ask(&vm, &path("3.snap"), &next);
    assert_eq!((status, &other["parent_id"]), (200, &Value::Null), "{other}");
    // Nothing is known of what has changed after this time.
    let (status, fourth) = ask(&vm, &path("4.snap"), &json!({ "track_ms": 1 }));
    assert_eq!(status, 200, "{fourth}");
    thread::sleep(Duration::from_millis(500));
    let (status, fifth) =
        ask(&vm, &path("5.snap"), &json!({ "parent": path("4.snap"), "track_ms": 1 }));
    assert_eq!((status, &fifth["parent_id"]), (200, &Value::Null), "{fifth}");
    for (wrong, part) in [
        (json!({ "track_ms": 0 }), "track_ms"),
        (json!({ "track_ms": 86_400_001 }), "track_ms"),
        (json!({ "parent": "1.snap", "track_ms": 1 }), "relative"),
        (json!({ "parent": path("1.snap") }), "track_ms"),
    ] {
        let (status, fault) = ask(&vm, &path("6.snap"), &wrong);
        let message = fault["fault_message"].as_str().expect("there is one");
        assert!(status == 400 && message.contains(part), "{status} {message}");
    }
    let body = json!({ "snapshot_path": path("6.snap"), "checkpoint": { "track_ms": 1 } });
    assert_eq!(vm.ask("PUT", "/snapshot/create", &body).0, 400);
    vm.set("Resumed");
    vm.beats(2);
    vm.interrupt();
}

/// A guest that was restored from a file of the folder needs that file as long as it runs: a chain may begin on it again.
#[test]
fn the_file_that_the_guest_was_restored_from_is_kept() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("checkpoints");
    let options = ["--every", "20ms", "--keep", "2", "--merge-at", "3"];
    let mut vm = Vm::booted(folder.path());
    let run = Checkpoints::start(&vm, &out, &[&options[..], &["--count", "2"]].concat());
    assert!(run.end().status.success());
    vm.interrupt();
    // It is a layer, and both of its files are needed.
    let out_text = out.to_str().expect("text");
    vm = Vm::start(folder.path(), &["restore", out_text, "--lazy", "--populate", "off"]);
    let mut run = Checkpoints::start(&vm, &out, &options);
    for _ in 0..2 {
        run.wait_for("merged");
        run.wait_for("removed");
    }
    let is_kept = || {
        let kept = names(&out);
        assert_eq!(kept[..2], ["000001.snap", "000002.snap"], "{kept:?}");
    };
    is_kept();
    // This ends the chain. The next one begins on the same file.
    let live = || vm.create(&folder.path().join("live.snap"), &["--live"]);
    // It is refused while a checkpoint is written.
    while let refused @ Ran { code: Some(1), .. } = live() {
        refused.failed(1, &["is being snapshotted"]);
    }
    while run.wait_for("checkpoint")["parents"] != 2 {}
    run.wait_for("merged");
    run.interrupt();
    is_kept();
    runs(&out);
    vm.beats(2);
    vm.interrupt();
}

/// A guest whose checkpoints could not be opened is refused before the first one.
#[test]
fn a_guest_whose_file_does_not_open_is_refused() {
    needs_vm!();
    let sample = Sample::small();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("moved.snap");
    std::fs::copy(&sample.file, &file).expect("it is copied");
    let mut vm = Vm::start(folder.path(), &["restore", file.to_str().expect("text")]);
    std::fs::remove_file(&file).expect("it is there");
    let out = folder.path().join("checkpoints");
    let run = Checkpoints::start(&vm, &out, &["--every", "1s", "--keep", "1"]).end();
    let error = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(error.contains("could not be opened") && error.contains("moved.snap"), "{error}");
    assert_ne!(run.status.code(), Some(0));
    assert!(names(&out).is_empty());
    vm.create(&folder.path().join("layer.snap"), &["--diff"]).failed(1, &["no longer the file"]);
    vm.beats(1);
    let never = Checkpoints::start(&vm, &out, &["--every", "0s", "--keep", "1"]).end();
    assert_eq!(never.status.code(), Some(2));
    vm.interrupt();
}
