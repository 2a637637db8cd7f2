//! What can be taken from a guest's process.

use std::fs;

use serde_json::json;

use super::check::Check;

pub(super) fn checks() -> Vec<Check> {
    let kernel = jail::support();
    vec![seccomp(kernel), landlock(kernel), user_namespaces(), io_uring()]
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

fn landlock(kernel: jail::Support) -> Check {
    let check = Check::new("landlock", "limits of the files that a process may open");
    let found = match kernel.landlock_abi {
        0 => "none, or switched off".into(),
        abi => format!("version {abi} of its interface"),
    };
    check.unused(found, json!({ "abi": kernel.landlock_abi }))
}

fn user_namespaces() -> Check {
    let check = Check::new("user namespaces", "containers of ordinary users");
    let setting = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let limit = setting("/proc/sys/user/max_user_namespaces").and_then(|text| text.parse().ok());
    let is = |path, value| setting(path).is_some_and(|found| found == value);
    // The first is a setting of Debian, the second of Ubuntu.
    let (found, users) = match limit {
        None | Some(0_u64) => ("not allowed", "none"),
        _ if is("/proc/sys/kernel/unprivileged_userns_clone", "0") => ("only for root", "some"),
        _ if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") => {
            ("only for root, and for programs with a profile of AppArmor", "some")
        }
        Some(_) => ("allowed for all users", "all"),
    };
    check.unused(found, json!({ "allowed_for": users, "limit": limit }))
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
