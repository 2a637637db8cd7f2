//! A guest that gives memory back, through the program: the discarded pages read as zeros and are left out of
//! snapshots, also if the pager had loaded them.

use std::fs;

use crate::kernel;
use crate::support::{Ran, needs_vm, snap};
use crate::virtio_guest::{self, WRITE, request, start, submit};

/// The memory that the guest fills with the letter A and then reports as free.
const FREE: u32 = 0x40_0000;
const FREE_BYTES: u32 = 64 << 10;
const REPORT_QUEUE: u32 = 2;
/// Free page reporting.
const FEATURES: u32 = 1 << 5;

fn fill() -> Vec<u8> {
    virtio_guest::fill(FREE, FREE_BYTES, b'A')
}

/// Sets the device up, and reports one range.
fn report() -> Vec<u8> {
    let range = [(FREE, FREE_BYTES, WRITE)];
    [start(FEATURES, REPORT_QUEUE), submit(REPORT_QUEUE, 1, &range)].concat()
}

fn show() -> Vec<u8> {
    virtio_guest::show(FREE + FREE_BYTES / 2)
}

/// `snap` with these arguments; FOLDER stands for the folder.
fn run(folder: &tempfile::TempDir, args: &str) -> Ran {
    let path = folder.path().display().to_string();
    snap(args.split(' ').map(|arg| arg.replace("FOLDER", &path)).collect::<Vec<_>>())
}

fn folder_with(code: &[Vec<u8>]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let kernel = kernel::elf(&code.concat(), true, 0);
    fs::write(folder.path().join("kernel"), kernel).expect("it is written");
    folder
}

fn nonzero_bytes(created: &Ran) -> i64 {
    let summary: serde_json::Value = serde_json::from_str(&created.stdout).expect("JSON");
    summary["nonzero_bytes"].as_i64().expect("a number")
}

#[test]
fn free_pages_of_a_fresh_guest_are_left_out() {
    needs_vm!();
    let create = "create FOLDER/a.snap --json --balloon --kernel FOLDER/kernel";
    let end = || kernel::power_off();
    let with = run(&folder_with(&[fill(), report(), request(), show(), end()]), create).ok();
    let folder = folder_with(&[fill(), request(), report(), show(), end()]);
    let without = run(&folder, create).ok();
    // Three more pages are in use: the rings.
    assert_eq!(nonzero_bytes(&without) - nonzero_bytes(&with), i64::from(FREE_BYTES) - 3 * 4096);
}

#[test]
fn free_pages_of_a_restored_guest_read_as_zeros_and_stay_so() {
    needs_vm!();
    let code =
        [fill(), request(), show(), report(), show(), request(), show(), kernel::power_off()];
    let folder = folder_with(&code);
    run(&folder, "create FOLDER/a.snap --balloon --kernel FOLDER/kernel").ok();
    for mode in ["", " --lazy", " --lazy --populate full"] {
        let ran = run(&folder, &format!("restore FOLDER/a.snap{mode}")).ok();
        assert_eq!(ran.stdout, "A\n0\n0\n", "{mode}");
    }
    // A layer over the snapshot that has them: they are zeros in it, not the parent's pages.
    run(&folder, "create FOLDER/b.snap --from FOLDER/a.snap --when request").ok();
    for mode in ["", " --lazy"] {
        let ran = run(&folder, &format!("restore FOLDER/b.snap{mode}")).ok();
        assert_eq!(ran.stdout, "0\n", "{mode}");
    }
    // A whole snapshot of the same leaves them out.
    run(&folder, "flatten FOLDER/b.snap -o FOLDER/c.snap").ok();
    let pages = |name: &str| {
        let info = run(&folder, &format!("info FOLDER/{name} --json")).ok();
        let info: serde_json::Value = serde_json::from_str(&info.stdout).expect("JSON");
        info["pages"]["data"].as_i64().expect("a number")
    };
    // Except the rings, which are new.
    assert_eq!(pages("a.snap") - pages("c.snap"), i64::from(FREE_BYTES / 4096) - 3);
}
