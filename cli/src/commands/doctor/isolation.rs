//! What can be taken from a guest's process.

use std::fs;

use rustix::thread::{CapabilitySet, capabilities};
use serde_json::json;

use super::check::Check;

pub(super) fn checks() -> Vec<Check> {
    let kernel = jail::support();
    let users = UserNamespaces::of_host();
    vec![seccomp(kernel), landlock(kernel), namespaces(&users), users.check(), io_uring()]
}

fn seccomp(kernel: jail::Support) -> Check {
    let check = Check::new("seccomp", "the jail, which is on by default");
    match kernel.seccomp {
        true => check.ok("filters of system calls", json!({})),
        false => check.missing(
            "the kernel has no filters of system calls",
            "use a kernel with CONFIG_SECCOMP_FILTER, or --jail off",
        ),
    }
}

/// What each version of the interface has added that the jail uses.
const LANDLOCK: [(u32, &str); 4] =
    [(1, "files"), (3, "truncation"), (4, "TCP"), (6, "signals and abstract sockets")];

fn landlock(kernel: jail::Support) -> Check {
    let check = Check::new("landlock", "the jail's rules for files and connections");
    let abi = kernel.landlock_abi;
    let rules = LANDLOCK.into_iter().filter(|(since, _)| *since <= abi).map(|(_, rules)| rules);
    let rules: Vec<_> = rules.collect();
    match abi {
        0 => check.missing(
            "none, or switched off",
            "use a kernel with CONFIG_SECURITY_LANDLOCK, and `landlock` in its parameter lsm=",
        ),
        _ => {
            let found = format!("version {abi} of its interface: {}", rules.join(", "));
            check.ok(found, json!({ "abi": abi, "rules": rules }))
        }
    }
}

/// The namespaces of `--jail strict`.
fn namespaces(users: &UserNamespaces) -> Check {
    let check = Check::new("namespaces", "--jail strict");
    let lacks = |kind: &&str| fs::symlink_metadata(format!("/proc/self/ns/{kind}")).is_err();
    let lacking: Vec<_> = ["mnt", "net", "ipc", "uts"].into_iter().filter(lacks).collect();
    let is_admin =
        capabilities(None).is_ok_and(|held| held.effective.contains(CapabilitySet::SYS_ADMIN));
    match (&lacking[..], is_admin, users.allowed_for) {
        ([], true, _) => {
            check.ok("mounts, network, IPC, host name", json!({ "by": "CAP_SYS_ADMIN" }))
        }
        ([], false, "all") => {
            check.ok("mounts, network, IPC, host name", json!({ "by": "a user namespace" }))
        }
        ([], false, _) => check.missing(
            "this user may make none: it has neither CAP_SYS_ADMIN nor user namespaces",
            "start snap as root with --uid and --gid, or allow user namespaces",
        ),
        (lacking, ..) => check.missing(
            format!("the kernel lacks: {}", lacking.join(", ")),
            "use a kernel with CONFIG_NAMESPACES",
        ),
    }
}

/// For which users the host allows user namespaces.
struct UserNamespaces {
    found: &'static str,
    allowed_for: &'static str,
    limit: Option<u64>,
}

impl UserNamespaces {
    fn of_host() -> Self {
        let setting = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let limit =
            setting("/proc/sys/user/max_user_namespaces").and_then(|text| text.parse().ok());
        let is = |path, value| setting(path).is_some_and(|found| found == value);
        // The first is a setting of Debian, the second of Ubuntu.
        let (found, allowed_for) = match limit {
            None | Some(0_u64) => ("not allowed", "none"),
            _ if is("/proc/sys/kernel/unprivileged_userns_clone", "0") => ("only for root", "some"),
            _ if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") => {
                ("only for root, and for programs with a profile of AppArmor", "some")
            }
            Some(_) => ("allowed for all users", "all"),
        };
        Self { found, allowed_for, limit }
    }

    fn check(&self) -> Check {
        let check = Check::new("user namespaces", "--jail strict of ordinary users");
        let details = json!({ "allowed_for": self.allowed_for, "limit": self.limit });
        match self.allowed_for {
            "none" => check.missing(
                self.found,
                "use a kernel with CONFIG_USER_NS, and raise the sysctl user.max_user_namespaces",
            ),
            _ => check.ok(self.found, details),
        }
    }
}

fn io_uring() -> Check {
    let check =
        Check::new("io_uring", "programs that read and write many files; the jail refuses it");
    // Linux 6.6 and newer: kernel.io_uring_disabled in Documentation/admin-guide/sysctl/kernel.rst.
    let setting = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    let (found, users) = match setting.as_deref().map(str::trim) {
        Ok("0") => ("allowed for all users", Some("all")),
        Ok("1") => ("allowed for CAP_SYS_ADMIN and a group of users", Some("some")),
        Ok(_) => ("not allowed", Some("none")),
        Err(_) => ("a kernel before 6.6, or without it", None),
    };
    check.unused(found, json!({ "allowed_for": users }))
}
