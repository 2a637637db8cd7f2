//! Snapshots of guests that run on: `snap create --vm SOCKET --live`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::control::Vm;
use crate::overlays::Place;
use crate::support::{SNAP, Sample, end_of, names, needs_vm, restore, signal, snap, start};

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// The guest's memory, page by page.
#[track_caller]
pub(crate) fn memory_of(file: &Path) -> Vec<u8> {
    let folder = folder();
    let raw = folder.path().join("raw");
    let (file, out) = (file.to_str().expect("text"), raw.to_str().expect("text"));
    snap(["export", file, "--format", "raw", "-o", out, "--force"]).ok();
    std::fs::read(raw).expect("it can be read")
}

/// A restored guest checks its own pages.
#[track_caller]
pub(crate) fn runs(file: &Path) {
    for options in [&["--beats", "3"][..], &["--beats", "3", "--lazy"]] {
        let report = restore(file, options).ok().report();
        assert_eq!((&report["beats"], &report["bad_beats"]), (&json!(3), &json!(0)));
    }
}

/// The guests that are snapshotted: booted, and restored in each way that has live snapshots.
const GUESTS: [&[&str]; 4] = [
    &["run", "--memory", "64M", "--work", "8M"],
    &["restore", "FILE"],
    &["restore", "FILE", "--lazy", "--populate", "off"],
    &["restore", "FILE", "--lazy", "--populate", "full"],
];

fn started(sample: &Sample, guest: &[&str]) -> Vm {
    let file = sample.file.to_str().expect("text");
    let args: Vec<_> = guest.iter().map(|arg| if *arg == "FILE" { file } else { arg }).collect();
    Vm::start(sample.folder.path(), &args)
}

#[test]
fn a_live_snapshot_is_whole_and_its_guest_runs_on() {
    needs_vm!();
    let sample = Sample::small();
    for guest in GUESTS {
        let mut vm = started(&sample, guest);
        let out = sample.folder.path().join("live.snap");
        let summary = vm.create(&out, &["--live", "--json"]).ok().json();
        let (pause, all) = (&summary["pause_ms"], &summary["total_ms"]);
        assert!(pause.as_f64() > Some(0.0) && pause.as_f64() < all.as_f64(), "{summary}");
        assert!(summary["live"]["arm_ms"].as_f64() > Some(0.0), "{summary}");
        vm.beats(2);
        runs(&out);
        if guest[0] == "restore" {
            let layer = sample.folder.path().join("layer.snap");
            let summary = vm.create(&layer, &["--live", "--diff", "--force", "--json"]).ok().json();
            assert!(summary["parent_id"].is_string(), "{summary}");
            vm.beats(2);
            runs(&layer);
        }
        vm.interrupt();
        std::fs::remove_file(&out).expect("it is there");
    }
}

/// From the same paused guest, a live snapshot has the same pages as one that lets it wait; so has one whose guest
/// is resumed immediately.
#[test]
fn a_live_snapshot_equals_one_of_a_paused_guest() {
    needs_vm!();
    let sample = Sample::small();
    for guest in GUESTS {
        let mut vm = started(&sample, guest);
        vm.beats(3);
        vm.set("Paused");
        let path = |name: &str| sample.folder.path().join(name);
        vm.create(&path("paused.snap"), &[]).ok();
        vm.create(&path("live.snap"), &["--live"]).ok();
        let expected = memory_of(&path("paused.snap"));
        assert!(memory_of(&path("live.snap")) == expected, "{guest:?}");
        // The guest writes to its pages while they are saved.
        let request = json!({ "snapshot_path": path("busy.snap"), "type": "live", "threads": 1 });
        let (status, answer) = thread::scope(|scope| {
            let asking = scope.spawn(|| vm.ask("PUT", "/snapshot/create", &request));
            while vm.ask("GET", "/vm", &Value::Null).1["saving"].is_null() && !asking.is_finished()
            {
                thread::yield_now();
            }
            vm.set("Resumed");
            asking.join().expect("no panic")
        });
        assert_eq!(status, 200, "{answer}");
        vm.beats(2);
        assert!(memory_of(&path("busy.snap")) == expected, "{guest:?}");
        if guest[0] == "restore" {
            vm.set("Paused");
            vm.create(&path("paused.layer"), &["--diff"]).ok();
            vm.create(&path("live.layer"), &["--diff", "--live"]).ok();
            assert!(memory_of(&path("live.layer")) == memory_of(&path("paused.layer")));
            vm.set("Resumed");
            vm.beats(1);
        }
        vm.interrupt();
        for name in ["paused.snap", "live.snap", "busy.snap"] {
            std::fs::remove_file(path(name)).expect("it is there");
        }
        for name in ["paused.layer", "live.layer"] {
            let _ = std::fs::remove_file(path(name));
        }
    }
}

#[test]
fn a_hundred_cuts_in_a_row_each_restore() {
    needs_vm!();
    let folder = folder();
    let mut vm = Vm::booted(folder.path());
    let out = folder.path().join("live.snap");
    for cut in 0..100 {
        vm.create(&out, &["--live", "--force", "--codec", "lz4"]).ok();
        vm.beats(1);
        let options =
            if cut % 2 == 0 { &["--beats", "2"][..] } else { &["--beats", "2", "--lazy"] };
        let report = restore(&out, options).ok().report();
        assert_eq!((&report["beats"], &report["bad_beats"]), (&json!(2), &json!(0)), "cut {cut}");
    }
    vm.interrupt();
}

/// A guest that takes seconds to save.
fn slow(folder: &Path) -> (Vm, PathBuf, Value) {
    let vm = Vm::start(folder, &["run", "--memory", "512M", "--work", "384M"]);
    let out = folder.join("out.snap");
    let body = json!({
        "snapshot_path": out, "type": "live", "codec": "zstd", "level": 19, "threads": 1
    });
    (vm, out, body)
}

fn wait_until_saving(vm: &Vm, saving: bool) {
    while vm.ask("GET", "/vm", &Value::Null).1["saving"].is_null() == saving {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Sends the request, and does not wait for the answer.
fn begun(vm: &Vm, body: &Value) -> std::os::unix::net::UnixStream {
    let body = body.to_string();
    let mut client = vm.connect();
    let head = "PUT /snapshot/create HTTP/1.1\r\nConnection: close\r\nContent-Length: ";
    write!(client, "{head}{}\r\n\r\n{body}", body.len()).expect("it can be sent");
    wait_until_saving(vm, true);
    client
}

#[test]
fn one_at_a_time_and_a_cancelled_one_has_no_file() {
    needs_vm!();
    let folder = folder();
    let (mut vm, _, body) = slow(folder.path());
    // By a request, and by a client that leaves.
    for leaves in [false, true] {
        let client = begun(&vm, &body);
        let (status, fault) = vm.ask("PUT", "/snapshot/create", &body);
        assert_eq!(
            (status, &fault["fault_message"]),
            (409, &json!("the guest is being snapshotted"))
        );
        // The guest runs, and can be paused and resumed.
        vm.beats(2);
        vm.set("Paused");
        vm.set("Resumed");
        vm.beats(1);
        match leaves {
            true => drop(client),
            false => assert_eq!(vm.ask("DELETE", "/snapshot/create", &Value::Null).0, 204),
        }
        wait_until_saving(&vm, false);
        vm.beats(2);
        assert_eq!(names(folder.path()), ["api"]);
    }
    assert_eq!(vm.ask("DELETE", "/snapshot/create", &Value::Null).0, 409);
    vm.interrupt();
}

#[test]
fn an_interrupt_during_a_live_snapshot_leaves_no_file() {
    needs_vm!();
    let folder = folder();
    // Of the guest.
    let (vm, _, body) = slow(folder.path());
    let client = begun(&vm, &body);
    vm.interrupt();
    drop(client);
    assert!(names(folder.path()).is_empty());
    // Of the command.
    let (mut vm, out, _) = slow(folder.path());
    let mut command = Command::new(SNAP);
    command.args(["create", "--live", "--level", "19", "--threads", "1", "--vm"]);
    command.arg(&vm.socket).arg(&out).stdin(Stdio::null());
    let child = start(command);
    wait_until_saving(&vm, true);
    signal(child.id(), "INT");
    assert_eq!(end_of(child).status.code(), Some(130));
    wait_until_saving(&vm, false);
    vm.beats(2);
    assert_eq!(names(folder.path()), ["api"]);
    vm.interrupt();
}

#[test]
fn a_killed_process_leaves_no_file() {
    needs_vm!();
    for delay_ms in [0, 20, 200] {
        let folder = folder();
        let (mut vm, _, body) = slow(folder.path());
        let client = begun(&vm, &body);
        thread::sleep(Duration::from_millis(delay_ms));
        let child = vm.child.take().expect("it runs");
        signal(child.id(), "KILL");
        assert_eq!(end_of(child).status.code(), None);
        drop(client);
        assert_eq!(names(folder.path()), ["api"]);
    }
}

/// A disk that is full, by the limit of a file's size.
#[test]
fn a_full_disk_leaves_no_file_and_the_guest_unharmed() {
    needs_vm!();
    let folder = folder();
    let mut vm = Vm::booted(folder.path());
    let pid = vm.child.as_ref().expect("it runs").id().to_string();
    let limit = |bytes: &str| {
        let limited =
            Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:")]).status();
        assert!(limited.expect("prlimit runs").success());
    };
    let out = folder.path().join("out.snap");
    limit("65536");
    for _ in 0..3 {
        vm.create(&out, &["--live"]).failed(1, &["out.snap: File too large"]);
        vm.beats(2);
        assert_eq!(names(folder.path()), ["api"]);
    }
    limit("unlimited");
    vm.create(&out, &["--live"]).ok();
    vm.beats(2);
    runs(&out);
    vm.interrupt();
}

#[test]
fn what_cannot_be_live_says_what_to_do() {
    needs_vm!();
    let sample = Sample::small();
    let raw = sample.folder.path().join("memory.raw");
    let (file, image) = (sample.file.to_str().expect("text"), raw.to_str().expect("text"));
    snap(["export", file, "--format", "raw", "-o", image]).ok();
    let mut vm = Vm::start(sample.folder.path(), &["restore", file, "--image", image]);
    let out = sample.folder.path().join("out.snap");
    let paused = "let it be paused until the snapshot is complete";
    vm.create(&out, &["--live"]).failed(1, &["a mapping of an image", paused]);
    vm.beats(1);
    vm.create(&out, &["--live", "--stop"]).failed(2, &["--stop"]);
    let stop = json!({ "snapshot_path": out, "type": "live", "stop": true });
    assert_eq!(vm.ask("PUT", "/snapshot/create", &stop).0, 400);
    vm.create(&out, &["--live", "--diff"]).failed(1, &["a mapping of an image", paused]);
    assert!(!out.exists());
    vm.interrupt();
}

/// The writes to a disk with an overlay are in the snapshot; a disk that is written itself would be newer than it.
#[test]
fn a_disk_with_an_overlay_is_frozen_and_one_without_is_refused() {
    needs_vm!();
    let place = Place::new();
    place.create("");
    let folder = place.0.path();
    let (file, out) = (folder.join("a.snap"), folder.join("live.snap"));
    let file = file.to_str().expect("text");
    for (disk, refused) in [(&[][..], true), (&["--disk-overlay", "memory"][..], false)] {
        let vm = Vm::start_paused(folder, &[&["restore", file, "--paused"][..], disk].concat());
        vm.wait_until_paused();
        let ran = vm.create(&out, &["--live"]);
        match refused {
            true => drop(ran.failed(1, &["disk.img", "newer than the snapshot", "overlay"])),
            false => drop(ran.ok()),
        }
    }
    assert_eq!(place.snap("restore FOLDER/live.snap").ok().stdout, "W\nd\nR\nR\nd\n");
    assert_eq!(place.image(), "dWd");
}
