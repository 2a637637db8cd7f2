//! `snap doctor`: what it finds on this host, and on one without devices.

use std::process::Command;

use serde_json::Value;

use crate::support::{SNAP, needs_vm, run, skip, snap};

fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().expect("a list");
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn a_host_that_runs_guests_is_usable() {
    needs_vm!();
    let printed = snap(["doctor", "--json"]).ok().stdout;
    let report: Value = serde_json::from_str(&printed).expect("JSON");
    assert_eq!(report["usable"], true);
    let kvm = check(&report, "kvm");
    assert_eq!((&kvm["status"], &kvm["details"]["api_version"]), (&"ok".into(), &12.into()));
    let userfaultfd = check(&report, "userfaultfd");
    assert_eq!(userfaultfd["status"], "ok");
    let features = userfaultfd["details"]["features"].as_array().expect("a list");
    assert!(features.contains(&"MISSING_SHMEM".into()), "{features:?}");
    assert_eq!(check(&report, "seccomp")["status"], "ok");
    let landlock = check(&report, "landlock");
    match landlock["details"]["abi"].as_u64() {
        Some(abi) => {
            let rules = landlock["details"]["rules"].as_array().expect("a list");
            assert_eq!(rules.contains(&"TCP".into()), abi >= 4, "{landlock}");
        }
        None => assert_eq!(landlock["status"], "missing"),
    }
    if rustix::process::geteuid().is_root() {
        assert_eq!(check(&report, "namespaces")["details"]["by"], "CAP_SYS_ADMIN");
    }
    // What is missing has advice, and only that.
    for check in report["checks"].as_array().expect("a list") {
        assert_eq!(check["status"] == "missing", check["advice"].is_string(), "{check}");
    }
    let text = snap(["doctor"]).ok().stdout;
    for line in ["ok       kvm ", "ok       userfaultfd "] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn a_host_without_devices_is_not_usable() {
    let script = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && \
        exec \"$SNAP\" doctor";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).env("SNAP", SNAP);
    let ran = run(command);
    if !ran.stdout.contains("Linux") {
        return skip("a_host_without_devices_is_not_usable", "this user may not mount a tmpfs");
    }
    let ran = ran.failed(4, &["snap: this host lacks kvm"]);
    for text in
        ["missing  kvm ", "modprobe kvm", "missing  fuse ", "missing  tap ", "do: modprobe tun"]
    {
        assert!(ran.stdout.contains(text), "{text} not in {}", ran.stdout);
    }
}
