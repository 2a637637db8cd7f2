//! Hosts on which this user may not run guests or serve faults: the message names the device, and what to do.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use crate::support::{SNAP, Sample, needs_vm, run, skip};

/// A user that may open neither device.
const NOBODY: u32 = 65534;

/// A copy of the program, and of a snapshot, that all users may read. `None` when this user cannot become another one.
fn for_everybody(test: &str) -> Option<(Sample, PathBuf)> {
    let sample = Sample::small();
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    let program = sample.folder.path().join("snap");
    std::fs::copy(SNAP, &program).expect("it can be copied");
    open(&program, 0o755);
    open(sample.folder.path(), 0o777);
    open(&sample.file, 0o644);
    let mut as_nobody = Command::new(&program);
    as_nobody.arg("--version").uid(NOBODY).gid(NOBODY);
    if as_nobody.output().is_ok_and(|output| output.status.success()) {
        return Some((sample, program));
    }
    skip(test, "only root can become a user without permissions");
    None
}

#[test]
fn without_permission_for_kvm() {
    needs_vm!();
    let Some((sample, program)) = for_everybody("without_permission_for_kvm") else { return };
    let out = sample.folder.path().join("out.snap");
    for args in [
        vec!["create".as_ref(), out.as_os_str()],
        vec!["restore".as_ref(), sample.file.as_os_str()],
    ] {
        let mut command = Command::new(&program);
        command.args(args).uid(NOBODY).gid(NOBODY);
        run(command).failed(4, &["/dev/kvm", "Permission denied", "group"]);
    }
    assert_eq!(sample.names(), ["guest.snap", "snap"]);
}

#[test]
fn without_permission_for_userfaultfd() {
    needs_vm!();
    let test = "without_permission_for_userfaultfd";
    let unprivileged = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if unprivileged.is_ok_and(|value| value.trim() != "0") {
        return skip(test, "vm.unprivileged_userfaultfd allows it to all users");
    }
    let Some((sample, program)) = for_everybody(test) else { return };
    let mut command = Command::new(&program);
    command.args(["restore", "--lazy"]).arg(&sample.file).uid(NOBODY).gid(NOBODY);
    let ran = run(command).failed(4, &["/dev/userfaultfd", "without --lazy"]);
    assert!(ran.stdout.is_empty());
}

#[test]
fn without_the_devices() {
    needs_vm!();
    // A mount namespace in which /dev has only the files that every process needs.
    let sample = Sample::small();
    let script = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && \
        { \"$SNAP\" restore \"$FILE\"; echo code $? >&2; \"$SNAP\" restore --lazy \"$FILE\"; echo code $? >&2; }";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).env("SNAP", SNAP).env("FILE", &sample.file);
    let ran = run(command);
    if !ran.stderr.contains("code") {
        return skip("without_the_devices", "this user may not mount a tmpfs");
    }
    let printed: Vec<_> = ran.stderr.split("code 4").collect();
    assert_eq!(printed.len(), 3, "{}", ran.stderr);
    for what in ["/dev/kvm", "No such file", "modprobe kvm"] {
        assert!(printed[0].contains(what), "{what} not in {}", printed[0]);
    }
}

/// For any file that cannot be opened any more, the message names the limit, and no permission or other program.
#[test]
fn with_few_descriptors_the_limit_is_named() {
    needs_vm!();
    let sample = Sample::small();
    let out = sample.folder.path().join("out.snap");
    for (args, file) in [
        (&["create", "--memory", "16M", "--work", "4M", "--force"][..], &out),
        (&["restore", "--lazy", "--beats", "1"], &sample.file),
        (&["restore", "--beats", "1"], &sample.file),
    ] {
        let mut printed = Vec::new();
        // With fewer the program cannot be loaded.
        for limit in 5.. {
            assert!(limit < 200, "it does not run with {limit} descriptors");
            let mut command = Command::new("sh");
            command.args(["-c", &format!("ulimit -n {limit}; exec \"$0\" \"$@\""), SNAP]);
            let ran = run({
                command.args(args).arg(file);
                command
            });
            if ran.code == Some(0) {
                break;
            }
            let text = &ran.stderr;
            for right in ["Too many open files", "ulimit -n"] {
                assert!(text.contains(right), "with {limit}: {text}");
            }
            for wrong in ["hypervisor", "permission", "does not exist", "CAP_SYS"] {
                assert!(!text.contains(wrong), "with {limit}: {text}");
            }
            printed.push(ran.stderr);
        }
        let vm = printed.iter().any(|text| text.contains("KVM_CREATE_VM failed"));
        assert!(vm, "{args:?}: {printed:?}");
    }
}
