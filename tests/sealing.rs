//! Sealed snapshots on the command line: only the key opens them, and what is written of a sealed guest is sealed.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use snapfmt::{Outline, SectionKind};
use tempfile::TempDir;

use crate::control::Vm;
use crate::support::{Ran, needs_vm, snap};

pub(crate) struct Files(pub(crate) TempDir);

impl Files {
    /// With two keys: `key` in bytes, `other` in hex.
    pub(crate) fn new() -> Self {
        let files = Self(tempfile::tempdir().expect("a folder"));
        files.put("key", &[0xa7; 32]);
        files.put("other", format!("{}\n", "5c".repeat(32)).as_bytes());
        files
    }

    pub(crate) fn put(&self, name: &str, content: &[u8]) {
        let path = self.path(name);
        std::fs::write(&path, content).expect("it is written");
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path, private).expect("it is ours");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a plain name").to_owned()
    }

    /// Runs `snap`: an argument `@NAME` is a file of the folder.
    pub(crate) fn snap(&self, line: &str) -> Ran {
        snap(line.split_whitespace().map(|word| match word.strip_prefix('@') {
            Some(name) => self.text(name),
            None => word.to_owned(),
        }))
    }

    /// Also with a golden file, `plain.snap`, and a copy that is sealed with `key`, `sealed.snap`.
    pub(crate) fn with_golden() -> Self {
        let files = Self::new();
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/v1-bound-zstd.snap");
        std::fs::copy(golden, files.path("plain.snap")).expect("it is copied");
        files.snap("flatten @plain.snap -o @sealed.snap --key-file @key --from-plain").ok();
        files
    }
}

fn is_sealed(path: &Path) -> bool {
    let file = snapfmt::open_file(path).expect("it is there");
    Outline::open(file).expect("it is a snapshot").header().is_sealed()
}

#[test]
fn a_sealed_file_opens_with_its_key_only() {
    let files = Files::with_golden();
    assert!(is_sealed(&files.path("sealed.snap")));
    files.snap("verify @sealed.snap --key-file @key").ok();
    files.snap("diff @sealed.snap @sealed.snap --key-file @key").ok();
    for command in [
        "cat @sealed.snap --gpa 0",
        "hash @sealed.snap",
        "export @sealed.snap --format raw -o @out",
    ] {
        files.snap(command).failed(3, &["sealed", "its key is needed", "--key-file"]);
    }
    let wrong = &["the key does not open the snapshot"];
    files.snap("verify @sealed.snap --key-file @other").failed(3, wrong);
    files.snap("info @sealed.snap --key-file @other").failed(3, wrong);
    files.snap("verify @plain.snap --key-file @key").failed(3, &["is not sealed", "--from-plain"]);
    files.put("short", &[1; 31]);
    files.snap("verify @sealed.snap --key-file @short").failed(1, &["a key is 32 bytes"]);
    let open = std::fs::Permissions::from_mode(0o640);
    std::fs::set_permissions(files.path("key"), open).expect("it is ours");
    files.snap("verify @sealed.snap --key-file @key").failed(1, &["0640", "chmod 600"]);
}

#[test]
fn without_the_key_its_outline_is_shown_and_its_checksums_are_checked() {
    let files = Files::with_golden();
    let shown = files.snap("info @sealed.snap").ok().stdout;
    assert!(shown.contains("SEALED") && shown.contains("opened by 1: a key"), "{shown}");
    let [plain, sealed, opened] = [
        "info @plain.snap --json",
        "info @sealed.snap --json",
        "info @sealed.snap --json --key-file @key",
    ]
    .map(|line| files.snap(line).ok().json());
    let keys = |value: &serde_json::Value| {
        value.as_object().expect("an object").keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!((keys(&sealed), keys(&opened)), (keys(&plain), keys(&plain)));
    assert!(sealed["metadata"].is_null() && sealed["regions"].is_null());
    assert_eq!(opened["regions"], plain["regions"]);
    assert_eq!(sealed["pages"], plain["pages"]);
    let verified = files.snap("verify @sealed.snap --json").ok().json();
    assert_eq!((&verified["ok"], &verified["sealed"]), (&true.into(), &true.into()));
    let mut bytes = std::fs::read(files.path("sealed.snap")).expect("it is there");
    bytes[5000] ^= 1;
    std::fs::write(files.path("sealed.snap"), bytes).expect("it is written");
    files.snap("verify @sealed.snap").failed(3, &["corrupt chunks"]);
}

#[test]
fn a_plain_copy_is_written_on_request_only() {
    let files = Files::with_golden();
    let refused = &["--decrypt"];
    files.snap("export @sealed.snap --format raw -o @raw --key-file @key").failed(1, refused);
    assert!(!files.path("raw").exists());
    files.snap("export @sealed.snap --format raw -o @raw --key-file @key --decrypt").ok();
    files.snap("export @plain.snap --format raw -o @raw2").ok();
    let raw = |name| std::fs::read(files.path(name)).expect("it is there");
    assert!(raw("raw") == raw("raw2"));
    files.snap("flatten @sealed.snap -o @copy.snap --key-file @key").ok();
    assert!(is_sealed(&files.path("copy.snap")));
    files.snap("flatten @sealed.snap -o @open.snap --key-file @key --decrypt").ok();
    assert!(!is_sealed(&files.path("open.snap")));
    files.snap("flatten @plain.snap -o @no.snap --decrypt").failed(2, &["goes with a key"]);
    files.snap("rebase @open.snap --onto @sealed.snap -o @layer.snap").failed(3, &["sealed"]);
    files.snap("rebase @copy.snap --onto @sealed.snap -o @layer.snap --key-file @key").ok();
    files.snap("verify @layer.snap --key-file @key").ok();
    files.snap("hash @sealed.snap --key-file @key").ok();
    let list = std::fs::read_to_string(files.path("sealed.snap.b3sum")).expect("it is there");
    let root = list.split_whitespace().next().expect("a root");
    files.snap(&format!("verify @sealed.snap --key-file @key --expect-root {root}")).ok();
}

#[test]
fn commands_have_the_keys() {
    let files = Files::with_golden();
    // A wrapped key that is not the key: with a mark in front.
    let wrap = "sed s/^/wrapped:/";
    let sealed =
        ["flatten", &files.text("plain.snap"), "-o", &files.text("c.snap"), "--from-plain"];
    let given = ["--wrap-command", "(printf wrapped; cat)"];
    snap(sealed.iter().chain(&given)).ok();
    let with = |command: &str| snap(["verify", &files.text("c.snap"), "--key-command", command]);
    with("tail -c 32").ok();
    with("cat").failed(1, &["--key-command", "a key is 32 bytes"]);
    with("exit 7").failed(1, &["--key-command", "exit status: 7"]);
    with("head -c 32 /dev/zero").failed(3, &["not sealed with the key of this file"]);
    files.snap("verify @c.snap --key-file @key").failed(3, &["keys of other kinds (2)"]);
    snap(["verify", &files.text("c.snap"), "--wrap-command", wrap])
        .failed(1, &["--key-command is needed"]);
    let flatten = ["flatten", &files.text("c.snap"), "-o", &files.text("d.snap")];
    snap(flatten.iter().chain(&["--key-command", "tail -c 32"]))
        .failed(1, &["--wrap-command is needed"]);
    assert!(!files.path("d.snap").exists());
    let slow = with("sleep 1.5; tail -c 32").ok();
    assert!(slow.stderr.contains("waiting for the command of --key-command"), "{}", slow.stderr);
}

#[test]
fn what_cannot_work_with_a_key_is_refused_before_a_guest_is_used() {
    let files = Files::with_golden();
    let needed = &["--wrap-command is needed"];
    files.snap("create @a.snap --key-command cat").failed(1, needed);
    files.snap("run --api @vm.sock --key-command cat").failed(1, needed);
    files
        .snap("checkpoint --vm @vm.sock --every 1s --keep 1 -o @c --key-command cat")
        .failed(1, needed);
    assert!(!files.path("c").exists() && !files.path("vm.sock").exists());
    files.snap("fork --vm @vm.sock -n 1 --key-file /dev/null").failed(1, &["a regular file"]);
    files
        .snap("restore @sealed.snap --image @plain.snap --key-file @key")
        .failed(1, &["--image is not"]);
}

#[test]
fn a_guest_is_restored_from_a_sealed_file_and_what_it_writes_is_sealed() {
    needs_vm!();
    let files = Files::new();
    files.snap("create @a.snap --memory 64M --work 4M --key-file @key").ok();
    assert!(is_sealed(&files.path("a.snap")));
    for options in ["", "--lazy", "--lazy --prefetch all"] {
        files.snap(&format!("restore @a.snap --key-file @key --beats 2 {options}")).ok();
    }
    files.snap("restore @a.snap --beats 1").failed(3, &["its key is needed"]);
    files.snap("create @b.snap --from @a.snap --when output:beat --key-file @key").ok();
    assert!(is_sealed(&files.path("b.snap")));
    files.snap("restore --lazy @b.snap --beats 2 --key-file @key").ok();
    files.snap("train @b.snap --beats 1 --runs 1 -o @t.snap --key-file @key").ok();
    files.snap("optimize @t.snap -o @o.snap --key-file @key").ok();
    for name in ["t.snap", "o.snap"] {
        assert!(is_sealed(&files.path(name)));
        files.snap(&format!("restore --lazy @{name} --beats 1 --key-file @key")).ok();
    }
}

/// A forged page: its checksums are right, and its tag is not.
#[test]
fn a_running_guest_stops_at_a_forged_page() {
    needs_vm!();
    let files = Files::new();
    files
        .snap("create @a.snap --memory 64M --work 4M --codec raw --no-dedupe --key-file @key")
        .ok();
    let path = files.path("a.snap");
    let mut bytes = std::fs::read(&path).expect("it is there");
    let outline = Outline::open(&bytes[..]).expect("it is a snapshot");
    let kind = SectionKind::CHUNKS;
    let chunks = outline.sections().iter().find(|section| section.kind == kind).expect("one");
    let (mut at, end) = (chunks.offset as usize, chunks.end() as usize);
    let seed = crc32fast::hash(&bytes[152..168]);
    let number = |bytes: &[u8], at: usize, len: usize| {
        bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
    };
    while at < end {
        let (pages, payload) = (number(&bytes, at + 6, 2), number(&bytes, at + 8, 4));
        let next = at + (32 + 4 * pages + payload + 16).next_multiple_of(64);
        bytes[at + 32 + 4 * pages] ^= 1;
        let mut hasher = crc32fast::Hasher::new_with_initial(seed);
        hasher.update(&bytes[at + 32..next]);
        bytes[at + 12..at + 16].copy_from_slice(&hasher.finalize().to_le_bytes());
        let crc = crc32fast::hash(&bytes[at..at + 28]);
        bytes[at + 28..at + 32].copy_from_slice(&crc.to_le_bytes());
        at = next;
    }
    std::fs::write(&path, bytes).expect("it is written");
    files.snap("verify @a.snap").ok();
    let stopped = files.snap("restore --lazy @a.snap --beats 2 --key-file @key");
    stopped.failed(5, &["not sealed with the key of this file"]);
    files.snap("restore @a.snap --beats 2 --key-file @key").failed(3, &["not sealed with the key"]);
}

/// Whoever asks for it, and whether a key is given or not.
#[test]
fn what_is_written_of_a_running_sealed_guest_is_sealed() {
    needs_vm!();
    let files = Files::new();
    files.snap("create @a.snap --memory 64M --work 4M --key-file @key").ok();
    let (file, key) = (files.text("a.snap"), files.text("key"));
    for guest in [
        &["restore", &file, "--lazy", "--key-file", &key][..],
        &["restore", &file, "--key-file", &key],
        &["run", "--memory", "64M", "--work", "4M", "--key-file", &key],
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut vm = Vm::start(folder.path(), guest);
        let socket = vm.socket.to_str().expect("a plain name").to_owned();
        let at = |name: &str| folder.path().join(name);
        let is_restored = guest[0] == "restore";
        for (name, options) in
            [("full", ""), ("live", "--live"), ("diff", "--diff"), ("both", "--diff --live")]
        {
            if options.contains("--diff") && !is_restored {
                continue;
            }
            let out = at(name);
            files.snap(&format!("create {} --vm {socket} {options}", out.display())).ok();
            assert!(is_sealed(&out), "{guest:?} {name}");
            files.snap(&format!("verify {} --key-file @key", out.display())).ok();
        }
        files
            .snap(&format!("create {} --vm {socket} --key-file @key", at("no").display()))
            .failed(1, &["give the key to its snap run or snap restore"]);
        let checkpoints = at("checkpoints");
        let made = format!("checkpoint --vm {socket} --every 50ms --keep 3 --count 6 --merge-at 3");
        files.snap(&format!("{made} -o {} --key-file @key", checkpoints.display())).ok();
        for name in crate::support::names(&checkpoints) {
            assert!(is_sealed(&checkpoints.join(&name)), "{name}");
        }
        files.snap(&format!("restore {} --beats 1 --key-file @key", checkpoints.display())).ok();
        let log = at("{}.log");
        let forked = format!("fork --vm {socket} -n 2 --log {}", log.display());
        files.snap(&format!("{forked} -- --beats 2")).failed(3, &["its key is needed"]);
        files.snap(&format!("{forked} --key-file @key -- --beats 2")).ok();
        vm.beats(1);
        vm.interrupt();
    }
}

#[test]
fn a_key_is_refused_for_a_guest_whose_files_are_plain() {
    needs_vm!();
    let files = Files::new();
    let mut vm = Vm::start(files.0.path(), &["run", "--memory", "64M", "--work", "4M"]);
    let socket = vm.socket.to_str().expect("a plain name").to_owned();
    let plain = &["writes files that are not sealed"];
    files
        .snap(&format!("checkpoint --vm {socket} --every 1s --keep 1 -o @c --key-file @key"))
        .failed(1, plain);
    assert_eq!(crate::support::names(&files.path("c")), Vec::<String>::new());
    vm.beats(1);
    vm.interrupt();
}

#[test]
#[cfg(feature = "objects")]
fn sealed_files_are_pushed_and_pulled_as_they_are() {
    let files = Files::with_golden();
    files.snap("flatten @sealed.snap -o @copy.snap --key-file @key").ok();
    files.snap("rebase @copy.snap --onto @sealed.snap -o @layer.snap --key-file @key").ok();
    let url = format!("file://{}/guest", files.text("bucket"));
    let cached = |line: &str| {
        let mut command = std::process::Command::new(crate::support::SNAP);
        let words = line.split_whitespace().map(|word| match word.strip_prefix('@') {
            Some(name) => files.text(name),
            None => word.replace("URL", &url),
        });
        command.args(words).env("SNAP_CACHE", files.path("cache"));
        crate::support::run(command)
    };
    std::fs::create_dir(files.path("bucket")).expect("it is created");
    cached("push @layer.snap URL").failed(3, &["its key is needed"]);
    cached("push @layer.snap URL --key-file @key").ok();
    cached("verify URL --key-file @key").ok();
    cached("verify URL").failed(3, &["its key is needed"]);
    cached("verify URL --key-file @other").failed(3, &["the key does not open"]);
    cached("pull URL @pulled/layer.snap").failed(3, &["its key is needed"]);
    std::fs::create_dir(files.path("pulled")).expect("it is created");
    cached("pull URL @pulled/layer.snap --key-file @key").ok();
    for name in ["layer.snap", "sealed.snap"] {
        let bytes = |path: PathBuf| std::fs::read(path).expect("it is there");
        assert!(bytes(files.path(name)) == bytes(files.path("pulled").join(name)), "{name}");
    }
    needs_vm!();
    for (options, is_sealed) in [("--key-file @key", true), ("", false)] {
        let options = options.replace("@key", &files.text("key"));
        let guest = format!("run --memory 64M --work 4M {options}");
        let folder = tempfile::tempdir().expect("a folder");
        let mut vm = Vm::start(folder.path(), &guest.split_whitespace().collect::<Vec<_>>());
        let create = format!("create URL{is_sealed} --vm {} --key-file @key", vm.socket.display());
        match is_sealed {
            true => drop(cached(&create).ok()),
            false => drop(cached(&create).failed(1, &["writes files that are not sealed"])),
        }
        vm.beats(1);
        vm.interrupt();
    }
    cached("verify URLtrue --key-file @key").ok();
}
