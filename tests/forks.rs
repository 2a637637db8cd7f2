//! Guests that continue from where a running guest is: `snap fork --vm SOCKET`.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::control::{Vm, ask};
use crate::support::{Ran, Sample, needs_vm, snap};

/// The numbers of the beats in a child's output, all of which are ok.
#[track_caller]
fn beats(log: &Path) -> Vec<u64> {
    let text = fs::read_to_string(log).expect("it is there");
    assert!(!text.contains("BAD"), "{text}");
    let number = |line: &str| line.strip_prefix("beat ")?.strip_suffix(" ok")?.parse().ok();
    text.lines().filter_map(number).collect()
}

fn fork(vm: &Vm, options: &[&str]) -> Ran {
    let args = ["fork".as_ref(), "--vm".as_ref(), vm.socket.as_os_str()];
    snap(args.into_iter().chain(options.iter().map(std::ffi::OsStr::new)))
}

#[test]
fn children_continue_where_the_guest_was_and_it_runs_on() {
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_str().expect("text");
    for guest in [
        &["run", "--memory", "64M", "--work", "8M"][..],
        &["restore", file, "--lazy"],
        &["restore", file],
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut vm = Vm::start(folder.path(), guest);
        vm.beats(20);
        let log = folder.path().join("{}.log");
        let log = log.to_str().expect("text");
        let options = ["-n", "3", "--json", "--log", log, "--", "--beats", "5"];
        let started = fork(&vm, &options).ok().json();
        assert_eq!(started["children"].as_array().map(Vec::len), Some(3), "{started}");
        let logs: Vec<_> = (0..3).map(|n| beats(&folder.path().join(format!("{n}.log")))).collect();
        for seen in &logs {
            // A line that was begun before the cut is not whole.
            assert!(seen.len() >= 4 && seen[0] > 20, "{seen:?}");
            assert!(seen.is_sorted_by(|one, next| one + 1 == *next), "{seen:?}");
            assert_eq!(seen[0], logs[0][0]);
        }
        vm.beats(3);
        vm.interrupt();
    }
}

#[test]
fn a_child_is_the_guest_and_can_be_forked_and_reset() {
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_str().expect("text");
    let vm = Vm::start(sample.folder.path(), &["restore", file, "--lazy"]);
    vm.set("Paused");
    let path = |name: &str| sample.folder.path().join(name).display().to_string();
    vm.create(Path::new(&path("now.snap")), &[]).ok();
    // The child's children are those of a guest that shares memory.
    let run = |socket: &str, options: &[&str]| {
        let args = ["fork", "--vm", socket, "--log"];
        snap(args.iter().chain(options).copied())
    };
    let socket = vm.socket.display().to_string();
    let (log, inner) = (path("{}.log"), path("inner-{}.log"));
    let api = path("child-{}");
    std::thread::scope(|scope| {
        let forked = scope.spawn(|| run(&socket, &[&log, "--", "--paused", "--api", &api]));
        let child = path("child-0");
        while !Path::new(&child).exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        snap(["create", &path("child.snap"), "--vm", &child]).ok();
        let differ = snap(["diff", &path("now.snap"), &path("child.snap"), "--json"]).ok().json();
        assert_eq!(differ["differing_pages"], json!(0), "{differ}");
        run(&child, &[&inner, "--", "--beats", "2"]).failed(1, &["shares the memory"]);
        run(&child, &[&inner, "--pause", "--", "--beats", "2"]).ok();
        assert!(!beats(Path::new(&path("inner-0.log"))).is_empty());
        let resumed = ask(Path::new(&child), "PATCH", "/vm", &json!({ "state": "Resumed" }));
        assert_eq!(resumed.0, 204);
        snap(["reset", "--vm", &child]).ok();
        while !fs::read_to_string(path("0.log")).is_ok_and(|text| text.contains(" ok")) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        snap(["create", &path("end.snap"), "--vm", &child, "--stop"]).ok();
        forked.join().expect("no panic").ok();
    });
    assert!(!beats(Path::new(&path("0.log"))).is_empty());
    vm.set("Resumed");
    vm.interrupt();
}

#[test]
fn a_child_that_fails_is_reported() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let mut vm = Vm::booted(folder.path());
    fork(&vm, &["-n", "2", "--", "--memory", "1G"]).failed(1, &["2 of 2 children failed; child 0"]);
    fork(&vm, &["--log", "/nowhere/{}"]).failed(1, &["cannot create /nowhere/0"]);
    // The second child would have the same file: no child is started, and no file is left.
    let log = folder.path().join("one.log");
    let log = log.to_str().expect("text");
    fork(&vm, &["-n", "2", "--log", log]).failed(1, &["cannot create", "one.log"]);
    assert!(!Path::new(log).exists());
    vm.beats(2);
    vm.interrupt();
}

/// A layer on the snapshot that the guest was restored from could not be opened: the cut has all of the guest.
#[test]
fn a_guest_whose_snapshot_was_replaced_is_forked() {
    needs_vm!();
    let sample = Sample::small();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("replaced.snap");
    fs::copy(&sample.file, &file).expect("it is copied");
    let mut vm = Vm::start(folder.path(), &["restore", file.to_str().expect("text"), "--lazy"]);
    fs::remove_file(&file).expect("it is there");
    fs::copy(&sample.file, &file).expect("it is copied again");
    let log = folder.path().join("{}.log");
    let options = ["-n", "2", "--log", log.to_str().expect("text"), "--", "--beats", "3"];
    fork(&vm, &options).ok();
    for child in ["0.log", "1.log"] {
        assert!(!beats(&folder.path().join(child)).is_empty());
    }
    vm.beats(2);
    vm.interrupt();
}
