//! Roots and signatures: a file whose bytes are forged, with right checksums, is refused before they are used.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use snapfmt::{PageEntry, PageIndex, Snapshot};
use tempfile::TempDir;

use crate::control::Vm;
use crate::seal;
use crate::support::{Sample, needs_vm, snap};

const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/");

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}

/// A folder with a golden snapshot as `guest.snap`, its list of roots, and the signature that minisign 0.11 has made of it.
struct Signed {
    folder: TempDir,
}

impl Signed {
    fn new() -> Self {
        let signed = Self { folder: tempfile::tempdir().expect("a folder") };
        let copy = |from: &str, to: &str| {
            std::fs::copy(Path::new(FILES).join(from), signed.path(to)).expect("it is copied");
        };
        copy("v1-bound-zstd.snap", "guest.snap");
        for name in ["guest.snap.b3sum.minisig", "key.pub", "other.pub"] {
            copy(&format!("signed/{name}"), name);
        }
        snap(["hash", &signed.text("guest.snap")]).ok();
        signed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        text(&self.path(name)).to_owned()
    }

    fn verify(&self, key: &str) -> crate::support::Ran {
        snap(["verify", &self.text("guest.snap"), "--require-signature", &self.text(key)])
    }
}

/// The roots that `snap hash` prints.
#[track_caller]
fn hash(file: &Path) -> Vec<String> {
    let printed = snap(["hash", text(file), "--force"]).ok().stdout;
    printed.lines().map(|line| line.split_once("  ").expect("hash, name").0.to_owned()).collect()
}

/// Changes a byte of the last page in `file` that is not zero, and corrects the checksums. Its codec must be raw.
fn forge_page(file: &Path) {
    let snapshot = Snapshot::open(file).expect("it is good");
    let pages = snapshot.header().pages() as u32;
    let data = |page| match snapshot.entry(PageIndex(page)).expect("it is good") {
        PageEntry::Data { chunk, .. } if chunk.layer() == 0 => Some(chunk),
        _ => None,
    };
    let chunk = (0..pages).rev().find_map(data).expect("it has data");
    let last = chunk.end() as usize - 1;
    drop(snapshot);
    forge(file, last - 63, seal::CHUNKS | seal::HEADER);
}

fn forge(file: &Path, at: usize, which: u8) {
    let mut bytes = std::fs::read(file).expect("it can be read");
    bytes[at] ^= 1;
    seal::seal(&mut bytes, which);
    std::fs::write(file, bytes).expect("it can be written");
}

#[test]
fn the_root_is_that_of_b3sum_and_is_checked_by_every_command() {
    let signed = Signed::new();
    let file = signed.path("guest.snap");
    let roots = hash(&file);
    // By b3sum 1.2.
    assert_eq!(roots, ["282e861a5959f2600bb394f823c88fc1727362a32f48cdf67445b7ad56ca711a"]);
    let list = std::fs::read(signed.path("guest.snap.b3sum")).expect("it was written");
    let golden = std::fs::read(Path::new(FILES).join("signed/guest.snap.b3sum"));
    assert_eq!(list, golden.expect("it is there"));
    let wrong = roots[0].replace('2', "3");
    let out = signed.text("out");
    for command in [
        &["verify"][..],
        &["info"],
        &["pages"],
        &["cat", "--gpa", "0", "--len", "16"],
        &["flatten", "-o", &out],
    ] {
        let run = |root: &str| {
            let file = [text(&file), "--expect-root", root];
            snap([&command[..1], &file[..], &command[1..]].concat())
        };
        run(&wrong).failed(3, &["guest.snap", &wrong]);
        assert!(!Path::new(&out).exists(), "{command:?}");
        run(&roots[0]).ok();
        let _ = std::fs::remove_file(&out);
    }
}

#[test]
fn a_list_with_the_right_signature_is_taken_and_others_are_refused() {
    let signed = Signed::new();
    signed.verify("key.pub").ok();
    let refused = ["guest.snap.b3sum", "signature is not that of the list"];
    signed.verify("other.pub").failed(3, &refused);
    signed.verify("guest.snap.b3sum").failed(3, &["not a public key of minisign"]);
    signed.verify("missing.pub").failed(1, &["missing.pub"]);

    let list = signed.path("guest.snap.b3sum");
    let good = std::fs::read_to_string(&list).expect("it is there");
    for (changed, message) in [
        (good.replace("guest", "other"), refused[1]),
        (good.replace('\n', ""), refused[1]),
        (good.replacen('2', "3", 1), refused[1]),
        (String::new(), refused[1]),
    ] {
        std::fs::write(&list, changed).expect("it is written");
        signed.verify("key.pub").failed(3, &[message]);
    }
    std::fs::remove_file(&list).expect("it is there");
    signed.verify("key.pub").failed(1, &["guest.snap.b3sum", "snap hash writes it"]);
    Command::new("mkfifo").arg(&list).status().expect("mkfifo runs");
    signed.verify("key.pub").failed(1, &["guest.snap.b3sum", "not a regular file"]);
    std::fs::remove_file(&list).expect("it is there");
    std::fs::write(&list, &good).expect("it is written");
    signed.verify("key.pub").ok();

    let signature = signed.path("guest.snap.b3sum.minisig");
    let of_it = std::fs::read_to_string(&signature).expect("it is there");
    // The trusted comment is signed too.
    std::fs::write(&signature, of_it.replace("trusted comment: guest", "trusted comment: other"))
        .expect("it is written");
    signed.verify("key.pub").failed(3, &["signature"]);
    std::fs::write(&signature, "x").expect("it is written");
    signed.verify("key.pub").failed(3, &["not a signature of minisign"]);
    std::fs::remove_file(&signature).expect("it is there");
    signed.verify("key.pub").failed(1, &["guest.snap.b3sum.minisig"]);
}

#[test]
fn hash_replaces_nothing_without_force() {
    let signed = Signed::new();
    let file = signed.text("guest.snap");
    snap(["hash", &file]).failed(1, &["guest.snap.b3sum exists", "--force"]);
    let printed = snap(["hash", &file, "--force", "--json"]).ok().json();
    assert_eq!(printed["layers"][0]["tree"], Value::from(signed.text("guest.snap.b3t")));
    signed.verify("key.pub").ok();

    // An interrupted one leaves a tree without a list, and the next one replaces it.
    std::fs::remove_file(signed.path("guest.snap.b3sum")).expect("it is there");
    snap(["hash", &file]).ok();
    signed.verify("key.pub").ok();

    let tree = signed.path("guest.snap.b3t");
    std::fs::remove_file(&tree).expect("it is there");
    Command::new("mkfifo").arg(&tree).status().expect("mkfifo runs");
    signed.verify("key.pub").failed(1, &["guest.snap.b3t", "not a regular file"]);
    std::fs::remove_file(&tree).expect("it is there");
    signed.verify("key.pub").failed(1, &["guest.snap.b3t", "run snap hash"]);
    snap(["hash", "s3://bucket/guest"]).failed(1, &["snap pull"]);
    snap(["verify", "s3://bucket/guest", "--require-signature", "k"]).failed(1, &["snap pull"]);
    snap(["verify", &file, "--expect-root", "12"]).failed(2, &["64 hexadecimal digits"]);
}

/// A tree that would replace a file of the snapshot is not written.
#[test]
fn hash_replaces_no_file_of_the_snapshot() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "24M", "--work", "8M"]);
    let base = sample.folder.path().join("layer.snap.b3t");
    std::fs::rename(&sample.file, &base).expect("it is renamed");
    let layer = sample.folder.path().join("layer.snap");
    let args = ["create", text(&layer), "--from", text(&base), "--when", "output:beat 2 ok\n"];
    snap(args).ok();
    let before = std::fs::read(&base).expect("it is there");
    snap(["hash", text(&layer), "--force"]).failed(1, &["layer.snap.b3t"]);
    assert!(std::fs::read(&base).expect("it is there") == before);
}

#[test]
fn paths_that_are_not_unicode_are_printed_in_json() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().expect("a folder");
    let [file, copy] = [&b"a\xff.snap"[..], b"copy\xff.snap"]
        .map(|name| folder.path().join(std::ffi::OsStr::from_bytes(name)));
    std::fs::copy(Path::new(FILES).join("v1-bound-zstd.snap"), &file).expect("it is copied");
    let run = |args: &[&std::ffi::OsStr]| snap(args).ok().json();
    let [json, out] = ["--json", "-o"].map(std::ffi::OsStr::new);
    for command in ["verify", "hash", "info"] {
        run(&[command.as_ref(), file.as_os_str(), json]);
    }
    let shown = run(&["flatten".as_ref(), file.as_os_str(), out, copy.as_os_str(), json]);
    assert!(shown["file"].as_str().expect("a name").ends_with("copy\u{fffd}.snap"), "{shown}");
}

#[test]
fn any_forged_part_is_refused_though_its_checksums_are_right() {
    let signed = Signed::new();
    let file = signed.path("guest.snap");
    let good = std::fs::read(&file).expect("it is there");
    let all = seal::CHUNKS | seal::LEAVES | seal::SECTIONS | seal::TABLE | seal::HEADER;
    // A time in the header, reserved bytes of it, and the first byte of each part.
    let mut places = vec![144, 150, 4000];
    places.extend(seal::parts(&good).into_iter().filter(|&at| at > 0));
    for at in places {
        forge(&file, at, all);
        signed.verify("key.pub").failed(3, &["guest.snap"]);
        std::fs::write(&file, &good).expect("it is written");
    }
    for len in [0, 1, good.len() / 2, good.len() - 1] {
        std::fs::write(&file, &good[..len]).expect("it is written");
        signed.verify("key.pub").failed(3, &["guest.snap"]);
    }
    std::fs::write(&file, &good).expect("it is written");
    signed.verify("key.pub").ok();
}

#[test]
fn a_forged_page_is_refused_before_the_guest_has_it() {
    needs_vm!();
    let sample = Sample::create(&[
        "--memory",
        "24M",
        "--work",
        "8M",
        "--codec",
        "raw",
        "--chunk-pages",
        "1",
    ]);
    let root = hash(&sample.file).remove(0);
    let restore = |options: &[&str]| {
        snap(
            [&["restore", text(&sample.file), "--beats", "3", "--expect-root", &root], options]
                .concat(),
        )
    };
    for options in [&["--lazy"][..], &["--lazy", "--prefetch", "all"], &[]] {
        restore(options).ok();
    }
    forge_page(&sample.file);
    // The checksums of the file do not show it.
    snap(["verify", text(&sample.file)]).ok();
    let messages = ["guest.snap", "are not those that the root", &root];
    snap(["verify", text(&sample.file), "--expect-root", &root]).failed(3, &messages);
    for (options, code) in [(&["--lazy", "--prefetch", "all"][..], 5), (&[], 3)] {
        restore(options).failed(code, &messages);
    }
    let socket = sample.folder.path().join("pages.sock");
    for options in [&["--lazy", "--share", text(&socket)][..], &["--image", text(&sample.file)]] {
        restore(options).failed(1, &["the memory comes from elsewhere"]);
    }
}

/// The file is overwritten in place with another valid snapshot with right checksums while the guest runs.
#[test]
fn bytes_that_change_under_a_running_guest_are_refused() {
    needs_vm!();
    let sample = Sample::create(&[
        "--memory",
        "24M",
        "--work",
        "16M",
        "--codec",
        "raw",
        "--chunk-pages",
        "1",
    ]);
    let root = hash(&sample.file).remove(0);
    let file = text(&sample.file);
    let args = [
        "restore",
        file,
        "--lazy",
        "--populate",
        "off",
        "--beats",
        "4",
        "--hash",
        "--expect-root",
        &root,
    ];
    let mut vm = Vm::start_paused(sample.folder.path(), &args);
    let began = Instant::now();
    while vm.ask("GET", "/stats", &Value::Null).1["pager"]["faults"].as_u64() < Some(100) {
        assert!(began.elapsed() < Duration::from_secs(60), "no faults");
        std::thread::sleep(Duration::from_millis(1));
    }
    vm.set("Paused");
    forge_page(&sample.file);
    vm.resume_if_alive();
    let ran = vm.end();
    assert!(!ran.stdout.contains("BAD"), "{}", ran.stdout);
    ran.failed(5, &["guest stopped", "guest.snap"]);
}

#[test]
fn each_file_of_a_chain_needs_its_own_root() {
    needs_vm!();
    let sample = Sample::create(&[
        "--memory",
        "24M",
        "--work",
        "8M",
        "--codec",
        "raw",
        "--chunk-pages",
        "1",
    ]);
    let layer = sample.folder.path().join("layer.snap");
    let base = text(&sample.file);
    snap([
        "create",
        text(&layer),
        "--from",
        base,
        "--when",
        "output:beat 2 ok\n",
        "--codec",
        "raw",
    ])
    .ok();
    let roots = hash(&layer);
    assert_eq!(roots.len(), 2);
    assert_eq!(roots[1..], hash(&sample.file));
    let list = std::fs::read_to_string(sample.folder.path().join("layer.snap.b3sum"));
    let names: Vec<_> =
        list.expect("it is there").lines().map(|line| line[66..].to_owned()).collect();
    assert_eq!(names, ["layer.snap", "guest.snap"]);

    let verify = |roots: &[&str]| {
        let mut args = vec!["verify", text(&layer)];
        roots.iter().for_each(|root| args.extend(["--expect-root", root]));
        snap(args)
    };
    let (of_layer, of_base) = (&*roots[0], &*roots[1]);
    verify(&[of_layer, of_base]).ok();
    verify(&[of_layer]).failed(1, &["2 file(s)", "1 root(s)"]);
    verify(&[of_layer, of_base, of_base]).failed(1, &["3 root(s)"]);
    verify(&[of_base, of_layer]).failed(3, &["layer.snap"]);
    verify(&[of_layer, of_layer]).failed(3, &["guest.snap"]);
    let two = ["--expect-root", of_layer, "--expect-root", of_base];
    snap([&["diff", text(&layer), base], &two[..]].concat()).failed(1, &["--require-signature"]);

    // The guest of a new layer, and a layer that is written again.
    let third = sample.folder.path().join("third.snap");
    let create = |roots: &[&str]| {
        let args = ["create", text(&third), "--from", text(&layer), "--when", "output:beat 4 ok\n"];
        snap([&args[..], roots].concat())
    };
    create(&["--expect-root", of_base, "--expect-root", of_layer]).failed(3, &["layer.snap"]);
    create(&two).ok();
    let optimized = sample.folder.path().join("optimized.snap");
    let trained = sample.folder.path().join("trained.snap");
    snap(["train", text(&layer), "-o", text(&trained), "--beats", "1"]).ok();
    let own = hash(&trained);
    let optimize = [
        "optimize",
        text(&trained),
        "-o",
        text(&optimized),
        "--expect-root",
        &own[0],
        "--expect-root",
        &own[1],
    ];
    snap(optimize).ok();

    forge_page(&sample.file);
    snap(["verify", text(&layer)]).ok();
    verify(&[of_layer, of_base]).failed(3, &["guest.snap", of_base]);
}
