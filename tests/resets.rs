//! Guests that are put back to their snapshot: `snap reset --vm SOCKET`.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::control::Vm;
use crate::failing_restores::damage_later_half;
use crate::overlays::{Place, read, write};
use crate::serving::Serving;
use crate::support::{Ran, SNAP, Sample, needs_vm, snap, start};
use crate::{kernel, virtio_guest};

fn reset(vm: &Vm, options: &[&str]) -> Ran {
    let args = ["reset".as_ref(), "--vm".as_ref(), vm.socket.as_os_str()];
    snap(args.into_iter().chain(options.iter().map(std::ffi::OsStr::new)))
}

/// Reads a number of beats, all of which are ok. A line that was cut by a reset is none.
#[track_caller]
fn beats(vm: &mut Vm, count: usize) {
    let mut seen = 0;
    while seen < count {
        let line = vm.line();
        assert!(!line.contains("BAD"), "{line}");
        seen += usize::from(line.starts_with("beat ") && line.ends_with(" ok"));
    }
}

#[track_caller]
fn memory_of(file: &Path) -> Vec<u8> {
    let raw = file.with_extension("raw");
    let (file, out) = (file.to_str().expect("text"), raw.to_str().expect("text"));
    snap(["export", file, "--format", "raw", "-o", out, "--force"]).ok();
    fs::read(raw).expect("it can be read")
}

/// Restores a guest in this way, resets it several times, and compares its memory each time.
#[track_caller]
fn is_reset(sample: &Sample, options: &[&str]) {
    let file = sample.file.to_str().expect("text");
    let expected = memory_of(&sample.file);
    let mut vm = Vm::start(sample.folder.path(), &[&["restore", file], options].concat());
    for round in 0..4 {
        beats(&mut vm, 3);
        let summary = reset(&vm, &["--json"]).ok().json();
        // In later rounds the beats may be those from before a reset, and the guest may have done nothing since.
        assert!(round > 0 || summary["memory_bytes"].as_u64() > Some(0), "{summary}");
        assert!(summary["pause_ms"].as_f64() >= summary["reset_ms"].as_f64(), "{summary}");
        assert_eq!(summary["snapshot"], json!(sample.file), "{summary}");
        // It runs on, and checks its pages.
        beats(&mut vm, 3);
        // One that is paused stays so, and is the snapshot.
        vm.set("Paused");
        let summary = reset(&vm, &["--json"]).ok().json();
        assert_eq!(summary["pause_ms"], json!(0.0), "{summary}");
        assert_eq!(vm.ask("GET", "/vm", &Value::Null).1["state"], "Paused");
        let now = sample.folder.path().join("now.snap");
        vm.create(&now, &["--force"]).ok();
        assert!(memory_of(&now) == expected, "{options:?}, round {round}");
        if options.contains(&"--share") {
            // All pages are those of the snapshot already, also the many that were only read and are zero.
            let summary = reset(&vm, &["--json"]).ok().json();
            assert_eq!(summary["memory_bytes"], json!(0), "{summary}");
        }
        vm.set("Resumed");
    }
    // Live snapshots before and after resets.
    if !options.contains(&"--share") && !options.contains(&"--image") {
        let live = sample.folder.path().join("live.snap");
        for _ in 0..2 {
            vm.create(&live, &["--live", "--force"]).ok();
            reset(&vm, &[]).ok();
            beats(&mut vm, 2);
            vm.create(&live, &["--live", "--diff", "--force"]).ok();
            let report = crate::support::restore(&live, &["--beats", "2"]).ok().report();
            assert_eq!(report["bad_beats"], json!(0));
        }
    }
    beats(&mut vm, 2);
    vm.interrupt();
}

#[test]
fn guests_with_their_own_memory_are_reset() {
    needs_vm!();
    let sample = Sample::small();
    is_reset(&sample, &["--lazy", "--populate", "off"]);
    is_reset(&sample, &["--lazy"]);
    is_reset(&sample, &["--lazy", "--populate", "full"]);
    is_reset(&sample, &[]);
}

#[test]
fn guests_whose_memory_is_a_mapping_are_reset() {
    needs_vm!();
    let sample = Sample::small();
    memory_of(&sample.file);
    let raw = sample.file.with_extension("raw");
    let image = sample.folder.path().join("image");
    fs::copy(raw, &image).expect("it is copied");
    is_reset(&sample, &["--image", image.to_str().expect("text")]);
    let serving = Serving::start(&sample);
    is_reset(&sample, &["--lazy", "--share", serving.socket.to_str().expect("text")]);
    assert_eq!(serving.end("TERM"), Some(130));
}

/// The guest reads W, which is in the snapshot, and d, which is in the image. It writes R to both, and reads the second
/// again. Then it does nothing more, so that a reset finds all of it done.
#[test]
fn overlays_are_reset() {
    needs_vm!();
    let place = Place::new();
    let code = [
        virtio_guest::start(0, 0),
        write(1, 1, b'W'),
        virtio_guest::request(),
        read(2, 1),
        read(3, 2),
        write(4, 1, b'R'),
        write(5, 2, b'R'),
        read(6, 2),
        // jmp to itself
        vec![0xeb, 0xfe],
    ];
    let folder = place.0.path().to_owned();
    fs::write(folder.join("kernel"), kernel::elf(&code.concat(), true, 0)).expect("it is written");
    for disk in [",overlay", ""] {
        place.create(&format!("{disk} --force"));
        for lazy in [&["--lazy"][..], &[]] {
            let file = folder.join("a.snap");
            let args = ["restore", file.to_str().expect("text"), "--disk-overlay", "memory"];
            let mut vm = Vm::start_paused(&folder, &[&args[..], lazy].concat());
            for round in 0..5 {
                let lines = [vm.line(), vm.line(), vm.line()];
                assert_eq!(lines, ["W", "d", "R"], "{disk:?} {lazy:?}, round {round}");
                reset(&vm, &[]).ok();
            }
            vm.interrupt();
        }
    }
}

/// The guest shows a page, gives it back, and shows it again. After a reset it has its content again.
#[test]
fn memory_that_was_given_back_is_there_again() {
    needs_vm!();
    const PAGES: u32 = 0x40_0000;
    const REPORT_QUEUE: u32 = 2;
    let folder = tempfile::tempdir().expect("a folder");
    let code = [
        virtio_guest::fill(PAGES, 64 << 10, b'A'),
        virtio_guest::request(),
        virtio_guest::show(PAGES + (32 << 10)),
        virtio_guest::start(1 << 5, REPORT_QUEUE),
        virtio_guest::submit(REPORT_QUEUE, 1, &[(PAGES, 64 << 10, virtio_guest::WRITE)]),
        virtio_guest::show(PAGES),
        vec![0xeb, 0xfe],
    ];
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("kernel"), kernel::elf(&code.concat(), true, 0)).expect("it is written");
    snap(["create", &path("a.snap"), "--balloon", "--kernel", &path("kernel")]).ok();
    for lazy in [&["--lazy"][..], &[]] {
        let file = path("a.snap");
        let args = [&["restore", &file], lazy].concat();
        let mut vm = Vm::start_paused(folder.path(), &args);
        for round in 0..5 {
            assert_eq!([vm.line(), vm.line()], ["A", "0"], "{lazy:?}, round {round}");
            reset(&vm, &[]).ok();
        }
        vm.interrupt();
    }
}

#[test]
fn a_guest_that_writes_a_disk_is_not_reset() {
    needs_vm!();
    let place = Place::new();
    place.create("");
    let folder = place.0.path().to_owned();
    let file = folder.join("a.snap");
    let vm = Vm::start_paused(&folder, &["restore", file.to_str().expect("text"), "--paused"]);
    vm.wait_until_paused();
    let (status, fault) = vm.ask("PUT", "/snapshot/load", &json!({ "type": "reset" }));
    assert_eq!(status, 400, "{fault}");
    let message = fault["fault_message"].as_str().expect("a reason");
    assert!(message.contains("disk.img, which a reset cannot undo"), "{message}");
    assert_eq!(vm.ask("GET", "/vm", &Value::Null).1["state"], "Paused");
}

/// A guest between two states does not run.
#[test]
fn a_reset_that_fails_in_the_middle_stops_the_guest() {
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_str().expect("text");
    let mut vm = Vm::start(sample.folder.path(), &["restore", file]);
    // It has written to pages all over its memory.
    beats(&mut vm, 3);
    damage_later_half(&sample);
    reset(&vm, &[]).failed(1, &["the guest was partly reset, and is stopped", "checksum"]);
    vm.end().failed(5, &["the guest was partly reset", "checksum"]);
}

/// The next checkpoint after a reset that was refused has only what has changed. After a reset it begins a new chain.
#[test]
fn checkpoints_continue_after_a_refusal() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let checkpoint = |vm: &Vm, out: &str, parent: Option<&str>| {
        let mut how = json!({ "track_ms": 60000 });
        if let Some(parent) = parent {
            how["parent"] = json!(path(parent));
        }
        let body = json!({ "snapshot_path": path(out), "type": "live", "checkpoint": how });
        let (status, answer) = vm.ask("PUT", "/snapshot/create", &body);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let mut vm = Vm::booted(folder.path());
    let first = checkpoint(&vm, "1.snap", None);
    beats(&mut vm, 1);
    reset(&vm, &[]).failed(1, &["the guest was not restored from a snapshot"]);
    let second = checkpoint(&vm, "2.snap", Some("1.snap"));
    assert_eq!(second["parent_id"], first["id"], "{second}");
    vm.interrupt();

    let file = path("1.snap");
    let mut vm = Vm::start(folder.path(), &["restore", file.to_str().expect("text"), "--lazy"]);
    checkpoint(&vm, "3.snap", None);
    reset(&vm, &[]).ok();
    let next = checkpoint(&vm, "4.snap", Some("3.snap"));
    // That of the guest's snapshot, and not of the last checkpoint.
    assert_eq!(next["parent_id"], first["id"], "{next}");
    beats(&mut vm, 2);
    vm.interrupt();
}

#[test]
fn what_cannot_be_reset_continues() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let mut vm = Vm::booted(folder.path());
    reset(&vm, &[]).failed(1, &["the guest was not restored from a snapshot"]);
    beats(&mut vm, 2);
    vm.interrupt();
    let mut command = Command::new(SNAP);
    command.args(["reset", "--vm"]).arg(folder.path().join("api"));
    let ran = Ran::from(crate::support::end_of(start(command)));
    ran.failed(1, &["cannot ask the guest"]);

    // Not while a live snapshot is written.
    let sample = Sample::create(&["--memory", "256M", "--work", "128M"]);
    let file = sample.file.to_str().expect("text");
    let mut vm = Vm::start(sample.folder.path(), &["restore", file]);
    let out = sample.folder.path().join("out.snap");
    let body = json!({
        "snapshot_path": out, "type": "live", "codec": "zstd", "level": 19, "threads": 1
    });
    std::thread::scope(|scope| {
        let saving = scope.spawn(|| vm.ask("PUT", "/snapshot/create", &body));
        while vm.ask("GET", "/vm", &Value::Null).1["saving"].is_null() {
            std::thread::yield_now();
        }
        reset(&vm, &[]).failed(1, &["the guest is being snapshotted"]);
        assert_eq!(vm.ask("DELETE", "/snapshot/create", &Value::Null).0, 204);
        assert_eq!(saving.join().expect("no panic").0, 500);
    });
    reset(&vm, &[]).ok();
    beats(&mut vm, 2);
    vm.interrupt();
}
