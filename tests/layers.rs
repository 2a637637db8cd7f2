//! Layers through the program: rebase, diff, flatten, and parents that were moved.

use std::path::{Path, PathBuf};
use std::process::Command;

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{Contents, MemoryRegion, Metadata, WriteOptions, write_snapshot};

use crate::support::{SNAP, Sample, names, needs_vm, restore, run, snap};

/// A folder with two complete snapshots, `a.snap` and `b.snap`, of 2048 pages, of which 700 are
/// not zero and 5 differ: one of them is zero in b.
pub(crate) fn two() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut memory = vec![0; 2048 * PAGE_BYTES];
    for (number, page) in memory.chunks_mut(PAGE_BYTES).enumerate().take(700) {
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (at / 100 + number) as u8 | 1;
        }
        page[0] = (number >> 8) as u8;
    }
    let (a, b) = (folder.path().join("a.snap"), folder.path().join("b.snap"));
    store(&a, &memory);
    for number in [3, 4, 5, 1500] {
        memory[number * PAGE_BYTES..(number + 1) * PAGE_BYTES].fill(0xee);
    }
    memory[600 * PAGE_BYTES..601 * PAGE_BYTES].fill(0);
    store(&b, &memory);
    (folder, a, b)
}

fn store(path: &Path, memory: &[u8]) {
    let len = memory.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    let contents =
        Contents::new(&regions, &memory, &data).metadata(Metadata::default().tool("test"));
    let go_on = |_| std::ops::ControlFlow::Continue(());
    write_snapshot(path, contents, &WriteOptions::default(), &go_on).expect("it is written");
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Damage in a parent is found by every command that reads it, and the message names the parent.
#[test]
fn a_damaged_parent_is_named_and_not_the_layer() {
    let (folder, a, b) = two();
    let layer = text(&folder.path().join("layer.snap"));
    let out = text(&folder.path().join("out.snap"));
    snap(["rebase", &text(&b), "--onto", &text(&a), "-o", &layer]).ok();
    let verified = snap(["verify", &layer, "--json"]).ok().json();
    assert_eq!(verified["layers"].as_array().map(Vec::len), Some(2), "{verified}");
    let mut bytes = std::fs::read(&a).expect("it can be read");
    // In the first chunk's payload, which opening does not read.
    bytes[4096 + 200] ^= 1;
    std::fs::write(&a, bytes).expect("it can be written");
    let messages = ["layer.snap: ", "a.snap: corrupt chunks at offset 4096"];
    snap(["verify", &layer]).failed(3, &messages);
    snap(["verify", &layer, "--this-file-only"]).ok();
    // Also where the pages go through another function of the program.
    snap(["flatten", &layer, "-o", &out]).failed(3, &messages);
    snap(["export", &layer, "--format", "raw", "-o", &out]).failed(3, &messages);
    let messages = ["a.snap: cannot read the parent: corrupt chunks at offset 4096"];
    snap(["rebase", &text(&b), "--onto", &text(&a), "-o", &out]).failed(3, &messages);
}

#[test]
fn rebase_diff_and_flatten_agree() {
    let (folder, a, b) = two();
    let (layer, flat) = (folder.path().join("layer.snap"), folder.path().join("flat.snap"));
    let (a, b, layer, flat) = (text(&a), text(&b), text(&layer), text(&flat));
    let diff = snap(["diff", &a, &b, "--json"]).ok().json();
    assert_eq!(diff["differing_pages"], 5);
    let runs: Vec<_> = [(3, 3), (600, 1), (1500, 1)]
        .iter()
        .map(|(first, pages)| serde_json::json!({ "gpa": first * 4096, "len": pages * 4096 }))
        .collect();
    assert_eq!(diff["runs"], serde_json::json!(runs));

    let rebased = snap(["rebase", &b, "--onto", &a, "-o", &layer, "--json"]).ok().json();
    // Four pages with the same bytes: one is stored.
    let pages = serde_json::json!({ "total": 2048, "data": 4, "stored": 1, "duplicate": 3,
                                    "parent": 2043, "zero": 1 });
    assert_eq!(rebased["pages"], pages);
    assert_eq!(rebased["memory_bytes"], 2048 * 4096);
    assert_eq!(rebased["nonzero_bytes"], 4 * 4096);
    assert!(rebased["total_ms"].as_f64() > Some(0.0), "{rebased}");
    let id = snap(["info", &a, "--json"]).ok().json()["id"].clone();
    assert_eq!(rebased["parent_id"], id);
    snap(["verify", &layer]).ok();
    let info = snap(["info", &layer, "--json"]).ok().json();
    assert_eq!(info["chain"][1], id);
    assert_eq!(snap(["diff", &layer, &b, "--json"]).ok().json()["differing_pages"], 0);
    assert_eq!(snap(["diff", &layer, &a, "--json"]).ok().json()["differing_pages"], 5);

    snap(["flatten", &layer, "-o", &flat]).ok();
    snap(["verify", &flat]).ok();
    assert_eq!(snap(["diff", &flat, &b, "--json"]).ok().json()["differing_pages"], 0);
    let info = snap(["info", &flat, "--json"]).ok().json();
    assert_eq!(info["parent_id"], serde_json::Value::Null);
    assert_eq!(info["metadata"]["tool"], "test");
    // The inputs are unchanged, and no other file is left.
    assert_eq!(names(folder.path()), ["a.snap", "b.snap", "flat.snap", "layer.snap"]);
}

#[test]
fn a_guest_continues_through_layers() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "256M", "--work", "32M"]);
    let whole = snap(["info", "--json", &text(&sample.file)]).ok().json();
    let mut before = sample.file.clone();
    for (number, beat) in [(1, 3), (2, 6), (3, 9)] {
        let layer = sample.folder.path().join(format!("{number}.snap"));
        let when = format!("output:beat {beat} ok\n");
        let args = ["create", &text(&layer), "--parent", &text(&before), "--when", &when];
        snap(args).ok();
        snap(["verify", &text(&layer)]).ok();
        let info = snap(["info", "--json", &text(&layer)]).ok().json();
        assert_eq!(info["chain"].as_array().map(Vec::len), Some(number + 1));
        // A beat changes one page in 32 of the work: not much more is stored.
        let (stored, all) = (info["pages"]["data"].as_u64(), whole["pages"]["data"].as_u64());
        assert!(stored > Some(50) && stored < all.map(|all| all / 10), "{stored:?} of {all:?}");
        before = layer;
    }
    // The chain, and the same flattened, continue equally; so does the first file after nine beats.
    let flat = sample.folder.path().join("flat.snap");
    snap(["flatten", &text(&before), "-o", &text(&flat)]).ok();
    let mut hashes = std::collections::BTreeSet::new();
    for (file, beats) in [(&before, "2"), (&flat, "2"), (&sample.file, "11")] {
        for mode in [&["--hash", "--beats", beats][..], &["--hash", "--beats", beats, "--lazy"]] {
            let ran = restore(file, mode).ok();
            assert!(ran.stdout.ends_with("beat 10 ok\nbeat 11 ok\n"), "{}", ran.stdout);
            hashes.insert(ran.report()["memory_sha256"].as_str().map(str::to_owned));
        }
    }
    assert_eq!(hashes.len(), 1, "{hashes:?}");
    let messages = ["--when output:TEXT"];
    snap(["create", "x.snap", "--from", &text(&flat)]).failed(1, &messages);
}

#[test]
fn a_moved_parent_is_named_and_found_by_options() {
    let (folder, a, b) = two();
    let layer = folder.path().join("layer.snap");
    snap(["rebase", &text(&b), "--onto", &text(&a), "-o", &text(&layer)]).ok();
    let elsewhere = tempfile::tempdir().expect("a temporary folder");
    let moved = elsewhere.path().join("a.snap");
    std::fs::rename(&a, &moved).expect("it can be moved");
    let messages = ["layer.snap", "parent", "a.snap", "give its path"];
    for command in ["info", "verify", "restore"] {
        snap([command, &text(&layer)]).failed(3, &messages);
    }
    snap(["info", &text(&layer), "--parent", &text(&moved)]).ok();
    let mut with_path = Command::new(SNAP);
    with_path.arg("verify").arg(&layer).env("SNAP_PATH", elsewhere.path());
    run(with_path).ok();
    // Under any name: it is found by its id.
    std::fs::rename(&moved, elsewhere.path().join("renamed")).expect("it can be renamed");
    let mut by_id = Command::new(SNAP);
    by_id.arg("verify").arg(&layer).env("SNAP_PATH", elsewhere.path());
    assert!(run(by_id).ok().stdout.contains("renamed: ok"));
    let mut in_vain = Command::new(SNAP);
    in_vain.arg("verify").arg(&layer).env("SNAP_PATH", folder.path());
    run(in_vain).failed(3, &["a.snap", "by its id, in the files of", "give its path"]);
    // Another snapshot in its place is not accepted.
    std::fs::copy(&b, &a).expect("it can be copied");
    let messages = ["layer.snap", "a.snap", "expected as the parent, found"];
    snap(["info", &text(&layer)]).failed(3, &messages);
}

#[test]
fn no_command_replaces_its_input() {
    let (folder, a, b) = two();
    let layer = text(&folder.path().join("layer.snap"));
    let (a, b) = (text(&a), text(&b));
    snap(["rebase", &b, "--onto", &a, "-o", &layer]).ok();
    let messages = ["choose another output"];
    snap(["rebase", &layer, "--onto", &a, "-o", &a, "-f"]).failed(1, &messages);
    snap(["flatten", &layer, "-o", &a, "-f"]).failed(1, &messages);
    snap(["export", &a, "--format", "raw", "-o", &a, "-f"]).failed(1, &messages);
    let image = text(&folder.path().join("image"));
    std::fs::write(&image, vec![1; PAGE_BYTES]).expect("it can be written");
    snap(["import", &image, "-o", &image, "-f"]).failed(1, &messages);
    snap(["flatten", &layer, "-o", "/dev/null", "-f"]).failed(1, &["not a regular file"]);
    for file in [&a, &b, &layer] {
        snap(["verify", file]).ok();
    }
}

#[test]
fn an_existing_output_and_other_memory_are_refused() {
    let (folder, a, b) = two();
    snap(["flatten", &text(&a), "-o", &text(&b)]).failed(1, &["b.snap exists"]);
    let small = folder.path().join("small.snap");
    store(&small, &vec![1; PAGE_BYTES]);
    let out = text(&folder.path().join("out.snap"));
    snap(["rebase", &text(&small), "--onto", &text(&a), "-o", &out]).failed(3, &["memory map"]);
    snap(["diff", &text(&small), &text(&a)]).failed(1, &["memory maps are not the same"]);
    assert_eq!(names(folder.path()), ["a.snap", "b.snap", "small.snap"]);
}

/// A picture in every format; it does not overwrite the drawn file.
#[test]
fn a_picture_shows_duplicates_and_parents() {
    let (folder, a, b) = two();
    let layer = text(&folder.path().join("layer.snap"));
    snap(["rebase", &text(&b), "--onto", &text(&a), "-o", &layer]).ok();
    let drawn = snap(["info", &layer, "--map"]).ok().stdout;
    assert!(drawn.contains("d duplicate") && drawn.contains("p parent"), "{drawn}");
    let cell = drawn.lines().next().and_then(|row| row.chars().nth("0x000000000000 ".len() + 4));
    assert_eq!(cell, Some('D'), "{drawn}");
    for (name, starts) in [("map.svg", &b"<svg "[..]), ("map.png", b"\x89PNG\r\n")] {
        let path = folder.path().join(name);
        let option = format!("--map={}", text(&path));
        snap(["info", &layer, &option]).ok();
        assert!(std::fs::read(&path).expect("it is there").starts_with(starts), "{name}");
        snap(["info", &layer, &option]).failed(1, &["exists", "--force"]);
        snap(["info", &layer, &option, "--force"]).ok();
    }
    snap(["info", &layer, "--map=map.gif"]).failed(1, &[".svg or .png"]);
}
