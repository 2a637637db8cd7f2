//! `snap run`: guests that are booted and not snapshotted.

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
    let args = ["run".as_ref(), "--kernel".as_ref(), path.as_os_str()];
    snap(args.into_iter().chain(options.iter().map(std::ffi::OsStr::new)))
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
fn a_guest_that_crashes_ends_with_5() {
    needs_vm!();
    run_kernel(&kernel::out(0x602, 1), &[]).failed(5, &["the guest requested a reset"]);
    // An undefined instruction without an interrupt table.
    run_kernel(&[0x0f, 0x0b], &[]).failed(5, &["triple fault"]);
}

/// HLT with interrupts off, where Linux ends after `halt`: only the user knows that this is the end.
#[test]
fn a_guest_that_halts_keeps_sleeping() {
    needs_vm!();
    let ran = run_kernel(&[0xfa, 0xf4], &["--for", "100ms"]).ok();
    assert!(ran.stderr.contains("snap run: time is up"), "{}", ran.stderr);
}

#[test]
fn a_run_ends_as_its_options_say() {
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

#[test]
fn options_come_from_a_file_too() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let code = [kernel::PRINT_CMDLINE_PVH, &kernel::power_off()].concat();
    fs::write(path("kernel"), kernel::elf(&code, true, 0)).expect("it is written");
    let json = serde_json::json!({ "kernel": path("kernel"), "memory": "64M", "cmdline": "a" });
    fs::write(path("vm.json"), json.to_string()).expect("it is written");
    assert_eq!(snap(["run", "--config", &path("vm.json")]).ok().stdout, "a\n");
    // The command line has precedence.
    let ran = snap(["run", "--config", &path("vm.json"), "--cmdline", "b"]).ok();
    assert_eq!(ran.stdout, "b\n");
    let config = format!("--config={}", path("vm.json"));
    let out = path("out.snap");
    snap(["create", &out, &config, "--when", "after:1m"]).failed(5, &["powered off"]);
}

#[test]
fn errors_in_a_file_of_options_have_their_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("vm.json");
    let file = file.to_str().expect("a plain name");
    let wrong = |json: &str, code: i32, messages: &[&str]| {
        fs::write(file, json).expect("it is written");
        snap(["run", "--config", file]).failed(code, messages);
    };
    wrong("{\n\"memory\": \"lots\"}", 2, &["vm.json, line 2: \"memory\"", "'lots'"]);
    wrong("{\"cpus\": 0, \"kernel\": \"k\"}", 2, &["line 1: \"cpus\"", "'0'"]);
    wrong("{\n\n\"memroy\": 1}", 2, &["line 3: \"memroy\" is no option of snap run"]);
    wrong("{\"memory\": {}}", 2, &["line 1: \"memory\"", "found an object"]);
    wrong("{\"initrd\": \"x\"}", 2, &["--kernel"]);
    wrong("nonsense", 2, &["vm.json", "not a JSON object of options", "line 1 column"]);
    snap(["run", "--config", "/nonexistent.json"]).failed(2, &["cannot read /nonexistent.json"]);
    // An option in the file conflicts with others as on the command line.
    fs::write(file, "{\"kernel\": \"k\"}").expect("it is written");
    let ran = snap(["run", "--config", file, "--work", "8M"]);
    ran.failed(2, &["line 1: \"kernel\"", "cannot be used with"]);
}

/// Guests that write nothing until the timeout: their activity distinguishes a slow one from a dead one.
#[test]
fn a_silent_guest_is_described_by_its_activity() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let begin = |name: &str, code: &[u8], timeout: &str| {
        let kernel = folder.path().join(name);
        fs::write(&kernel, kernel::elf(code, true, 0)).expect("it is written");
        let mut command = Command::new(SNAP);
        command.arg("create").arg(kernel.with_extension("snap")).arg("--kernel").arg(&kernel);
        command.args(["--when", "output:never", "--timeout", timeout]);
        start(command)
    };
    // `cli; hlt`, then `out 0x80, al; jmp`, `jmp $`, and one that touches page after page.
    let halts = begin("halts", &[0xfa, 0xf4, 0xeb, 0xfd], "3s");
    let exits = begin("exits", &[0xe6, 0x80, 0xeb, 0xfc], "3s");
    let spins = begin("spins", &[0xeb, 0xfe], "3s");
    let touch = [
        0xbf, 0, 0, 0x20, 0, // mov edi, 2 MiB
        0x89, 0x3f, // mov [edi], edi
        0x81, 0xc7, 0, 0x10, 0, 0, // add edi, 4096
        0x81, 0xff, 0, 0, 0x60, 0, // cmp edi, 6 MiB
        0x75, 0xf0, // jne
        0xeb, 0xfe, // jmp $
    ];
    let touches = begin("touches", &touch, "3s");
    let mut waits = begin("waits", &[0xe6, 0x80, 0xeb, 0xfc], "5m");

    let last_line =
        |child| Ran::from(end_of(child)).failed(1, &["not ready after 3s", "--timeout"]).stderr;
    let text = last_line(halts);
    assert!(text.contains("at the end it is idle (no exits, 0 % of a CPU"), "{text}");
    let text = last_line(exits);
    assert!(text.contains("at the end it runs (") && text.contains(" exits/s, "), "{text}");
    let text = last_line(spins);
    assert!(text.contains("at the end it runs (no exits, "), "{text}");
    let text = last_line(touches);
    assert!(text.contains(" of memory touched, ") && text.contains(" of it new"), "{text}");

    // The messages during the wait.
    let mut line = String::new();
    let stderr = waits.stderr.as_mut().expect("a pipe");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stderr), &mut line).expect("text");
    let printed = [
        "waiting for the guest's output \"never\", at most 5m; it has written nothing; it runs (",
        " exits/s",
    ];
    for what in printed {
        assert!(line.contains(what), "{what:?} is not in: {line}");
    }
    signal(waits.id(), "INT");
    assert_eq!(end_of(waits).status.code(), Some(130));
}
