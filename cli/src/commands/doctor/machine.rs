//! What guests and their memory need.

use std::fs::OpenOptions;
use std::io;

use pager::Pagemap;
use pager::uffd::{Features, Uffd};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use serde_json::json;

use super::check::Check;
use crate::exit::describe;

pub(super) fn checks() -> Vec<Check> {
    let (userfaultfd, features) = userfaultfd();
    vec![
        kvm(),
        userfaultfd,
        poison(features),
        write_protection(features),
        pagemap_scan(),
        priorities(),
        huge_pages(),
        device("fuse", "/dev/fuse", "snap mount", "modprobe fuse"),
        device("tap", "/dev/net/tun", "--net", "modprobe tun"),
    ]
}

fn kvm() -> Check {
    let check = Check::new("kvm", "all guests: create, run, restore, demo, bench").required();
    match vmm::probe() {
        Ok(host) => check.ok(
            format!(
                "{}, API version {}, {} memory slots, {}",
                vmm::KVM_DEVICE,
                vmm::KVM_API_VERSION,
                host.memory_slots,
                host.cpu.brand
            ),
            json!({ "api_version": vmm::KVM_API_VERSION, "memory_slots": host.memory_slots,
                    "recommended_vcpus": host.recommended_vcpus, "cpu": host.cpu }),
        ),
        // Its text says what to do.
        Err(error) => check.missing("guests cannot run here", describe(&error.into())),
    }
}

/// The features that `snap` uses, by the kernel's names for them.
const FEATURES: [(&str, Features); 9] = [
    ("EVENT_REMOVE", Features::EVENT_REMOVE),
    ("EVENT_REMAP", Features::EVENT_REMAP),
    ("THREAD_ID", Features::THREAD_ID),
    ("MISSING_SHMEM", Features::MISSING_SHMEM),
    ("MISSING_HUGETLBFS", Features::MISSING_HUGETLBFS),
    ("POISON", Features::POISON),
    ("PAGEFAULT_FLAG_WP", Features::WRITE_PROTECT),
    ("WP_HUGETLBFS_SHMEM", Features::WRITE_PROTECT_SHMEM),
    ("WP_UNPOPULATED", Features::WRITE_PROTECT_UNPOPULATED),
];

/// A feature of userfaultfd on a host where it cannot be opened.
fn unknown(check: Check) -> Check {
    check.missing("not known: userfaultfd cannot be opened", "as for userfaultfd")
}

/// The features are those of this kernel. `None`: it gives no userfaultfd.
fn userfaultfd() -> (Check, Option<Features>) {
    let check = Check::new("userfaultfd", "restore --lazy, serve, fork, reset").required();
    let all = FEATURES.iter().fold(Features::NONE, |all, (_, feature)| all.with(*feature));
    let features = match Uffd::open(Features::NONE, all) {
        Ok(uffd) => uffd.features(),
        Err(error) => {
            let check = check.missing("none that serves faults of KVM", describe(&error.into()));
            return (check, None);
        }
    };
    let device = may_be_opened("/dev/userfaultfd").is_ok();
    let by = if device { "/dev/userfaultfd" } else { "userfaultfd(2)" };
    let names: Vec<_> = FEATURES.iter().filter(|(_, one)| features.contains(*one)).collect();
    let names: Vec<_> = names.iter().map(|(name, _)| *name).collect();
    let check = check.ok(
        format!(
            "by {by}, also for faults in the kernel; {} of {} features",
            names.len(),
            FEATURES.len()
        ),
        json!({ "device": device, "kernel_faults": true, "features": names }),
    );
    (check, Some(features))
}

fn poison(features: Option<Features>) -> Check {
    let check = Check::new("poison", "lazy restores with --on-error poison, the default");
    match features.map(|features| features.contains(Features::POISON)) {
        None => unknown(check),
        Some(true) => check.ok("a page that cannot be loaded stops the guest", json!({})),
        Some(false) => {
            check.missing("UFFDIO_POISON is missing", "use Linux 6.6 or newer, or --on-error kill")
        }
    }
}

fn write_protection(features: Option<Features>) -> Check {
    let check = Check::new(
        "write protection",
        "snapshots of a guest that runs: create --live, checkpoint, fork",
    );
    let needed = Features::WRITE_PROTECT
        .with(Features::WRITE_PROTECT_SHMEM)
        .with(Features::WRITE_PROTECT_UNPOPULATED);
    match features.map(|features| features.contains(needed)) {
        None => unknown(check),
        Some(true) => check
            .ok("of anonymous and shared memory, also of pages that are not there yet", json!({})),
        Some(false) => check.missing(
            "userfaultfd does not protect all memory of a guest",
            "use Linux 6.4 or newer; without it a guest is paused while it is snapshotted",
        ),
    }
}

fn pagemap_scan() -> Check {
    let check = Check::new(
        "PAGEMAP_SCAN",
        "resets and snapshots of large guests that have used little memory",
    );
    match Pagemap::open() {
        Ok(pagemap) if pagemap.has_scan() => {
            check.ok("skips memory that was never used", json!({}))
        }
        Ok(_) => check.missing(
            "the kernel does not have it",
            "use Linux 6.7 or newer; without it each page table entry is read, which takes longer",
        ),
        Err(error) => check.missing(format!("/proc/self/pagemap: {error}"), "mount /proc"),
    }
}

fn priorities() -> Check {
    let check = Check::new(
        "priorities",
        "fast faults: the pager gives way to vCPUs, and returns to its own priority",
    );
    // Leaving SCHED_IDLE needs one of them: see sched(7).
    const NICE_OF_ZERO: u64 = 20;
    let capable =
        capabilities(None).is_ok_and(|own| own.effective.contains(CapabilitySet::SYS_NICE));
    let limit = getrlimit(Resource::Nice).current;
    match capable || limit.is_none_or(|nice| nice > NICE_OF_ZERO) {
        true => check.ok(
            if capable { "CAP_SYS_NICE" } else { "RLIMIT_NICE is high enough" },
            json!({ "cap_sys_nice": capable, "rlimit_nice": limit }),
        ),
        false => check.missing(
            "no CAP_SYS_NICE: a fault takes up to five times as long",
            "run as root, or raise the limit: `ulimit -e 21`, in systemd LimitNICE=0",
        ),
    }
}

fn huge_pages() -> Check {
    let check = Check::new(
        "huge pages",
        "guests of other programs with memory on hugetlbfs: serve, import",
    );
    let number = |file: &str| -> Option<u64> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    match (number("nr_hugepages"), number("free_hugepages")) {
        (Some(all @ 1..), Some(free)) => check.ok(
            format!("{free} of {all} of 2 MiB are free"),
            json!({ "huge_pages": all, "free": free, "page_bytes": 2 << 20 }),
        ),
        (Some(_), _) => check.missing("none are reserved", "sysctl vm.nr_hugepages=NUMBER"),
        _ => check.missing("the kernel has no hugetlbfs", "use a kernel with CONFIG_HUGETLBFS"),
    }
}

fn may_be_opened(path: &str) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(path).map(|_| ())
}

fn device(name: &'static str, path: &str, needed_for: &'static str, load: &str) -> Check {
    let check = Check::new(name, needed_for);
    match may_be_opened(path) {
        Ok(()) => check.ok(path, json!({})),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => check.missing(
            format!("{path}: {error}"),
            format!("give yourself read and write permission on {path} (chown, chmod or setfacl)"),
        ),
        Err(error) => check.missing(format!("{path}: {error}"), load),
    }
}
