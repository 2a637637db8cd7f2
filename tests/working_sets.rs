//! Record, train, optimize and prefetch through the program.

use std::path::{Path, PathBuf};

use serde_json::Value;
use snapfmt::{
    Changes, PageEntry, PageIndex, Phase, SectionKind, Snapshot, WorkingSet, copy_snapshot,
};

use crate::file_bytes::without_id;
use crate::support::{Sample, needs_vm, restore, snap};

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn trained(sample: &Sample) -> PathBuf {
    let out = sample.folder.path().join("trained.snap");
    snap(["train", &text(&sample.file), "--beats", "1", "--runs", "2", "-o", &text(&out)]).ok();
    out
}

fn number(value: &Value, path: &[&str]) -> u64 {
    let found = path.iter().fold(value, |value, key| &value[*key]);
    found.as_u64().unwrap_or_else(|| panic!("{path:?} in {value}"))
}

/// A file with the memory of `from` and the given pages as its working set.
fn with_set(from: &Path, to: &Path, pages: impl Iterator<Item = u32>) {
    let snapshot = Snapshot::open(from).expect("it opens");
    let pages: Vec<_> = pages.map(|page| (PageIndex(page), Phase::FirstOutput)).collect();
    let changes =
        Changes::new(WorkingSet::join([&pages[..]]), snapshot.metadata().expect("it is good"));
    let go_on = |_| std::ops::ControlFlow::Continue(());
    copy_snapshot(to, &snapshot, &changes, &go_on).expect("it is written");
}

#[test]
fn a_trained_and_optimized_guest_finds_its_pages_loaded() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "128M", "--work", "32M"]);
    let before = std::fs::read(&sample.file).expect("it can be read");
    let (trained, fast) = (trained(&sample), sample.folder.path().join("fast.snap"));
    let summary = snap(["optimize", &text(&trained), "-o", &text(&fast), "--json"]).ok().json();
    assert_eq!(std::fs::read(&sample.file).expect("it can be read"), before, "the input changed");
    for file in [&trained, &fast] {
        snap(["verify", &text(file)]).ok();
        let diff = snap(["diff", &text(&sample.file), &text(file), "--json"]).ok().json();
        assert_eq!(diff["differing_pages"], 0);
    }

    // A beat reads a quarter of the pages, and here each of them was recorded.
    let info = snap(["info", &text(&fast), "--json"]).ok().json();
    let (hot, data) = (number(&info, &["working_set", "pages"]), number(&info, &["pages", "data"]));
    assert!((data / 5..data / 2).contains(&hot), "{hot} of {data}");
    assert_eq!(number(&summary, &["hot_pages"]), hot);
    assert_eq!(info["working_set"]["restores"], 2);
    let plain = snap(["info", &text(&sample.file), "--json"]).ok().json();
    let sizes = [&info, &plain].map(|info| number(info, &["file_bytes"]));
    assert!(sizes[0] * 10 <= sizes[1] * 11, "{sizes:?}");
    assert!(snap(["info", &text(&fast)]).ok().stdout.contains("of 2 restores"));
    let map = snap(["info", &text(&fast), "--map"]).ok().stdout;
    assert!(
        map.contains("h hot")
            && !snap(["info", &text(&sample.file), "--map"]).ok().stdout.contains("hot")
    );

    let run = |file: &Path, more: &[&str]| {
        let options = [&["--lazy", "--beats", "3", "--hash"], more].concat();
        let ran = restore(file, &options).ok();
        assert!(ran.stdout.ends_with("beat 3 ok\n"), "{}", ran.stdout);
        ran.report()
    };
    // With `auto` the number of its faults depends on timing.
    let lazy = run(&sample.file, &["--populate", "off"]);
    assert_eq!(lazy["pager"]["prefetch"], "off");
    for file in [&trained, &fast] {
        let report = run(file, &[]);
        // How much it loads before the guest has done its work depends on timing.
        assert_ne!(report["pager"]["prefetch"], "off", "{report}");
        assert_eq!(report["memory_sha256"], lazy["memory_sha256"]);
        // Both may load the same page at the same time: such a fault finds it present.
        let faults = [&report, &lazy].map(|report| {
            number(report, &["pager", "faults"]) - number(report, &["pager", "spurious_faults"])
        });
        assert!(faults[0] <= faults[1], "{faults:?}");
        let off = run(file, &["--prefetch", "off"]);
        assert_eq!(off["pager"]["prefetch"], "off");
        assert_eq!(off["memory_sha256"], lazy["memory_sha256"]);
        let all = run(file, &["--prefetch", "all"]);
        assert_eq!(all["memory_sha256"], lazy["memory_sha256"]);
        assert_ne!(all["pager"]["population"], "off");
    }
}

/// Optimizing the optimized file gives the same bytes, except the fields that differ in each file.
#[test]
fn optimizing_twice_changes_nothing() {
    needs_vm!();
    let sample = Sample::small();
    let trained = trained(&sample);
    let path = |name: &str| sample.folder.path().join(name);
    snap(["optimize", &text(&trained), "-o", &text(&path("once"))]).ok();
    snap(["optimize", &text(&path("once")), "-o", &text(&path("twice"))]).ok();
    let sections = |name: &str| {
        let snapshot = Snapshot::open(path(name)).expect("it opens");
        let bytes = without_id(std::fs::read(path(name)).expect("it can be read"));
        let sections = snapshot.sections().iter().filter(|s| s.kind != SectionKind::METADATA);
        sections.map(|s| bytes[s.offset as usize..s.end() as usize].to_vec()).collect::<Vec<_>>()
    };
    assert!(sections("once") == sections("twice"));
    // The pages of the set are the first in the file.
    let snapshot = Snapshot::open(path("twice")).expect("it opens");
    let set = snapshot.working_set().expect("it is good").expect("it is there");
    let first = set.pages().find_map(|(page, _)| match snapshot.entry(page).expect("it is good") {
        PageEntry::Data { chunk, .. } => Some(chunk.offset()),
        _ => None,
    });
    assert_eq!(first, Some(4096));
}

#[test]
fn a_recording_restore_runs_normally_and_writes_a_copy() {
    needs_vm!();
    let sample = Sample::small();
    let out = sample.folder.path().join("recorded.snap");
    let plain = sample.restore(&["--lazy", "--beats", "2", "--hash"]).ok();
    let options = ["--lazy", "--record", "-o", &text(&out), "--beats", "2", "--hash"];
    let ran = sample.restore(&options).ok();
    assert_eq!(ran.stdout, plain.stdout);
    assert_eq!(ran.report()["memory_sha256"], plain.report()["memory_sha256"]);
    snap(["verify", &text(&out)]).ok();
    let info = snap(["info", &text(&out), "--json"]).ok().json();
    assert_eq!(info["working_set"]["restores"], 1);
    let from = &snap(["info", &text(&sample.file), "--json"]).ok().json()["id"];
    assert_eq!(&info["metadata"]["rewritten_from"][0], from);
    // The output is not replaced, and the input is never one.
    sample.restore(&options).failed(1, &["recorded.snap exists"]);
    let onto_itself = ["--lazy", "--record", "-o", &text(&sample.file), "--beats", "1"];
    sample.restore(&onto_itself).failed(1, &["is the input, or a parent of it"]);
}

#[test]
fn invalid_options_are_refused_before_a_guest_runs() {
    needs_vm!();
    let sample = Sample::small();
    let (file, out) = (text(&sample.file), text(&sample.folder.path().join("out.snap")));
    snap(["train", &file, "-o", &out]).failed(1, &["--until TEXT, --for TIME"]);
    snap(["train", &file, "-o", &file, "--force", "--beats", "1"]).failed(1, &["is the input"]);
    snap(["optimize", &file, "-o", &out]).failed(1, &["snap train"]);
    snap(["restore", &file, "--record", "-o", &out]).failed(2, &["--lazy"]);
    snap(["restore", "--lazy", &file, "--record"]).failed(2, &["--out"]);
    snap(["restore", "--lazy", &file, "--prefetch", "some"]).failed(2, &["off|hot|all"]);
    assert_eq!(sample.names(), ["guest.snap"]);
}

/// Sets with pages that the guest never touches, with all of memory, and of another guest: it runs correctly.
#[test]
fn wrong_sets_cost_time_but_no_wrong_pages() {
    needs_vm!();
    let sample = Sample::small();
    let plain = sample.restore(&["--lazy", "--beats", "3", "--hash"]).ok().report();
    let all = 0..(64 << 20) / 4096;
    let sets: [(&str, Vec<u32>); 3] = [
        ("all", all.clone().collect()),
        ("backwards", all.clone().rev().step_by(3).collect()),
        ("zeros", (5000..9000).collect()),
    ];
    for (name, pages) in sets {
        let path = sample.folder.path().join(name);
        with_set(&sample.file, &path, pages.into_iter());
        let optimized = sample.folder.path().join(format!("{name}-optimized"));
        snap(["optimize", &text(&path), "-o", &text(&optimized)]).ok();
        for file in [&path, &optimized] {
            snap(["verify", &text(file)]).ok();
            let report = restore(file, &["--lazy", "--beats", "3", "--hash"]).ok().report();
            assert_eq!(report["memory_sha256"], plain["memory_sha256"], "{name}");
            assert_eq!(report["bad_beats"], 0, "{name}");
        }
    }
}

/// Damage of the set is reported, and the guest runs without it.
#[test]
fn a_damaged_set_is_reported_and_the_guest_runs() {
    needs_vm!();
    let sample = Sample::small();
    let trained = trained(&sample);
    let snapshot = Snapshot::open(&trained).expect("it opens");
    let of_kind = |s: &&snapfmt::Section| s.kind == SectionKind::WORKING_SET;
    let at = snapshot.sections().iter().find(of_kind).expect("it is there").offset as usize + 20;
    let mut bytes = std::fs::read(&trained).expect("it can be read");
    bytes[at] ^= 1;
    std::fs::write(&trained, bytes).expect("it can be written");
    let report = restore(&trained, &["--lazy", "--beats", "2"]).ok().report();
    let damage = report["working_set_damage"].as_str().expect("it is reported");
    assert!(damage.contains("corrupt working set"), "{damage}");
    assert_eq!(report["pager"]["installed"]["prefetched"], 0);
    for command in ["verify", "info"] {
        snap([command, &text(&trained)]).failed(3, &["corrupt working set"]);
    }
    let out = text(&sample.folder.path().join("out.snap"));
    snap(["optimize", &text(&trained), "-o", &out]).failed(3, &["corrupt working set"]);
}

/// A layer can be trained and optimized as well, and stays one.
#[test]
fn layers_are_trained_and_optimized() {
    needs_vm!();
    let sample = Sample::small();
    let path = |name: &str| text(&sample.folder.path().join(name));
    let (base, layer) = (text(&sample.file), path("layer.snap"));
    snap(["create", &layer, "--from", &base, "--when", "output:beat 2 ok\n"]).ok();
    snap(["train", &layer, "--beats", "1", "--runs", "1", "-o", &path("trained.snap")]).ok();
    snap(["optimize", &path("trained.snap"), "-o", &path("fast.snap")]).ok();
    let before = snap(["info", &layer, "--json"]).ok().json();
    for name in ["trained.snap", "fast.snap"] {
        snap(["verify", &path(name)]).ok();
        let info = snap(["info", &path(name), "--json"]).ok().json();
        assert_eq!(info["parent_id"], before["parent_id"]);
        assert_eq!(info["pages"], before["pages"]);
        assert_eq!(snap(["diff", &layer, &path(name), "--json"]).ok().json()["differing_pages"], 0);
        let ran = restore(Path::new(&path(name)), &["--lazy", "--beats", "2"]).ok();
        assert!(ran.stdout.ends_with("beat 4 ok\n"), "{}", ran.stdout);
    }
}
