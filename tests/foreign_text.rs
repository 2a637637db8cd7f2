//! Names and descriptions in a hostile snapshot never drive the terminal of the person who looks at it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{
    Contents, MemoryRegion, Metadata, Parent, Snapshot, WriteOptions, write_layer, write_snapshot,
};

use crate::support::{Ran, snap};

/// Clears the screen, in 7-bit and 8-bit form, sets a title, and adds a line that looks like one of `snap`.
const TEXT: &str = "a\x1b[2J\u{9b}2J\x1b]0;title\x07\u{202e}\nsnap: all is well";

fn memory() -> (Vec<u8>, [MemoryRegion; 1]) {
    let memory = vec![7; 8 * PAGE_BYTES];
    let regions = [MemoryRegion { gpa: 0, len: memory.len() as u64, source_offset: 0 }];
    (memory, regions)
}

/// A snapshot whose description is [`TEXT`] in all places, and a layer of it whose parent has that name.
fn hostile(folder: &Path) -> (PathBuf, PathBuf) {
    let (file, layer) = (folder.join("hostile.snap"), folder.join("layer.snap"));
    let (memory, regions) = memory();
    let data = [0..memory.len() as u64];
    let go_on = |_| std::ops::ControlFlow::Continue(());
    let value = serde_json::json!({ TEXT: TEXT, "list": [TEXT, { "deep": TEXT }] });
    let other = serde_json::Map::from_iter([(TEXT.into(), value)]);
    let metadata = Metadata::default().tool(TEXT).tool_version(TEXT).other(other);
    let contents = || Contents::new(&regions, &memory, &data).metadata(metadata.clone());
    let options = WriteOptions::default();
    write_snapshot(&file, contents(), &options, &go_on).expect("it is written");
    let snapshot = Snapshot::open(&file).expect("it opens");
    let parent = Parent::new(&snapshot, TEXT);
    write_layer(&layer, contents(), &parent, &options, &go_on).expect("it is written");
    (file, layer)
}

/// No output has a control character, except newlines; and the text is there, escaped.
#[track_caller]
fn is_plain(ran: &Ran, shown: &[&str]) {
    let all = format!("{}{}", ran.stdout, ran.stderr);
    let harmful = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!all.contains(harmful), "{all:?}");
    assert!(!all.lines().any(|line| line.starts_with("snap: all is well")), "{all}");
    for text in shown {
        assert!(all.contains(text), "no {text} in {all}");
    }
}

#[test]
fn a_description_is_shown_without_its_control_characters() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (file, _) = hostile(folder.path());
    is_plain(
        &snap([OsStr::new("info"), file.as_ref()]).ok(),
        &["a\\u{1b}[2J\\u{9b}2J", "\\u{202e}"],
    );
    let json = snap([OsStr::new("info"), OsStr::new("--json"), file.as_ref()]).ok();
    is_plain(&json, &["\\u009b2J"]);
    // A program gets the text as it is.
    assert_eq!(json.json()["metadata"]["tool"], TEXT);
}

#[test]
fn the_name_of_a_parent_is_shown_without_its_control_characters() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (file, layer) = hostile(folder.path());
    std::fs::remove_file(file).expect("the parent is removed");
    let layer = layer.to_string_lossy();
    let out = folder.path().join("out.snap");
    let out = out.to_string_lossy();
    for command in [
        &["info", &layer][..],
        &["verify", &layer],
        &["restore", &layer],
        &["serve", &layer, "--listen", &out],
        &["cat", "--gpa", "0", &layer],
        &["pages", &layer],
        &["diff", &layer, &layer],
        &["flatten", &layer, "-o", &out],
        &["export", "--format", "raw", &layer, "-o", &out],
    ] {
        let ran = snap(command.iter().copied());
        assert!(ran.code.is_some_and(|code| code > 0), "{command:?}");
        is_plain(&ran, &["a\\u{1b}[2J"]);
    }
}
