//! `--jail`: which threads of a running `snap` are jailed. What a role refuses is tested in the crate `jail`.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;

use crate::control::Vm;
use crate::mounts::{Mounted, host_can_mount};
use crate::support::{SNAP, Sample, needs_vm, run, signal, skip, snap, start};
use crate::talking::Talking;

/// A thread of another process, from proc(5).
#[derive(Debug)]
struct Thread {
    name: String,
    seccomp: u64,
    no_new_privs: u64,
    capabilities: u64,
}

const FILTERED: u64 = 2;
const DAC_OVERRIDE: u64 = 1 << 1;
const SYS_NICE: u64 = 1 << 23;

/// What a thread that writes no snapshots may have kept.
fn kept(thread: &Thread) -> u64 {
    match &*thread.name {
        "vcpu0" | "pager0" => SYS_NICE,
        _ => SYS_NICE | DAC_OVERRIDE,
    }
}

/// All threads of a process.
fn threads(process: u32) -> Vec<Thread> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    let statuses =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok());
    let of = |status: String| {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.expect(name).trim().to_owned()
        };
        let number = |name, base| u64::from_str_radix(&field(name), base).expect(name);
        Thread {
            name: field("Name:"),
            seccomp: number("Seccomp:", 10),
            no_new_privs: number("NoNewPrivs:", 10),
            capabilities: number("CapPrm:", 16) | number("CapEff:", 16),
        }
    };
    statuses.map(of).collect()
}

#[track_caller]
fn all_are_jailed(process: u32, needed: &[&str]) {
    let threads = threads(process);
    for name in needed {
        assert!(threads.iter().any(|thread| thread.name == *name), "{name}: {threads:?}");
    }
    for thread in &threads {
        assert_eq!((thread.seccomp, thread.no_new_privs), (FILTERED, 1), "{thread:?}");
        assert_eq!(thread.capabilities & !kept(thread), 0, "{thread:?}");
    }
}

#[test]
fn all_threads_of_a_restored_guest_are_jailed() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    let file = sample.file.to_string_lossy();
    for (mode, needed) in [
        (&[][..], &["snap", "signals", "vcpu0"][..]),
        (&["--lazy", "--populate", "off"], &["snap", "signals", "vcpu0", "pager0"]),
    ] {
        let mut snap = Talking::snap([&["restore", &*file][..], mode].concat());
        snap.beats(1);
        all_are_jailed(snap.id(), needed);
    }
}

#[test]
fn all_threads_of_a_guest_with_a_control_socket_are_jailed() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let socket = folder.path().join("vm.sock");
    let socket = socket.to_string_lossy();
    let mut snap = Talking::snap(["run", "--memory", "64M", "--work", "4M", "--api", &socket]);
    snap.beats(1);
    // What may write snapshots keeps the capabilities for that, except the vCPU and the thread of signals.
    let threads = threads(snap.id());
    assert!(threads.iter().any(|thread| thread.name == "api"), "{threads:?}");
    for thread in &threads {
        assert_eq!((thread.seccomp, thread.no_new_privs), (FILTERED, 1), "{thread:?}");
        if ["vcpu0", "signals"].contains(&&*thread.name) {
            assert_eq!(thread.capabilities & !kept(thread), 0, "{thread:?}");
        }
    }
}

/// The kernel does not show the rules of a thread, so this looks at the calls that make them.
#[test]
fn all_threads_that_are_jailed_have_rules_for_files() {
    needs_vm!();
    let test = "all_threads_that_are_jailed_have_rules_for_files";
    if Command::new("strace").arg("-V").output().is_err() {
        return skip(test, "there is no strace");
    }
    if snap(["doctor"]).stdout.contains("missing  landlock ") {
        return skip(test, "this kernel has no Landlock");
    }
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    for jail in ["default", "strict"] {
        let calls = sample.folder.path().join("calls");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-e", "trace=landlock_restrict_self,seccomp", "-o"]).arg(&calls);
        strace.args([SNAP, "restore", "--lazy", "--beats", "1", "--jail", jail]).arg(&sample.file);
        run(strace).ok();
        let calls = std::fs::read_to_string(&calls).expect("strace has written it");
        // Each line begins with the thread.
        let threads = |call: &str| -> BTreeSet<String> {
            let made = calls.lines().filter(|line| line.contains(call));
            made.filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
        };
        let filtered = threads("seccomp(SECCOMP_SET_MODE_FILTER");
        assert!(filtered.len() >= 4, "{calls}");
        assert_eq!(filtered, threads("landlock_restrict_self("), "{calls}");
        assert!(!calls.contains("= -1"), "{calls}");
    }
}

#[test]
fn without_the_jail_no_thread_is_jailed() {
    needs_vm!();
    let mut snap = Talking::snap(["run", "--memory", "64M", "--work", "4M", "--jail", "off"]);
    snap.beats(1);
    let threads = threads(snap.id());
    assert!(threads.iter().any(|thread| thread.name == "vcpu0"), "{threads:?}");
    assert!(threads.iter().all(|thread| thread.seccomp == 0), "{threads:?}");
}

#[test]
fn servers_and_keepers_are_jailed() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    let at = |name: &str| sample.folder.path().join(name);
    let serve = [Path::new("serve"), &sample.file, Path::new("--listen"), &at("pages.sock")];
    let keep = [Path::new("keep"), Path::new("--listen"), &at("keep.sock")];
    for command in [&serve[..], &keep] {
        let mut process = start({
            let mut snap = Command::new(SNAP);
            snap.args(command);
            snap
        });
        let mut line = String::new();
        BufReader::new(process.stderr.take().expect("a pipe"))
            .read_line(&mut line)
            .expect("a line");
        let threads = threads(process.id());
        signal(process.id(), "INT");
        process.wait().expect("it ends");
        assert!(threads.iter().all(|thread| thread.no_new_privs == 1), "{line}: {threads:?}");
        assert!(threads.iter().all(|thread| thread.seccomp == FILTERED), "{line}: {threads:?}");
    }
}

/// All threads but the main one are jailed, and these are there.
#[track_caller]
fn all_but_the_main_thread_are_jailed(process: u32, needed: &[&str]) {
    let threads = threads(process);
    for name in needed {
        assert!(threads.iter().any(|thread| thread.name == *name), "{name}: {threads:?}");
    }
    for thread in &threads {
        let filtered = if thread.name == "snap" { 0 } else { FILTERED };
        assert_eq!(thread.seccomp, filtered, "{thread:?}");
    }
}

#[test]
fn the_server_of_a_fork_is_jailed() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut vm = Vm::start(folder.path(), &["run", "--memory", "64M", "--work", "4M"]);
    vm.beats(2);
    let mut fork = Command::new(SNAP);
    fork.args(["fork", "-n", "2", "--vm"]).arg(&vm.socket).args(["--", "--for", "60s"]);
    let mut fork = start(fork);
    let mut line = String::new();
    let stdout = fork.stdout.take().expect("a pipe");
    BufReader::new(stdout).read_line(&mut line).expect("a line");
    assert!(line.contains("2 children"), "{line}");
    all_but_the_main_thread_are_jailed(fork.id(), &["snap", "signals", "pages"]);
    signal(fork.id(), "INT");
    assert_eq!(fork.wait().expect("it ends").code(), Some(130));
    vm.interrupt();
}

#[test]
fn the_threads_of_a_mount_are_jailed() {
    needs_vm!();
    if !host_can_mount("the_threads_of_a_mount_are_jailed") {
        return;
    }
    let sample = Sample::small();
    let mut mounted = Mounted::start(&sample.file, &["--prefetch", "all"]);
    let memory = std::fs::read(mounted.file("memory.raw")).expect("it is read");
    assert!(!memory.is_empty());
    let needed = ["snap", "signals", "mount", "mount-loader", "fuser-0"];
    all_but_the_main_thread_are_jailed(mounted.id(), &needed);
    assert_eq!(mounted.end("INT").0, Some(130));
}
