//! `snap rekey`: a copy of a sealed file that other keys open.

use crate::sealing::Files;
use crate::support::{names, needs_vm};

const WRONG: &[&str] = &["the key does not open the snapshot"];

#[test]
fn only_the_new_keys_open_the_copy() {
    let files = Files::with_golden();
    let before = std::fs::read(files.path("sealed.snap")).expect("it is there");
    let made = files.snap("rekey @sealed.snap -o @new.snap --key-file @key --new-key-file @other");
    assert!(made.ok().stdout.contains("opened by 1 key;"));
    files.snap("verify @new.snap --key-file @other").ok();
    files.snap("verify @new.snap").ok();
    files.snap("verify @new.snap --key-file @key").failed(3, WRONG);
    files.snap("verify @sealed.snap --key-file @key").ok();
    assert!(std::fs::read(files.path("sealed.snap")).expect("it is there") == before);
    // The guest is the same: both are exported to the same bytes.
    let export = "export --format raw --decrypt";
    files.snap(&format!("{export} @sealed.snap -o @a --key-file @key")).ok();
    files.snap(&format!("{export} @new.snap -o @b --key-file @other")).ok();
    let raw = |name| std::fs::read(files.path(name)).expect("it is there");
    assert!(raw("a") == raw("b"));
    let metadata = files.snap("info @new.snap --json --key-file @other").ok().json();
    let id = files.snap("info @sealed.snap --json").ok().json()["id"].clone();
    assert_eq!(metadata["metadata"]["rewritten_from"][0], id);
    files
        .snap("rekey @sealed.snap -o @new.snap --key-file @key --new-key-file @other")
        .failed(1, &["give --force"]);
    files.snap("rekey @sealed.snap -o @new.snap --key-file @key --keep all --force --json").ok();
    files.snap("verify @new.snap --key-file @key").ok();
}

#[test]
fn keys_are_added_and_removed_by_number() {
    let files = Files::with_golden();
    let add = "rekey @sealed.snap -o @two.snap --key-file @key --keep all --new-key-file @other";
    let added = files.snap(&format!("{add} --json")).ok().json();
    assert_eq!(added["keys"], 2);
    let shown = files.snap("info @two.snap").ok().stdout;
    assert!(shown.contains("1: a key (--key-file), 2: a key (--key-file)"), "{shown}");
    for key in ["key", "other"] {
        files.snap(&format!("verify @two.snap --key-file @{key}")).ok();
    }
    files.snap("rekey @two.snap -o @one.snap --key-file @key --keep 2").ok();
    files.snap("verify @one.snap --key-file @other").ok();
    files.snap("verify @one.snap --key-file @key").failed(3, WRONG);
    files
        .snap("rekey @two.snap -o @none.snap --key-file @key --keep 3")
        .failed(1, &["has no wrapped key 3; it has 2"]);
    assert!(!files.path("none.snap").exists());
}

#[test]
fn what_has_no_sense_is_refused() {
    let files = Files::with_golden();
    let rekey = |rest: &str| files.snap(&format!("rekey @sealed.snap -o @no.snap {rest}"));
    rekey("--key-file @key").failed(2, &["no key would open"]);
    rekey("--key-file @key --keep 0").failed(2, &["numbers from 1"]);
    rekey("--new-key-file @other").failed(3, &["its key is needed"]);
    rekey("--key-file @other --new-key-file @key").failed(3, WRONG);
    rekey("--key-file @key --new-key-file @other --onto @plain.snap").failed(2, &["for a layer"]);
    rekey("--key-command cat --wrap-command cat --new-key-file @other")
        .failed(2, &["begin with --new-"]);
    files
        .snap("rekey @plain.snap -o @no.snap --new-key-file @other")
        .failed(1, &["is not sealed", "--from-plain"]);
    files
        .snap("rekey @sealed.snap -o @sealed.snap --force --key-file @key --new-key-file @other")
        .failed(1, &["sealed.snap"]);
    files.snap("verify @sealed.snap --key-file @key").ok();
    assert_eq!(names(files.0.path()), ["key", "other", "plain.snap", "sealed.snap"]);
}

/// A root is checked for each read, so that the kernel does not copy bytes past the check.
#[test]
fn a_root_is_checked_while_the_chunks_are_copied() {
    let files = Files::with_golden();
    files.snap("hash @sealed.snap --key-file @key").ok();
    let list = std::fs::read_to_string(files.path("sealed.snap.b3sum")).expect("it is there");
    let root = list.split_whitespace().next().expect("a root");
    let rekey = |out: &str, more: &str| {
        let line = format!("rekey @sealed.snap -o @{out} --key-file @key --new-key-file @other");
        files.snap(&format!("{line} {more}"))
    };
    rekey("checked.snap", &format!("--expect-root {root}")).ok();
    let mut bytes = std::fs::read(files.path("sealed.snap")).expect("it is there");
    // Not in the group of 16 KiB of the header, which is read and checked anyway.
    bytes[200_000] ^= 1;
    std::fs::write(files.path("sealed.snap"), bytes).expect("it is written");
    rekey("no.snap", &format!("--expect-root {root}")).failed(3, &["sealed.snap"]);
    assert!(!files.path("no.snap").exists());
    // Without a root, the damage is copied, and stays detectable.
    rekey("damaged.snap", "").ok();
    files.snap("verify @damaged.snap --key-file @other").failed(3, &["corrupt chunks"]);
}

#[test]
fn a_layer_follows_its_parent() {
    let files = Files::with_golden();
    files.snap("flatten @sealed.snap -o @copy.snap --key-file @key").ok();
    files.snap("rebase @copy.snap --onto @sealed.snap -o @layer.snap --key-file @key").ok();
    let new = "--key-file @key --new-key-file @other";
    files
        .snap(&format!("rekey @layer.snap -o @l2.snap {new}"))
        .failed(2, &["rekey the parent first"]);
    files.snap(&format!("rekey @sealed.snap -o @s2.snap {new}")).ok();
    files
        .snap(&format!("rekey @layer.snap -o @l2.snap --onto @copy.snap {new}"))
        .failed(1, &["copy.snap", "is not a copy of the layer's parent"]);
    files
        .snap(&format!("rekey @layer.snap -o @l2.snap --onto @sealed.snap {new}"))
        .failed(2, &["present parent"]);
    files
        .snap(&format!("rekey @layer.snap -o @s2.snap --force --onto @s2.snap {new}"))
        .failed(1, &["s2.snap"]);
    files.snap("verify @s2.snap --key-file @other").ok();
    files.snap(&format!("rekey @layer.snap -o @l2.snap --onto @s2.snap {new}")).ok();
    files.snap("verify @l2.snap --key-file @other").ok();
    files.snap("verify @l2.snap --key-file @key").failed(3, WRONG);
    // With all of its keys, a layer may keep its parent; in another folder, too.
    std::fs::create_dir(files.path("sub")).expect("it is created");
    files
        .snap("rekey @layer.snap -o @sub/l3.snap --keep all --key-file @key --new-key-file @other")
        .failed(2, &["rekey the parent first"]);
    files.snap("rekey @layer.snap -o @sub/l3.snap --keep all --key-file @key").ok();
    files.snap("verify @sub/l3.snap --key-file @key").ok();
}

#[test]
fn a_guest_is_restored_from_the_copy() {
    needs_vm!();
    let files = Files::new();
    files.snap("create @a.snap --memory 64M --work 4M --key-file @key").ok();
    files.snap("rekey @a.snap -o @b.snap --key-file @key --new-key-file @other").ok();
    for options in ["", "--lazy"] {
        files.snap(&format!("restore @b.snap --key-file @other --beats 2 {options}")).ok();
    }
    files.snap("create @c.snap --from @b.snap --when output:beat --key-file @other").ok();
    files.snap("restore --lazy @c.snap --beats 2 --key-file @other").ok();
}
