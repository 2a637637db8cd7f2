//! A core dump of `snap` has no memory of its guest.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::kernel;
use crate::support::{SNAP, Sample, end_of, needs_vm, signal, skip, snap, start};
use crate::talking::{LONG, Talking};
use crate::virtio_guest::{fill, request};

/// Bytes of the guest's memory.
const GUEST_BYTES: u64 = 64 << 20;

/// The mappings of a process that are a quarter as long as the memory of the guest, or longer, and whether each is left out of core dumps
/// (proc(5), the flag `dd` of `VmFlags`).
fn large_mappings(process: u32) -> Vec<(String, bool)> {
    let smaps = std::fs::read_to_string(format!("/proc/{process}/smaps")).expect("it runs");
    let mut large = Vec::new();
    let mut mapping = ("", 0);
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).ok();
        if let Some((start, end)) = range.and_then(|(a, b)| Some((number(a)?, number(b)?))) {
            mapping = (line, end - start);
        }
        if let Some(flags) = line.strip_prefix("VmFlags:")
            && mapping.0.contains(" rw")
            && mapping.1 >= GUEST_BYTES / 4
        {
            large.push((mapping.0.to_owned(), flags.split(' ').any(|flag| flag == "dd")));
        }
    }
    large
}

#[test]
fn guest_memory_is_left_out_of_core_dumps() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    let file = sample.file.to_string_lossy();
    for mode in [&[][..], &["--lazy"], &["--lazy", "--populate", "off"]] {
        let mut snap = Talking::snap([&["restore", &*file][..], mode].concat());
        snap.beats(1);
        let large = large_mappings(snap.id());
        assert!(!large.is_empty(), "{mode:?}");
        assert!(large.iter().all(|(_, left_out)| *left_out), "{mode:?}: {large:?}");
    }
}

/// Memory of the guest that is filled with [`MARK`].
const FILLED_BYTES: u32 = 16 << 20;
/// A page. A dump has the registers of threads that copy: less than 3 KiB each.
const MARK: [u8; 4096] = [b'Q'; 4096];

/// A snapshot of a guest with many pages of one letter, which then runs in a loop.
fn marked(folder: &Path) -> String {
    let path = |name: &str| folder.join(name).display().to_string();
    let code = [fill(0x40_0000, FILLED_BYTES, MARK[0]), request(), vec![0xeb, 0xfe]].concat();
    fs::write(path("kernel"), kernel::elf(&code, true, 0)).expect("it is written");
    let file = path("guest.snap");
    snap(["create", &file, "--memory", "64M", "--codec", "lz4", "--kernel", &path("kernel")]).ok();
    file
}

/// Runs `snap ARGS` until its memory is loaded, and ends it by a signal that dumps core. The dump.
fn dump(folder: &Path, args: &[&str], wanted: bool) -> Vec<u8> {
    let mut command = Command::new("prlimit");
    command.arg("--core=unlimited").arg(SNAP).args(args).current_dir(folder);
    command.env_remove("SNAP_CORE_DUMPS");
    // In the process's own memory, in each run: which chunks are there at that moment depends on the scheduler.
    command.env("MARK", String::from_utf8_lossy(&MARK).as_ref());
    if wanted {
        command.env("SNAP_CORE_DUMPS", "1");
    }
    let child = start(command);
    let stats = |pid: u32| fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
    let resident_kib = |pid: u32| -> Option<u32> {
        let stats = stats(pid).ok()?;
        let line = stats.lines().find_map(|line| line.strip_prefix("Rss:"))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    };
    // All of its memory is loaded.
    let began = Instant::now();
    while resident_kib(child.id()).is_none_or(|kib| kib < FILLED_BYTES >> 10) {
        assert!(began.elapsed() < LONG, "nothing is loaded");
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(child.id(), "ABRT");
    let output = end_of(child);
    assert!(output.status.core_dumped(), "{output:?}");
    let is_core = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("core");
    let mut entries = fs::read_dir(folder).expect("it is there").map(|entry| entry.expect("it"));
    let core = entries.find(|entry| is_core(&entry.file_name())).expect("a core dump").path();
    let bytes = fs::read(&core).expect("it can be read");
    fs::remove_file(core).expect("it is there");
    bytes
}

fn has_mark(dump: &[u8]) -> bool {
    dump.chunk_by(|one, next| one == next).any(|run| run[0] == MARK[0] && run.len() >= MARK.len())
}

/// Neither of the guest's memory, nor of the chunks that were decoded for it, nor of the rest of the process.
#[test]
fn a_core_dump_has_no_page_of_the_guest() {
    needs_vm!();
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").expect("it is there");
    if pattern.trim() != "core" {
        return skip("a_core_dump_has_no_page", "core dumps are not in the working directory");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = marked(folder.path());
    for mode in [&[][..], &["--lazy", "--populate", "full"]] {
        // In the jail, no file can be made.
        let args = [&["restore", &*file, "--jail", "off"], mode].concat();
        let dumped = dump(folder.path(), &args, false);
        assert_eq!(&dumped[..4], b"\x7fELF");
        assert!(!has_mark(&dumped), "{mode:?}");
        // The environment is there where it is wanted: otherwise the search would show nothing.
        assert!(has_mark(&dump(folder.path(), &args, true)), "{mode:?}");
    }
}

#[test]
fn only_one_value_asks_for_memory_in_core_dumps() {
    let mut command = Command::new(SNAP);
    command.args(["info", "x.snap"]).env("SNAP_CORE_DUMPS", "yes");
    let ran = crate::support::run(command);
    ran.failed(1, &["SNAP_CORE_DUMPS is \"yes\": expected 1"]);
}
