//! `snap info`, `snap verify` and `snap demo`.

use snapfmt::{SectionKind, Snapshot};

use crate::support::{Sample, needs_vm, snap};

#[test]
fn info_shows_the_content_of_the_file() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "16M", "--codec", "lz4"]);
    let info = snap(["info", "--json", &sample.file.to_string_lossy()]).ok().json();
    assert_eq!(info["version"], 1);
    assert_eq!(info["memory_bytes"], 64 << 20);
    assert_eq!(info["regions"][0]["len"], 64 << 20);
    assert_eq!(info["id"].as_str().map(str::len), Some(36));
    assert_eq!(info["created_at"].as_str().map(|at| at.ends_with('Z')), Some(true));
    assert_eq!(info["metadata"]["guest"]["kind"], "demo");
    assert_eq!(info["metadata"]["host_cpu"]["vendor"].as_str().map(str::len), Some(12));
    let pages = |kind: &str| info["pages"][kind].as_u64().expect(kind);
    assert_eq!(pages("total"), 64 << 8);
    assert_eq!(pages("total"), pages("zero") + pages("data"));
    // An eighth of the working area has equal pages: one of them is stored.
    assert!((400..600).contains(&pages("duplicate")), "{info}");
    // An eighth of the working area is zero; the guest's own tables are stored too.
    assert!((3500..4096).contains(&pages("data")), "{info}");
    let stored: u64 = ["raw", "lz4"]
        .iter()
        .filter_map(|codec| info["metadata"]["storage"][codec]["pages"].as_u64())
        .sum();
    assert_eq!(stored, pages("stored"));
    assert_eq!(pages("data"), pages("stored") + pages("duplicate"));
    let kinds: Vec<_> = info["sections"].as_array().expect("a list").iter().collect();
    for kind in ["chunks", "index leaves", "index root", "memory map", "state", "metadata"] {
        assert_eq!(kinds.iter().filter(|section| section["kind"] == kind).count(), 1, "{kind}");
    }
    let text = snap(["info", &sample.file.to_string_lossy()]).ok().stdout;
    for what in ["version 1", "64 MiB", "lz4", "index root", "host_cpu"] {
        assert!(text.contains(what), "{what} not in {text}");
    }
}

#[test]
fn verify_detects_a_flip_in_every_section() {
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_string_lossy();
    let verified = snap(["verify", "--json", &file]).ok().json();
    assert_eq!(verified["ok"], true);
    let bytes = std::fs::read(&sample.file).expect("the file is there");
    assert_eq!(verified["file_bytes"], bytes.len());
    let snapshot = Snapshot::open(&sample.file).expect("it opens");
    let sections = snapshot.sections().iter().filter(|section| section.len > 0);
    let middles = sections
        .flat_map(|section| [section.offset, section.offset + section.len / 2, section.end() - 1]);
    let damaged = sample.folder.path().join("damaged.snap");
    for at in middles.chain([0, 100, 4000, bytes.len() as u64 - 1]) {
        let mut copy = bytes.clone();
        copy[at as usize] ^= 4;
        std::fs::write(&damaged, copy).expect("it can be written");
        let name = damaged.to_string_lossy();
        let messages: &[&str] = if at < 8 { &["not a snapshot"] } else { &["expected", "found"] };
        snap(["verify", &name]).failed(3, messages).failed(3, &["damaged.snap"]);
    }
}

#[test]
fn a_snapshot_is_private_to_its_owner() {
    use std::os::unix::fs::PermissionsExt;
    needs_vm!();
    let sample = Sample::small();
    let mode = std::fs::metadata(&sample.file).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn the_index_does_not_grow_with_memory() {
    needs_vm!();
    let index_bytes = |memory| {
        let sample = Sample::create(&["--memory", memory, "--work", "8M"]);
        let snapshot = Snapshot::open(&sample.file).expect("it opens");
        let kinds = [SectionKind::INDEX_LEAVES, SectionKind::INDEX_ROOT];
        let index = snapshot.sections().iter().filter(|section| kinds.contains(&section.kind));
        index.map(|section| section.len).sum::<u64>()
    };
    assert_eq!(index_bytes("64M"), index_bytes("16G"));
}

#[test]
fn the_demo_shows_that_both_modes_agree() {
    needs_vm!();
    let ran = snap(["demo", "--memory", "64M", "--work", "8M"]).ok();
    for what in ["first instruction", "eager", "lazy", "memory is the same"] {
        assert!(ran.stdout.contains(what), "{what} not in {}", ran.stdout);
    }
}
