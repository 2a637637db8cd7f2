//! `snap run`: guests that are booted and not stored.

use std::fs;
use std::process::Command;

use crate::kernel;
use crate::support::{Ran, SNAP, end_of, needs_vm, signal, snap, start, wait_for_handlers};

/// `snap run` of a kernel made of this code.
#[track_caller]
fn run_kernel(code: &[u8], options: &[&str]) -> Ran {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("kernel");
    fs::write(&path, kernel::elf(code, true, 0)).expect("it is written");
    let words = ["run".as_ref(), "--kernel".as_ref(), path.as_os_str()];
    snap(words.into_iter().chain(options.iter().map(std::ffi::OsStr::new)))
}

#[test]
fn a_guest_prints_and_powers_off() {
    needs_vm!();
    let code = [kernel::PRINT_CMDLINE_PVH, &kernel::power_off()].concat();
    let ran = run_kernel(&code, &["--cmdline", "hello there"]).ok();
    assert_eq!(ran.stdout, "hello there\n");
    assert!(ran.stderr.contains("the guest powered off"), "{}", ran.stderr);
    let quiet = run_kernel(&code, &["--cmdline", "x", "--quiet"]).ok();
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("x\n", ""));
}

#[test]
fn a_guest_that_breaks_off_ends_with_5() {
    needs_vm!();
    run_kernel(&kernel::out(0x602, 1), &[]).failed(5, &["the guest asked for a reset"]);
    // An undefined instruction without an interrupt table.
    run_kernel(&[0x0f, 0x0b], &[]).failed(5, &["triple fault"]);
}

#[test]
fn a_run_ends_when_it_was_told_to() {
    needs_vm!();
    let small = ["run", "--memory", "64M", "--work", "8M"];
    let ran = snap(small.into_iter().chain(["--until", "beat 3 ok"])).ok();
    assert!(ran.stdout.ends_with("beat 3 ok"), "{}", ran.stdout);
    assert!(ran.stderr.contains("snap run: done"), "{}", ran.stderr);
    let stands = [0xeb, 0xfe];
    let ran = run_kernel(&stands, &["--for", "10ms"]).ok();
    assert!(ran.stderr.contains("snap run: time is up"), "{}", ran.stderr);
}

#[test]
fn an_interrupt_ends_a_run() {
    needs_vm!();
    let mut command = Command::new(SNAP);
    command.args(["run", "--memory", "64M", "--work", "8M"]);
    let child = start(command);
    wait_for_handlers(child.id());
    signal(child.id(), "INT");
    Ran::from(end_of(child)).failed(130, &["interrupted"]);
}
