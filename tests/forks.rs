//! Guests that continue from where a running guest is: `snap fork --vm SOCKET`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::control::{Vm, ask};
use crate::support::{Ran, SNAP, Sample, end_of, needs_vm, signal, snap, start};

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

/// The command, which runs.
fn begin_fork(vm: &Vm, options: &[&str]) -> Child {
    let mut command = Command::new(SNAP);
    command.args(["fork", "--vm"]).arg(&vm.socket).args(options);
    start(command)
}

fn wait_for(file: &Path) {
    while !file.exists() {
        thread::sleep(Duration::from_millis(1));
    }
}

/// A guest with so much memory that its children run before all of it is copied.
const LARGE: [&str; 4] = ["--memory", "96M", "--work", "24M"];

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
    thread::scope(|scope| {
        let forked = scope.spawn(|| run(&socket, &[&log, "--", "--paused", "--api", &api]));
        let child = path("child-0");
        wait_for(Path::new(&child));
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
            thread::sleep(Duration::from_millis(5));
        }
        snap(["create", &path("end.snap"), "--vm", &child, "--stop"]).ok();
        forked.join().expect("no panic").ok();
    });
    assert!(!beats(Path::new(&path("0.log"))).is_empty());
    vm.set("Resumed");
    vm.interrupt();
}

/// KVM's log names the pages that are copied: a fork must not forget them, and a reset must.
#[test]
fn each_fork_has_all_that_the_guest_has_written() {
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_str().expect("text");
    for options in [&["--lazy", "--populate", "off"][..], &["--lazy", "--populate", "full"], &[]] {
        let folder = tempfile::tempdir().expect("a folder");
        let vm = Vm::start(folder.path(), &[&["restore", file], options].concat());
        let path = |name: &str| folder.path().join(name).display().to_string();
        let socket = vm.socket.to_str().expect("text");
        for turn in ["first", "second", "reset", "after"] {
            if turn == "reset" {
                snap(["reset", "--vm", socket]).ok();
            }
            thread::sleep(Duration::from_millis(200));
            vm.set("Paused");
            let (now, there) = (path(&format!("{turn}-now.snap")), path(&format!("{turn}.snap")));
            vm.create(Path::new(&now), &[]).ok();
            let child = path(turn);
            let fork = begin_fork(&vm, &["--", "--paused", "--api", &child, "--beats", "1"]);
            wait_for(Path::new(&child));
            snap(["create", &there, "--vm", &child]).ok();
            let differ = snap(["diff", &now, &there, "--json"]).ok().json();
            assert_eq!(differ["differing_pages"], json!(0), "{options:?}, {turn}: {differ}");
            let resumed = ask(Path::new(&child), "PATCH", "/vm", &json!({ "state": "Resumed" }));
            assert_eq!(resumed.0, 204);
            Ran::from(end_of(fork)).ok();
            vm.set("Resumed");
        }
        vm.interrupt();
    }
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

/// The guest rewrites its memory while it is copied, and the children ask for pages meanwhile.
#[test]
fn all_children_have_the_memory_of_one_point_in_time() {
    needs_vm!();
    let sample = Sample::create(&LARGE);
    let file = sample.file.to_str().expect("text");
    let booted = [&["run"][..], &LARGE].concat();
    for guest in [&booted[..], &["restore", file, "--lazy"], &["restore", file]] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let mut vm = Vm::start(folder.path(), guest);
        vm.beats(3);
        let (log, api) = (path("{}.log"), path("child-{}"));
        let options = ["-n", "3", "--log", &log, "--", "--paused", "--api", &api, "--beats", "5"];
        let fork = begin_fork(&vm, &options);
        let children: Vec<PathBuf> = (0..3).map(|n| path(&format!("child-{n}")).into()).collect();
        children.iter().for_each(|child| wait_for(child));
        thread::scope(|scope| {
            for (number, child) in children.iter().enumerate() {
                let out = path(&format!("{number}.snap"));
                let create = move || {
                    let socket = child.to_str().expect("text");
                    snap(["create", &out, "--vm", socket, "--codec", "lz4"]).ok();
                };
                scope.spawn(create);
            }
        });
        for other in ["1.snap", "2.snap"] {
            let differ = snap(["diff", &path("0.snap"), &path(other), "--json"]).ok().json();
            assert_eq!(differ["differing_pages"], json!(0), "{guest:?}: {differ}");
        }
        for child in &children {
            let resumed = ask(child, "PATCH", "/vm", &json!({ "state": "Resumed" }));
            assert_eq!(resumed.0, 204);
        }
        Ran::from(end_of(fork)).ok();
        for number in 0..3 {
            assert!(beats(&folder.path().join(format!("{number}.log"))).len() >= 4);
        }
        vm.beats(3);
        vm.interrupt();
    }
}

#[test]
fn fifty_children_run() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let mut vm = Vm::booted(folder.path());
    let log = folder.path().join("{}.log");
    let log = log.to_str().expect("text");
    fork(&vm, &["-n", "50", "--log", log, "--", "--beats", "2"]).ok();
    let first = |number| beats(&folder.path().join(format!("{number}.log")))[0];
    assert!((1..50).all(|number| first(number) == first(0)));
    vm.beats(2);
    vm.interrupt();
}

#[test]
fn children_end_with_a_guest_that_is_killed_before_it_is_copied() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let mut vm = Vm::start(folder.path(), &["run", "--memory", "256M", "--work", "160M"]);
    let log = folder.path().join("{}.log");
    let fork = begin_fork(&vm, &["-n", "2", "--log", log.to_str().expect("text")]);
    wait_for(&folder.path().join("1.log"));
    signal(vm.child.as_ref().expect("it runs").id(), "KILL");
    // Of the children, which would run without an end.
    Ran::from(end_of(fork)).failed(1, &["cannot copy the guest's memory"]);
    vm.end();
    for child in ["0.log", "1.log"] {
        beats(&folder.path().join(child));
    }
}

#[test]
fn children_outlive_a_guest_that_is_copied() {
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_str().expect("text");
    for guest in [&["run", "--memory", "64M", "--work", "8M"][..], &["restore", file, "--lazy"]] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut vm = Vm::start(folder.path(), guest);
        let log = folder.path().join("{}.log");
        let log = log.to_str().expect("text");
        let options = ["-n", "2", "--json", "--log", log, "--", "--beats", "30"];
        let mut fork = begin_fork(&vm, &options);
        let mut begun = [0];
        fork.stdout.as_mut().expect("it is piped").read_exact(&mut begun).expect("it has begun");
        signal(vm.child.as_ref().expect("it runs").id(), "KILL");
        vm.end();
        Ran::from(end_of(fork)).ok();
        for child in ["0.log", "1.log"] {
            assert!(beats(&folder.path().join(child)).len() >= 29);
        }
    }
}

/// The cut has been begun when it turns out that it does not open.
#[test]
fn a_guest_whose_parents_were_found_by_an_option_is_forked() {
    needs_vm!();
    let sample = Sample::small();
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (layer, moved) = (path("layer.snap"), path("moved/guest.snap"));
    let file = sample.file.to_str().expect("text");
    let vm = Vm::start(folder.path(), &["restore", file, "--lazy"]);
    vm.create(Path::new(&layer), &["--live", "--diff"]).ok();
    vm.interrupt();
    fs::create_dir(path("moved")).expect("it is created");
    fs::copy(&sample.file, &moved).expect("it is copied");
    fs::remove_file(&sample.file).expect("it is there");
    let guest = ["restore", &layer, "--lazy", "--parent", &moved];
    let mut vm = Vm::start(folder.path(), &guest);
    let log = path("{}.log");
    fork(&vm, &["-n", "2", "--log", &log, "--", "--beats", "3"]).ok();
    for child in ["0.log", "1.log"] {
        assert!(!beats(&folder.path().join(child)).is_empty());
    }
    vm.beats(2);
    vm.interrupt();
}
