//! Mapped-ram files of QEMU: imported, exported bit for bit, mounted, and restored by QEMU.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::import_export::{GIB, MIB, PAGE, Place, assert_same, noise};
use crate::mounts::{Mounted, cached_bytes, host_can_mount};
use crate::qemu_machine::{Guest, Qemu, filled, host_has_qemu};
use crate::support::{Ran, SNAP, names, run, snap};

/// A file that QEMU 10.0.2 wrote: `-machine none -m 1`, and two pages of data.
const GOLDEN: &[u8] = include_bytes!("golden/qemu-10.0-mapped-ram.zst");

fn golden(place: &Place) -> PathBuf {
    let path = place.path("golden");
    let bytes = zstd::decode_all(GOLDEN).expect("it can be decoded");
    std::fs::write(&path, bytes).expect("it can be written");
    path
}

#[test]
fn a_file_of_qemu_is_exported_bit_for_bit() {
    let place = Place::new();
    let file = golden(&place);
    let ran = place.import(&file, &["--json"]).ok().json();
    assert_eq!((&ran["source"], &ran["memory_bytes"]), (&"qemu".into(), &MIB.into()));
    snap(["verify", &place.text("a.snap")]).ok();
    let info = snap(["info", &place.text("a.snap")]).ok().stdout;
    assert!(info.contains("kind qemu, machine none"), "{info}");
    place.export("qemu", "out").ok();
    assert_same(&file, &place.path("out"));
    let cat = ["cat", &place.text("a.snap"), "--gpa", "0x20000", "--len", "15", "--raw"];
    assert_eq!(snap(cat).ok().stdout, "page of a guest");
    place.import(&file, &["--force", "--region", "1G:1M"]).ok();
    let cat = ["cat", &place.text("a.snap"), "--gpa", "0x40020000", "--len", "15", "--raw"];
    assert_eq!(snap(cat).ok().stdout, "page of a guest");
    place.export("qemu", "again").ok();
    assert_same(&file, &place.path("again"));
    assert_eq!(names(place.0.path()), ["a.snap", "again", "golden", "out"]);
}

#[test]
fn what_cannot_be_done_with_a_file_of_qemu_is_said() {
    let place = Place::new();
    let file = golden(&place);
    place.import(&file, &[]).ok();
    let snapshot = place.text("a.snap");
    snap(["restore", &snapshot]).failed(1, &["a.snap", "a guest of QEMU"]);
    let to_stdout = snap(["export", &snapshot, "--format", "qemu", "-o", "-"]);
    to_stdout.failed(1, &["front to back", "-o"]);
    place.export("firecracker", "out").failed(1, &["no Firecracker vmstate"]);
    place.import(&file, &["--force", "--region", "0:2M"]).failed(1, &["--region", "2097152"]);
    place
        .import(&file, &["--force", "--vmstate", &place.text("golden")])
        .failed(3, &["golden", "a migration file of QEMU"]);
    let mut piped = Command::new(SNAP);
    piped.args(["import", "-", "-o"]).arg(place.path("b.snap"));
    piped.stdin(Stdio::from(std::fs::File::open(&file).expect("it opens")));
    let output = piped.output().expect("it runs");
    Ran::from(output).failed(3, &["stdin", "a migration file of QEMU", "name"]);

    let bytes = std::fs::read(&file).expect("it can be read");
    for (name, bad, message) in [
        ("cut", &bytes[..bytes.len() - 1], "it has no end"),
        ("shorter", &bytes[..1 << 20], "it is cut short"),
        ("tiny", &bytes[..20], "no list of RAM blocks"),
    ] {
        std::fs::write(place.path(name), bad).expect("it can be written");
        place.import(&place.path(name), &["--force"]).failed(3, &[name, message]);
    }
    let plain = String::from_utf8_lossy(&bytes[..80]).contains("mapped-ram");
    assert!(plain, "the capability is in the head");
    let mut other = bytes.clone();
    let at = bytes.windows(10).position(|word| word == b"mapped-ram").expect("it is there");
    other[at] = b'M';
    std::fs::write(place.path("plain"), other).expect("it can be written");
    place.import(&place.path("plain"), &["--force"]).failed(3, &["plain", "without mapped-ram"]);
}

#[test]
fn a_file_of_qemu_is_mounted() {
    if !host_can_mount("a_file_of_qemu_is_mounted") {
        return;
    }
    let place = Place::new();
    let file = golden(&place);
    place.import(&file, &[]).ok();
    let mounted = Mounted::start(&place.path("a.snap"), &[]);
    assert_eq!(names(&mounted.folder()), ["memory.core", "memory.raw", "qemu"]);
    assert_eq!(names(&mounted.file("qemu")), ["migration", "migration-lazy"]);
    assert_same(&file, &mounted.file("qemu/migration"));
    let lazy = std::fs::read(mounted.file("qemu/migration-lazy")).expect("it can be read");
    let bytes = std::fs::read(&file).expect("it can be read");
    let differ: Vec<_> = (0..lazy.len()).filter(|at| lazy[*at] != bytes[*at]).collect();
    assert_eq!(lazy.len(), bytes.len());
    // The bitmap's byte for pages 32 to 39, and the pages.
    assert!(differ[0] < 4096 && differ[1] >= 1 << 20, "{:x?}", &differ[..2]);
    assert!(lazy[1 << 20..2 << 20].iter().all(|byte| *byte == 0));
}

/// Where a guest has noise.
const NOISE: Range<u64> = 32 * MIB..56 * MIB;

/// A guest of 64 MiB that counts, with 24 MiB of noise in its memory, saved by QEMU as `m`. What it wrote to its serial port.
fn save_counting(guest: &Guest<'_>, place: &Place) -> Vec<u8> {
    let noise: Vec<u8> =
        (NOISE.start / PAGE..NOISE.end / PAGE).flat_map(|page| noise(page * 977 + 1)).collect();
    std::fs::write(place.path("noise"), noise).expect("it can be written");
    let loader = format!("loader,file={},addr={},force-raw=on", place.text("noise"), NOISE.start);
    let mut qemu = guest.start("first", &["-device", &loader]);
    let counted = qemu.stop_after(4);
    // The firmware has overwritten a part of it.
    let noise = qemu.memory(NOISE.start, NOISE.end - NOISE.start);
    std::fs::write(place.path("noise"), noise).expect("it can be written");
    qemu.save(&place.path("m"));
    counted
}

/// A restored guest has the memory of the file, and counts on.
#[track_caller]
fn assert_restored(mut qemu: Qemu, place: &Place, counted: &[u8]) {
    assert!(qemu.memory(0x10000, 0x70000) == filled());
    let noise = std::fs::read(place.path("noise")).expect("it is there");
    assert!(qemu.memory(NOISE.start, NOISE.end - NOISE.start) == noise);
    // All RAM blocks, as QEMU itself sees them.
    qemu.save(&place.path("second"));
    let raw = |file: &str, out: &str| {
        let snapshot = place.text("b.snap");
        snap(["import", &place.text(file), "-o", &snapshot, "--force"]).ok();
        snap(["export", &snapshot, "--format", "raw", "-o", &place.text(out), "--force"]).ok();
    };
    raw("m", "m.raw");
    raw("second", "second.raw");
    assert_same(&place.path("m.raw"), &place.path("second.raw"));
    let last = counted.last().expect("it has counted");
    let then = qemu.run_on();
    let expected: Vec<_> = (1..=3).map(|more| last.wrapping_add(more)).collect();
    assert_eq!(then[..3], expected);
}

#[test]
fn qemu_restores_from_an_export_and_from_a_mount() {
    let test = "qemu_restores_from_an_export_and_from_a_mount";
    if !host_has_qemu(test) {
        return;
    }
    for machine in ["pc", "q35"] {
        let place = Place::new();
        let guest = Guest { folder: place.0.path(), machine, mib: "64" };
        let counted = save_counting(&guest, &place);
        let ran = place.import(&place.path("m"), &[]).ok();
        assert_eq!(ran.stderr, "");
        place.export("qemu", "out").ok();
        assert_same(&place.path("m"), &place.path("out"));
        assert_restored(guest.restore("second", &place.path("out"), &[]), &place, &counted);
        if host_can_mount(test) {
            restores_from_a_mount(&place, machine, &counted);
        }
    }
}

fn restores_from_a_mount(place: &Place, machine: &str, counted: &[u8]) {
    let mounted = Mounted::start(&place.path("a.snap"), &["--populate", "off"]);
    assert_same(&place.path("m"), &mounted.file("qemu/migration"));
    let guest = Guest { folder: place.0.path(), machine, mib: "64" };
    let restored = guest.restore("third", &mounted.file("qemu/migration"), &[]);
    assert_restored(restored, place, counted);

    // Main memory is mapped, and read when it is touched.
    let mapped = format!("{machine},memory-backend=pc.ram");
    let guest = Guest { folder: place.0.path(), machine: &mapped, mib: "64" };
    let memory = mounted.file("memory.raw");
    let backend = lazy_backend(&memory, 64 * MIB);
    let lazy = mounted.file("qemu/migration-lazy");
    let mut qemu = guest.restore("fourth", &lazy, &["-object", &backend]);
    // QEMU advises huge pages: Linux reads 4 MiB where it touches a page. It does not touch the noise.
    let noise = NOISE.end - NOISE.start;
    let cached = cached_bytes(&memory);
    assert!(cached <= noise / 3, "{cached} bytes are read before the guest runs");
    let then = qemu.run_on();
    assert_eq!(then[0], counted[counted.len() - 1].wrapping_add(1));
    let cached = cached_bytes(&memory);
    assert!(cached <= noise / 3, "{cached} bytes are read for a guest that counts");
    drop(qemu);
    let restored = guest.restore("fifth", &lazy, &["-object", &backend]);
    assert_restored(restored, place, counted);
}

/// Main memory of QEMU that is mapped from a file, and written to in private.
fn lazy_backend(memory: &Path, len_bytes: u64) -> String {
    format!(
        "memory-backend-file,id=pc.ram,size={len_bytes},mem-path={},share=off,readonly=on,rom=off,\
         x-use-canonical-path-for-ramblock-id=off",
        memory.display()
    )
}

#[test]
fn memory_of_4_gib_has_the_hole_of_the_machine() {
    let test = "memory_of_4_gib_has_the_hole_of_the_machine";
    if !host_has_qemu(test) {
        return;
    }
    for (machine, low_end, high_end) in [("pc", 3 * GIB, 5 * GIB), ("q35", 2 * GIB, 6 * GIB)] {
        let place = Place::new();
        let guest = Guest { folder: place.0.path(), machine, mib: "4096" };
        // The firmware has its tables at the end of low memory.
        let gpas = [low_end - 64 * MIB, 4 * GIB, high_end - PAGE];
        let mut devices = Vec::new();
        for gpa in gpas {
            let file = place.path(&format!("{gpa:x}"));
            std::fs::write(&file, noise(gpa + 1)).expect("it can be written");
            devices.push("-device".to_owned());
            devices.push(format!("loader,file={},addr={gpa:#x},force-raw=on", file.display()));
        }
        let devices: Vec<_> = devices.iter().map(String::as_str).collect();
        let mut qemu = guest.start("first", &devices);
        let counted = qemu.stop_after(4);
        qemu.save(&place.path("m"));
        drop(qemu);
        place.import(&place.path("m"), &[]).ok();
        snap(["verify", &place.text("a.snap")]).ok();
        for gpa in gpas {
            let mut cat = Command::new(SNAP);
            cat.args(["cat", &place.text("a.snap"), "--gpa", &gpa.to_string(), "--len", "4096"]);
            let output = cat.arg("--raw").output().expect("it runs");
            assert!(output.stdout == noise(gpa + 1), "{gpa:#x}");
        }
        place.export("qemu", "out").ok();
        assert_same(&place.path("m"), &place.path("out"));
        let mut restored = guest.restore("second", &place.path("out"), &[]);
        for gpa in gpas {
            assert!(restored.memory(gpa, PAGE) == noise(gpa + 1), "{gpa:#x}");
        }
        assert!(restored.memory(0x10000, 0x70000) == filled());
        assert_eq!(restored.run_on()[0], counted[counted.len() - 1].wrapping_add(1));
    }
}

/// A guest that runs while it is saved: QEMU leaves old bytes of pages in the file that are zero at the end.
#[test]
fn a_file_of_a_running_guest_is_restored() {
    let test = "a_file_of_a_running_guest_is_restored";
    if !host_has_qemu(test) {
        return;
    }
    let place = Place::new();
    let guest = Guest { folder: place.0.path(), machine: "pc", mib: "64" };
    let mut qemu = guest.start("first", &[]);
    qemu.stop_after(4);
    qemu.ask("cont", serde_json::json!({}));
    qemu.save(&place.path("m"));
    drop(qemu);
    place.import(&place.path("m"), &[]).ok();
    place.export("qemu", "out").ok();
    let counted = std::fs::read(place.path("first.serial")).expect("it is there");
    // It ran on after it was saved, or was stopped in the middle of the last byte.
    let restored = |name: &str, file: &str| {
        let mut qemu = guest.restore(name, &place.path(file), &[]);
        (qemu.memory(0, 640 << 10), qemu.memory(MIB, 63 * MIB), qemu.run_on()[0])
    };
    let (one, other) = (restored("second", "m"), restored("third", "out"));
    assert!(one == other);
    assert!(counted.contains(&other.2.wrapping_sub(1)));
    let mut verify = Command::new(SNAP);
    verify.arg("verify").arg(place.path("a.snap"));
    run(verify).ok();
}
