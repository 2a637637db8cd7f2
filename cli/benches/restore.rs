//! The cost of `snap restore --lazy` until the guest's first instruction, by its own report, for guests of different
//! sizes.
//!
//!     cargo bench -p snapvm-cli --bench restore
//!     SNAP_BENCH_KERNEL=vmlinux SNAP_BENCH_INITRD=initrd.cpio cargo bench -p snapvm-cli --bench restore
//!
//! The second measures this Linux guest, snapshotted when its console shows READY. `SNAP_BENCH_CMDLINE` is its command
//! line, `SNAP_BENCH_SIZES` the sizes of its memory, `64M,1G` if that is not set. `cargo bench -p snapvm --bench
//! restore` measures the library, compared to the bare KVM calls.
#![allow(missing_docs, clippy::unwrap_used)]

use std::env;
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

const ROUNDS: usize = 101;

fn main() {
    if let Err(error) = vmm::probe() {
        println!("SKIPPED restore: {error}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    match env::var_os("SNAP_BENCH_KERNEL") {
        Some(kernel) => linux_processes(folder.path(), &kernel),
        None => demo_processes(folder.path()),
    }
}

/// `snap restore --lazy` of the demo guest.
fn demo_processes(folder: &Path) {
    let sizes = ["64M".into(), "16G".into()];
    processes(folder, &sizes, |_| {}, &["--beats", "1"]);
}

/// The same of a Linux guest, whose memory the kernel has filled with a description of each page.
fn linux_processes(folder: &Path, kernel: &OsStr) {
    let setting = |name: &str| env::var_os(format!("SNAP_BENCH_{name}"));
    let sizes = setting("SIZES").map_or("64M,1G".into(), |sizes| sizes.into_string().unwrap());
    let sizes: Vec<_> = sizes.split(',').map(str::to_owned).collect();
    let guest = |create: &mut Command| {
        create.args(["--when", "output:READY", "--kernel"]).arg(kernel);
        for (name, option) in [("INITRD", "--initrd"), ("CMDLINE", "--cmdline")] {
            if let Some(value) = setting(name) {
                create.arg(option).arg(value);
            }
        }
    };
    processes(folder, &sizes, guest, &["--for", "20ms"]);
}

/// `snap restore --lazy`, from the start of its process' main function, for guests of these sizes.
fn processes(folder: &Path, sizes: &[String], guest: impl Fn(&mut Command), end: &[&str]) {
    println!("snap restore --lazy to the first instruction, best / median of {ROUNDS}:");
    let snap = || Command::new(env!("CARGO_BIN_EXE_snap"));
    let path = |size: &str| folder.join(format!("{size}.snap"));
    for size in sizes {
        let mut create = snap();
        create.args(["--quiet", "create", "--memory", size]).arg(path(size));
        guest(&mut create);
        assert!(create.status().unwrap().success());
    }
    let mut times = vec![Vec::new(); sizes.len()];
    for _ in 0..ROUNDS {
        for (size, times) in sizes.iter().zip(&mut times) {
            let mut restore = snap();
            restore.args(["restore", "--lazy", "--report", "json"]).args(end).arg(path(size));
            let output = restore.stdin(Stdio::null()).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let report: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
            times.push(report["first_instruction_ms"].as_f64().unwrap());
        }
    }
    let median = |times: &[f64]| times[times.len() / 2];
    for (size, times) in sizes.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        println!("{size:>9} {:.2} / {:.2} ms", times[0], median(times));
    }
    for (size, times_of) in sizes.iter().zip(&times).skip(1) {
        let ratio = median(times_of) / median(&times[0]);
        println!("{size} takes {ratio:.2} x the time of {}", sizes[0]);
    }
}
