//! Each role tries calls outside of its list, in a process of its own, and is ended with a message.
#![allow(unsafe_code)]

use std::process::{Command, Output};
use std::ptr;

use jail::{EXIT_CODE, Limits, Role, enter};

/// The role and the attempt of a child process.
const ATTEMPT: &str = "JAIL_TEST_ATTEMPT";

/// Calls that no role may use, with their names.
const REFUSED: [&str; 12] = [
    "execve",
    "ptrace",
    "socket",
    "mount",
    "mprotect",
    "mmap",
    "ioctl",
    "fork",
    "bpf",
    "setuid",
    "init_module",
    "io_uring_setup",
];

/// What a child process does.
fn attempt(call: &str) {
    let zero: libc::c_long = 0;
    let null = ptr::null::<libc::c_void>();
    let raw = |number, args: [libc::c_long; 3]| {
        // SAFETY: no call gets an address that is valid, so none changes memory of this process.
        unsafe { libc::syscall(number, args[0], args[1], args[2], zero, zero, zero) }
    };
    let result = match call {
        "execve" => raw(libc::SYS_execve, [null as i64, 0, 0]),
        "ptrace" => raw(libc::SYS_ptrace, [libc::PTRACE_TRACEME.into(), 0, 0]),
        "socket" => raw(libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0]),
        "mount" => raw(libc::SYS_mount, [0, 0, 0]),
        "mprotect" => raw(libc::SYS_mprotect, [0, 4096, libc::PROT_EXEC.into()]),
        "mmap" => raw(libc::SYS_mmap, [0, 4096, libc::PROT_EXEC.into()]),
        // TIOCSTI types into a terminal.
        "ioctl" => raw(libc::SYS_ioctl, [0, 0x5412, 0]),
        "fork" => raw(libc::SYS_fork, [0; 3]),
        "bpf" => raw(libc::SYS_bpf, [0; 3]),
        "setuid" => raw(libc::SYS_setuid, [0; 3]),
        "init_module" => raw(libc::SYS_init_module, [0; 3]),
        "io_uring_setup" => raw(libc::SYS_io_uring_setup, [1, 0, 0]),
        "openat" => {
            let flags = libc::O_WRONLY | libc::O_CREAT;
            raw(
                libc::SYS_openat,
                [libc::AT_FDCWD.into(), c"/dev/null".as_ptr() as i64, flags.into()],
            )
        }
        "connect" => raw(libc::SYS_connect, [-1, 0, 0]),
        "panic" => panic!("this is expected"),
        "terminal" => {
            // There is none: the calls fail.
            let stdin = std::io::stdin();
            let _ = rustix::process::getpgrp();
            let _ = rustix::termios::tcgetpgrp(&stdin);
            let _ = rustix::termios::tcgetattr(&stdin);
            0
        }
        "nothing" => 0,
        _ => panic!("{call}"),
    };
    println!("result {result}");
}

/// This is not a test of its own: the tests below start it as a child process.
#[test]
fn child() {
    let Ok(text) = std::env::var(ATTEMPT) else { return };
    let (role, call) = text.split_once(' ').expect("a role and a call");
    let role = Role::ALL.into_iter().find(|known| known.to_string() == role).expect("a role");
    let tried = std::thread::Builder::new().name("tried".into()).spawn({
        let call = call.to_owned();
        move || {
            enter(role, Limits::default()).expect("this kernel has seccomp");
            attempt(&call);
        }
    });
    tried.expect("a thread starts").join().expect("it ends");
    println!("not ended");
}

fn child_of(role: Role, call: &str) -> Output {
    let this = std::env::current_exe().expect("this program");
    let mut command = Command::new(this);
    command.args(["--exact", "child", "--nocapture"]).env(ATTEMPT, format!("{role} {call}"));
    command.env("RUST_BACKTRACE", "1");
    command.output().expect("it starts")
}

fn is_refused(role: Role, call: &str) {
    let output = child_of(role, call);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(EXIT_CODE.into()), "{role}, {call}: {stderr}");
    let expected = format!("the thread tried (role {role}) has called {call}(0x");
    assert!(stderr.contains(&expected), "{expected:?} not in {stderr}");
}

#[test]
fn no_role_may_use_these_calls() {
    for role in Role::ALL {
        let output = child_of(role, "nothing");
        assert!(output.status.success(), "{role}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).contains("not ended"));
        REFUSED.iter().for_each(|call| is_refused(role, call));
    }
}

#[test]
fn only_a_writer_opens_files_for_writing() {
    for role in Role::ALL {
        match role {
            Role::Writer | Role::Vcpu | Role::Devices => {
                let output = child_of(role, "openat");
                assert!(output.status.success(), "{role}: {output:?}");
                let refused = String::from_utf8_lossy(&output.stdout).contains("result -1");
                assert_eq!(refused, role != Role::Writer, "{role}: {output:?}");
            }
            _ => is_refused(role, "openat"),
        }
    }
}

#[test]
fn servers_and_other_roles_without_sockets_of_their_own_connect_to_none() {
    for role in [Role::Vcpu, Role::Pager, Role::Signals, Role::Server, Role::Mount] {
        is_refused(role, "connect");
    }
    let output = child_of(Role::Fork, "connect");
    assert!(String::from_utf8_lossy(&output.stdout).contains("result -1"), "EBADF");
}

#[test]
fn the_thread_of_signals_may_restore_the_terminal() {
    for role in [Role::Signals, Role::Main, Role::Writer] {
        let output = child_of(role, "terminal");
        assert!(output.status.success(), "{role}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The backtrace would be read from files, which some roles may not open.
#[test]
fn a_panic_is_not_ended_by_the_jail() {
    for role in Role::ALL {
        let output = child_of(role, "panic");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("this is expected"), "{role}: {stderr}");
        assert!(stderr.contains("stack backtrace:"), "{role}: {stderr}");
        // The thread's end is reported by the one that waits for it: 101 is the exit code of a failed test.
        assert_eq!(output.status.code(), Some(101), "{role}: {stderr}");
    }
}

#[test]
fn capabilities_and_privileges_are_dropped() {
    let dropped = std::thread::spawn(|| {
        enter(Role::Main, Limits::default()).expect("this kernel has seccomp");
        std::fs::read_to_string("/proc/thread-self/status").expect("there is /proc")
    });
    let status = dropped.join().expect("it ends");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(line.expect(name).trim(), 16).expect("a number")
    };
    const DAC_OVERRIDE: u64 = 1 << 1;
    const SYS_NICE: u64 = 1 << 23;
    for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
        assert_eq!(field(set) & !(SYS_NICE | DAC_OVERRIDE), 0, "{set}");
    }
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), (1, 2));
}

#[test]
fn the_kernel_says_what_it_can_enforce() {
    let kernel = jail::support();
    assert!(kernel.seccomp, "the other tests need it");
    // It is there only where securityfs is mounted.
    if let Ok(modules) = std::fs::read_to_string("/sys/kernel/security/lsm") {
        let listed = modules.split(',').any(|module| module.trim() == "landlock");
        assert_eq!(kernel.landlock_abi > 0, listed, "{kernel:?}: {modules}");
    }
}
