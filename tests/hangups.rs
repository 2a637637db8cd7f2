//! SIGHUP, after a closed terminal or a lost connection, is handled like SIGTERM.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use crate::support::{SNAP, Sample, names, needs_vm, run, signal, skip};
use crate::talking::{Talking, state, wait_for, wait_until};

/// A command that creates a socket, when it is ready for a SIGHUP.
fn begun(args: &[&str], file: &Path, option: &str, socket: &Path) -> Talking {
    let args = args.iter().map(|arg| match *arg {
        "FILE" => file.as_os_str(),
        arg => OsStr::new(arg),
    });
    let talking = Talking::snap(args.chain([OsStr::new(option), socket.as_os_str()]));
    wait_for(socket);
    talking
}

/// The commands that create a socket.
const COMMANDS: [(&[&str], &str); 6] = [
    (&["run", "--memory", "32M", "--work", "4M"], "--api"),
    (&["restore", "FILE"], "--api"),
    (&["restore", "--lazy", "FILE"], "--api"),
    (&["restore", "--paused", "FILE"], "--api"),
    (&["serve", "FILE"], "--listen"),
    (&["keep"], "--listen"),
];

#[test]
fn a_hangup_ends_each_command_cleanly() {
    // Sockets were left.
    needs_vm!();
    let sample = Sample::small();
    let socket = sample.folder.path().join("a.sock");
    for (args, option) in COMMANDS {
        let talking = begun(args, &sample.file, option, &socket);
        // The shell and the kernel both send it: the second one does not end it immediately.
        talking.signal("HUP");
        talking.signal("HUP");
        talking.end().failed(130, &["interrupted"]);
        assert_eq!(sample.names(), ["guest.snap"], "{args:?}");
    }
}

#[test]
fn a_hangup_leaves_no_half_written_file() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "256M", "--work", "192M"]);
    let out = sample.folder.path().join("out");
    let (file, out) = (sample.file.to_str().expect("text"), out.to_str().expect("text"));
    for args in [
        &["create", out, "--memory", "256M", "--work", "192M", "--level", "19"][..],
        &["flatten", file, "-o", out, "--level", "19"],
        &["restore", "--lazy", "--record", file, "-o", out, "--until", "never"],
    ] {
        let mut talking = Talking::snap(args);
        let recorded = args[0] == "restore";
        match recorded {
            true => talking.beats(1),
            false => hears_hangups(talking.id()),
        }
        talking.signal("HUP");
        talking.end().failed(130, &["interrupted"]);
        // The recording is written anyway, as after Ctrl-C.
        let expected = if recorded { &["guest.snap", "out"][..] } else { &["guest.snap"] };
        assert_eq!(sample.names(), expected, "{args:?}");
    }
    let talking = Talking::snap(["export", file, "--format", "raw", "-o", &format!("{out}.raw")]);
    hears_hangups(talking.id());
    talking.signal("HUP");
    // It may have ended by then.
    let code = talking.end().code;
    let expected = ["guest.snap", "out", "out.raw"];
    assert_eq!(sample.names(), expected[..if code == Some(0) { 3 } else { 2 }]);
}

#[test]
fn a_command_can_outlive_its_terminal() {
    needs_vm!();
    let sample = Sample::small();
    let socket = sample.folder.path().join("a.sock");
    for (args, option) in COMMANDS {
        let mut command = Command::new("nohup");
        command.arg(SNAP).args(args.iter().map(|arg| match *arg {
            "FILE" => sample.file.as_os_str(),
            arg => OsStr::new(arg),
        }));
        command.arg(option).arg(&socket);
        let talking = Talking::start(command);
        wait_for(&socket);
        assert!(has(talking.id(), "SigIgn", 1), "{args:?}: SIGHUP is not ignored any more");
        talking.signal("HUP");
        talking.interrupt();
    }
}

#[test]
fn a_terminal_that_is_closed() {
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let socket = folder.join("a.sock");
    let Some(terminal) = in_terminal("exec \"$SNAP\" restore \"$FILE\" --api \"$SOCKET\"", &sample)
    else {
        return skip("a_terminal_that_is_closed", "there is no program `script`");
    };
    wait_for(&socket);
    // The terminal closes with its program.
    terminal.signal("KILL");
    wait_until("the socket is left", || names(folder) == ["guest.snap"]);
}

#[test]
fn a_guest_in_the_background_of_a_terminal_runs() {
    // It was stopped by SIGTTOU, or SIGTTIN, when it read the keyboard, and its clients hung.
    needs_vm!();
    let sample = Sample::small();
    let script = "set -m; stty tostop; \"$SNAP\" restore \"$FILE\" --api \"$SOCKET\" & \
                  echo $! > \"$PID\"; wait $!";
    let test = "a_guest_in_the_background_of_a_terminal_runs";
    let Some(mut terminal) = in_terminal(script, &sample) else {
        return skip(test, "there is no program `script`");
    };
    let pid = sample.folder.path().join("pid");
    let read = || std::fs::read_to_string(&pid).ok()?.trim().parse::<u32>().ok();
    wait_until("nothing is started", || read().is_some());
    let id = read().expect("it was there");
    // Its output goes through the terminal.
    terminal.beats(3);
    assert_ne!(state(id), Some('T'), "it is stopped");
    signal(id, "INT");
    terminal.end();
    assert_eq!(sample.names(), ["guest.snap", "pid"]);
}

#[test]
fn a_guest_in_the_foreground_of_a_terminal_runs_and_the_terminal_is_restored() {
    // The jail did not allow the calls that read and change a terminal's settings.
    needs_vm!();
    let test = "a_guest_in_the_foreground_of_a_terminal_runs_and_the_terminal_is_restored";
    for command in [
        "run --memory 32M --work 4M",
        "run --memory 32M --work 4M --api \"$SOCKET\"",
        "restore \"$FILE\"",
        "restore --lazy \"$FILE\"",
    ] {
        let sample = Sample::small();
        let script = format!(
            "before=$(stty -g); sh -c 'echo $$ > \"$PID\"; exec \"$SNAP\" {command}'; \
             echo \"code $?\"; test \"$before\" = \"$(stty -g)\""
        );
        let Some(mut terminal) = in_terminal(&script, &sample) else {
            return skip(test, "there is no program `script`");
        };
        terminal.beats(2);
        let pid = std::fs::read_to_string(sample.folder.path().join("pid")).expect("it is there");
        let id = pid.trim().parse().expect("a number");
        assert!(settings(id).contains(" -icanon"), "{command}: keys wait for the end of a line");
        signal(id, "TERM");
        // The last command of the script compares the terminal's settings.
        let ran = terminal.end().ok();
        assert!(ran.stdout.contains("code 130"), "{command}: {}", ran.stdout);
    }
}

/// The settings of the terminal on a process's stdin.
fn settings(process: u32) -> String {
    let mut command = Command::new("stty");
    command.args(["-a", "-F"]).arg(format!("/proc/{process}/fd/0"));
    run(command).ok().stdout
}

/// Runs a script in a separate terminal.
fn in_terminal(script: &str, sample: &Sample) -> Option<Talking> {
    Command::new("script").arg("--version").output().ok()?;
    let mut command = Command::new("script");
    command.args(["-q", "-e", "-f", "-c", script, "/dev/null"]);
    command.env("SHELL", "/bin/sh").env("SNAP", SNAP).env("FILE", &sample.file);
    command.env("SOCKET", sample.folder.path().join("a.sock"));
    command.env("PID", sample.folder.path().join("pid"));
    Some(Talking::start(command))
}

/// Waits until a process handles SIGHUP. Before that, the signal just kills it.
fn hears_hangups(process: u32) {
    wait_until("it handles no signals", || has(process, "SigCgt", 1));
}

/// Whether a signal is in a set of a process: see proc_pid_status(5).
fn has(process: u32, set: &str, signal: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(':'));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}
