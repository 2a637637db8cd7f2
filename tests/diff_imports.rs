//! Memory files of Firecracker that do not belong to their vmstate, or that are only a difference to a base.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::import_export::{MIB, PAGE, Place, assert_same, data_ranges};
use crate::support::{Ran, SNAP, names, run, snap};

/// A vmstate as Firecracker 1.16 begins it, of a guest with this memory.
fn sized_vmstate(mib: u8) -> Vec<u8> {
    let magic = 0x0710_1984_8664_0000_u64.to_le_bytes();
    [&[0], &magic[..], &[6], b"10.0.0", &[6, mib], &[7; 1000]].concat()
}

#[test]
fn memory_of_another_length_than_the_vmstate_says_is_refused() {
    let place = Place::new();
    let state = place.text("state");
    std::fs::write(&state, sized_vmstate(64)).expect("it can be written");
    let import = |name: &str, mib: u64, more: &[&str]| {
        let memory = place.image(name, mib * MIB, &[0]);
        place.import(&memory, &[&["--vmstate", &state, "--holes-are-zeros"], more].concat())
    };
    let mib_64 = "67108864";
    import("short", 32, &[]).failed(3, &["short", "33554432", mib_64, "do not belong together"]);
    import("long", 128, &[]).failed(3, &["long", "134217728", mib_64]);
    import("short", 32, &["--region", "0:32M"]).failed(3, &["short", mib_64]);
    assert_eq!(names(place.0.path()), ["long", "short", "state"]);
    // The caller knows of memory that can be plugged in.
    import("long", 128, &["--region", "0:64M", "--region", "8G:64M"]).ok();
    import("right", 64, &["--force"]).ok();
}

/// A full snapshot, imported as `a.snap`; a diff of it, and `merged`, the memory that both are together.
fn diff_and_base() -> Place {
    let place = Place::new();
    let pages = |seed: u8| -> Vec<u8> {
        (0..MIB / PAGE)
            .flat_map(|page| [(page as u8).wrapping_mul(7) ^ seed; PAGE as usize])
            .collect()
    };
    let full: Vec<u8> = (0..4).flat_map(pages).collect();
    std::fs::write(place.path("full"), &full).expect("it can be written");
    for state in ["full.state", "diff.state"] {
        std::fs::write(place.path(state), sized_vmstate(4)).expect("it can be written");
    }
    place.import(&place.path("full"), &["--vmstate", &place.text("full.state")]).ok();

    // Changed pages, of which one is zeros now: data of the file, not a hole.
    let zeroed = 2 * MIB + PAGE;
    let diff = place.image("diff", 4 * MIB, &[0, 5 * PAGE, zeroed, 4 * MIB - PAGE]);
    let mut merged = full;
    for range in data_ranges(&File::open(&diff).expect("it is there"), 4 * MIB) {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        File::open(&diff)
            .and_then(|file| file.read_exact_at(&mut bytes, range.start))
            .expect("it can be read");
        merged[range.start as usize..range.end as usize].copy_from_slice(&bytes);
    }
    assert!(merged[zeroed as usize..][..PAGE as usize] == [0; PAGE as usize]);
    std::fs::write(place.path("merged"), &merged).expect("it can be written");
    place
}

/// Imports a diff with its vmstate.
fn import(place: &Place, name: &str, out: &str, options: &[&str]) -> Ran {
    let (memory, out) = (place.text(name), place.text(out));
    let state = place.text("diff.state");
    snap([&["import", &memory, "-o", &out, "--vmstate", &state][..], options].concat())
}

#[track_caller]
fn assert_exports_merged(place: &Place, snapshot: &str) {
    let out = place.text("out");
    snap(["export", &place.text(snapshot), "--format", "firecracker", "-o", &out, "-f"]).ok();
    assert_same(&place.path("merged"), &place.path("out/memory"));
    assert_same(&place.path("diff.state"), &place.path("out/vmstate"));
}

#[test]
fn a_diff_snapshot_is_merged_with_its_base() {
    let place = diff_and_base();
    let import = |name: &str, out: &str, options: &[&str]| import(&place, name, out, options);
    let base = place.text("a.snap");
    let holes = ["diff has holes", "diff snapshot", "--base", "--holes-are-zeros"];
    import("diff", "b.snap", &[]).failed(1, &holes);
    assert!(!place.path("b.snap").exists());
    import("diff", "b.snap", &["--base", &base]).ok();
    std::fs::remove_file(place.path("a.snap")).expect("it can be removed");
    assert_exports_merged(&place, "b.snap");

    // A pipe has no holes.
    let script =
        "cat \"$DIFF\" | \"$SNAP\" import - -o \"$OUT\" --vmstate \"$STATE\" --base \"$BASE\"";
    let mut piped = std::process::Command::new("sh");
    piped.args(["-c", script]).env("SNAP", SNAP).env("DIFF", place.text("diff"));
    piped.env("OUT", place.text("piped.snap")).env("STATE", place.text("diff.state"));
    run({
        piped.env("BASE", place.text("b.snap"));
        piped
    })
    .failed(1, &["--base", "do not come through a pipe"]);
    assert!(!place.path("piped.snap").exists());

    // A base of another guest, and one that would be replaced.
    let merged = place.text("b.snap");
    import("diff", "b.snap", &["--base", &merged, "--force"]).failed(1, &["b.snap"]);
    let larger = place.image("larger", 5 * MIB, &[0]);
    place.import(&larger, &[]).ok();
    import("diff", "c.snap", &["--base", &base]).failed(1, &["--base", "memory maps differ"]);
    assert!(!place.path("c.snap").exists());
}

#[test]
fn a_diff_snapshot_becomes_a_layer_on_its_base() {
    let place = diff_and_base();
    let (base, layer) = (place.text("a.snap"), place.text("b.snap"));
    import(&place, "diff", "b.snap", &["--layer"]).failed(2, &["--base"]);
    let json =
        import(&place, "diff", "b.snap", &["--base", &base, "--layer", "--json"]).ok().json();
    let info = |file: &str| snap(["info", "--json", file]).ok().json();
    assert_eq!(json["parent_id"], info(&base)["id"]);
    // Four pages are in the diff; all others are in the base.
    assert_eq!(json["pages"]["data"], 3);
    assert_eq!(json["pages"]["zero"], 1);
    assert_eq!(json["pages"]["parent"], 4 * MIB / PAGE - 4);
    assert_exports_merged(&place, "b.snap");

    // The next diff is a layer on this layer.
    let next = import(&place, "diff", "c.snap", &["--base", &layer, "--layer"]).ok();
    assert!(next.stdout.contains("unchanged 4 MiB"), "{}", next.stdout);
    assert_exports_merged(&place, "c.snap");

    // A name that is no file of the base any more, and a base that is damaged where the diff is compared with it.
    import(&place, "diff", "a.snap", &["--base", &base, "--layer", "--force"])
        .failed(1, &["a.snap"]);
    let len = place.path("a.snap").metadata().expect("it is there").len();
    let file = File::options().write(true).open(&base).expect("it opens");
    file.write_all_at(&vec![0xee; 2048], 4096.min(len)).expect("it is written");
    import(&place, "diff", "d.snap", &["--base", &base, "--layer"]).failed(3, &["a.snap"]);
    assert!(!place.path("d.snap").exists());
}
