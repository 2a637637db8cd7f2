//! A real Firecracker, if the environment names one: its diff snapshots become layers, and it runs what is exported.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::{Value, json};

use crate::firecracker_machine::{Firecracker, program};
use crate::import_export::{MIB, Place, assert_same, data_ranges};
use crate::kernel;
use crate::support::{needs_vm, skip, snap};

const MEMORY_MIB: u64 = 16;

/// Counts in memory, in another page each time, and writes the lower byte of the counter to its serial port.
const COUNT: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // next: inc dword [0x200000]
    0xa1, 0x00, 0x00, 0x20, 0x00, // mov eax, [0x200000]
    0x89, 0xc3, // mov ebx, eax
    0x81, 0xe3, 0xff, 0x03, 0x00, 0x00, // and ebx, 0x3ff
    0xc1, 0xe3, 0x0c, // shl ebx, 12
    0x89, 0x83, 0x00, 0x00, 0x40, 0x00, // mov [ebx + 0x400000], eax
    0xee, // out dx, al
    0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
    0xe2, 0xfe, // wait: loop wait
    0xeb, 0xda, // jmp next
];

/// Waits for bytes that the guest writes, and checks that they count. Returns the last one.
fn counted(guest: &mut Firecracker, bytes: usize, after: Option<u8>) -> u8 {
    let mut found = vec![0; bytes];
    guest.serial.read_exact(&mut found).expect("the guest runs");
    let expected = after.map_or(found[0], |byte| byte.wrapping_add(1));
    for (at, byte) in found.iter().enumerate() {
        assert_eq!(*byte, expected.wrapping_add(at as u8), "byte {at}");
    }
    found[bytes - 1]
}

#[test]
fn diff_snapshots_become_layers() {
    needs_vm!();
    let Some(program) = program() else {
        return skip("diff_snapshots_become_layers", "$SNAP_FIRECRACKER names no Firecracker");
    };
    let place = Place::new();
    fs::write(place.path("kernel"), kernel::elf(COUNT, true, 0)).expect("it is written");
    let mut guest = Firecracker::start(&program, place.0.path(), "first.sock");
    let boot = json!({"kernel_image_path": place.path("kernel"), "boot_args": "quiet"});
    guest.boot(&boot, MEMORY_MIB);
    let mut last = counted(&mut guest, 100, None);
    guest.set_state("Paused");
    guest.snapshot("Full", &place.path("full"), &place.path("full.state"));
    let full = place.text("full.state");
    place.import(&place.path("full"), &["--vmstate", &full]).ok();

    let mut base = "a.snap".to_owned();
    for round in ["b", "c"] {
        guest.set_state("Resumed");
        last = counted(&mut guest, 150, Some(last));
        guest.set_state("Paused");
        let name = |kind: &str| place.path(&format!("{round}.{kind}"));
        guest.snapshot("Diff", &name("diff"), &name("state"));
        // Nothing has run meanwhile, so this is what the diff means.
        guest.snapshot("Full", &name("full"), &name("full.state"));
        let layer = import_layer(&place, round, &base);
        let parent = snap(["info", "--json", &place.text(&base)]).ok().json();
        assert_eq!(layer["parent_id"], parent["id"]);
        let data = layer["pages"]["data"].as_u64().expect("a number");
        assert!((100..1000).contains(&data), "{data} pages");
        base = format!("{round}.snap");
        export(&place, &base, round);
        assert_same(&name("full"), &place.path(&format!("{round}/memory")));
        assert_same(&name("state"), &place.path(&format!("{round}/vmstate")));
    }
    drop(guest);

    let folder = place.path("c");
    let mut restored = Firecracker::start(&program, place.0.path(), "second.sock");
    restored.load(&folder.join("vmstate"), "File", &folder.join("memory"));
    // Bytes that its serial port had not written yet come first.
    let _ = counted(&mut restored, 300, None);
}

/// Imports a diff as a layer. It is sparse: otherwise this would show nothing.
fn import_layer(place: &Place, round: &str, base: &str) -> Value {
    let diff = place.path(&format!("{round}.diff"));
    let file = fs::File::open(&diff).expect("it is there");
    let data = data_ranges(&file, MEMORY_MIB * MIB);
    assert!(data.iter().map(|range| range.end - range.start).sum::<u64>() < MEMORY_MIB * MIB / 2);
    let state = place.text(&format!("{round}.state"));
    let (base, out) = (place.text(base), place.text(&format!("{round}.snap")));
    let args = ["--vmstate", &state, "--base", &base, "--layer", "--json"];
    snap([&["import", &diff.display().to_string(), "-o", &out][..], &args].concat()).ok().json()
}

fn export(place: &Place, snapshot: impl AsRef<Path>, out: &str) {
    let snapshot = place.0.path().join(snapshot).display().to_string();
    snap(["export", &snapshot, "--format", "firecracker", "-o", &place.text(out)]).ok();
}
