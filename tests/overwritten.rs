//! Snapshots that are overwritten with another one of the same guest (`cp`, `rsync --inplace`) while a guest runs from
//! them. The guest stops with a message at its next page, and sees no page of the other one.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use snapfmt::layout::INCOMPAT_BOUND;
use snapfmt::{PageEntry, Snapshot};

use crate::control::Vm;
use crate::seal;
use crate::support::{SNAP, Sample, needs_vm, run, snap};

/// A hang guard.
const LONG: Duration = Duration::from_secs(60);

/// The messages of a stopped guest, for any file.
const MESSAGES: [&str; 3] =
    ["guest stopped", "was written to after it was opened", "renaming a new file"];

/// Two snapshots of one guest, before its first beat and after its third, in files with the same layout.
struct Two {
    sample: Sample,
    later: PathBuf,
}

impl Two {
    /// Writes them in `codec`; `bound`: with the feature BOUND.
    #[track_caller]
    fn new(codec: &str, bound: bool) -> Two {
        // Small chunks and much work: a beat takes thousands of faults.
        let storage = ["--codec", codec, "--chunk-pages", "1", "--no-dedupe"];
        let sample =
            Sample::create(&[&["--memory", "24M", "--work", "16M"], &storage[..]].concat());
        let [layer, later] = ["l.snap", "later.snap"].map(|name| sample.folder.path().join(name));
        let mut args = vec!["create", text(&layer), "--from", text(&sample.file)];
        args.extend(["--when", "output:beat 3 ok\n"]);
        snap(args).ok();
        snap([&["flatten", text(&layer), "-o", text(&later)], &storage[..]].concat()).ok();
        std::fs::remove_file(layer).expect("it was made above");
        if !bound {
            unbind(&sample.file);
            unbind(&later);
        }
        Two { sample, later }
    }

    fn file(&self) -> &Path {
        &self.sample.file
    }

    fn folder(&self) -> &Path {
        self.sample.folder.path()
    }

    /// Writes the later snapshot over the earlier one; the file is at no time shorter.
    fn write_over(&self) {
        let bytes = std::fs::read(&self.later).expect("it can be read");
        let file = OpenOptions::new().write(true).open(self.file()).expect("it can be written");
        file.write_all_at(&bytes, 0).expect("it is written");
        file.set_len(bytes.len() as u64).expect("it has its length");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}

/// Makes a file without BOUND, as older versions wrote it.
fn unbind(path: &Path) {
    let mut bytes = std::fs::read(path).expect("it can be read");
    bytes[16] &= !(INCOMPAT_BOUND as u8);
    bytes[152..168].fill(0);
    seal::seal(&mut bytes, seal::CHUNKS | seal::HEADER);
    std::fs::write(path, bytes).expect("it can be written");
    snap(["verify", text(path)]).ok();
}

/// A paused guest that has loaded some of its pages by faults. After some beats it ends and all of its memory is
/// hashed, so every page is loaded.
#[track_caller]
fn half_way(folder: &Path, file: &Path) -> Vm {
    let args = ["restore", text(file), "--lazy", "--prefetch", "off", "--beats", "4", "--hash"];
    let vm = Vm::start_paused(folder, &args);
    let began = Instant::now();
    let faults = || vm.ask("GET", "/stats", &Value::Null).1["pager"]["faults"].as_u64();
    while faults() < Some(100) {
        assert!(began.elapsed() < LONG, "{:?} faults", faults());
        thread::sleep(Duration::from_millis(1));
    }
    vm.set("Paused");
    vm
}

/// The guest is stopped, the message has the reason and the file, and every printed beat is ok.
#[track_caller]
fn stops(mut vm: Vm, what: &str, file: &str) {
    // Loading in the background may have found the change before.
    vm.resume_if_alive();
    let ran = vm.end();
    assert!(!ran.stdout.contains("BAD"), "{what}: {}", ran.stdout);
    ran.failed(5, &MESSAGES).failed(5, &[file]);
}

/// Each codec, with and without BOUND.
const FORMS: [(&str, bool); 4] = [("raw", true), ("raw", false), ("lz4", true), ("zstd", false)];

#[test]
fn a_guest_whose_snapshot_is_overwritten_stops() {
    needs_vm!();
    for (codec, bound) in FORMS.into_iter().chain([("lz4", false), ("zstd", true)]) {
        let two = Two::new(codec, bound);
        let vm = half_way(two.folder(), two.file());
        two.write_over();
        stops(vm, &format!("{codec}, bound: {bound}"), "guest.snap");
        // The file is the later snapshot now, and a good one.
        snap(["verify", text(two.file())]).ok();
    }
}

/// `cp` makes the file empty first, `rsync --inplace` does not; both may set its time back.
#[test]
fn a_guest_whose_snapshot_is_copied_over_stops() {
    needs_vm!();
    for bound in [true, false] {
        for options in [&[][..], &["--preserve=timestamps"]] {
            let two = Two::new("raw", bound);
            let touch = Command::new("touch").arg("-r").arg(two.file()).arg(&two.later).status();
            assert!(touch.expect("touch runs").success());
            let vm = half_way(two.folder(), two.file());
            let mut copy = Command::new("cp");
            copy.args(options).arg(&two.later).arg(two.file());
            run(copy).ok();
            stops(vm, &format!("cp {options:?}, bound: {bound}"), "guest.snap");
        }
    }
}

/// The running guest keeps the old file, which has no name any more; later guests get the new one.
#[test]
fn a_guest_whose_snapshot_is_replaced_by_renaming_keeps_running() {
    needs_vm!();
    for bound in [true, false] {
        let two = Two::new("raw", bound);
        let mut vm = half_way(two.folder(), two.file());
        std::fs::rename(&two.later, two.file()).expect("it is replaced");
        vm.set("Resumed");
        let ran = vm.end().ok();
        assert!(ran.stdout.ends_with("beat 3 ok\nbeat 4 ok"), "{}", ran.stdout);
    }
}

#[test]
fn a_guest_whose_parent_snapshot_is_overwritten_stops() {
    needs_vm!();
    for (codec, bound) in FORMS {
        let two = Two::new(codec, bound);
        let layer = two.folder().join("layer.snap");
        let args = ["create", text(&layer), "--from", text(two.file())];
        snap(args.into_iter().chain(["--when", "output:beat 1 ok\n"])).ok();
        let vm = half_way(two.folder(), &layer);
        two.write_over();
        // The error is in the parent, and the message names the parent.
        stops(vm, &format!("{codec}, bound: {bound}"), "layer.snap: ");
        snap(["verify", text(&layer)]).failed(3, &["guest.snap", "as the parent, found"]);
    }
}

/// The server has the file, and the clone gets the reason.
#[test]
fn a_clone_whose_served_snapshot_is_overwritten_stops() {
    needs_vm!();
    for (codec, bound) in FORMS {
        let two = Two::new(codec, bound);
        let socket = two.folder().join("pages.sock");
        let mut serve = Command::new(SNAP);
        // Otherwise all pages may be loaded before the file is overwritten.
        let little = ["--prefetch", "off", "--populate", "off"];
        serve.args(["serve", text(two.file()), "--listen"]).arg(&socket).args(little);
        let mut server = serve.stderr(std::process::Stdio::null()).spawn().expect("it starts");
        let began = Instant::now();
        while !socket.exists() {
            assert!(began.elapsed() < LONG, "there is no server");
            thread::sleep(Duration::from_millis(1));
        }
        // One beat touches less than half of the pages; the hash reads all.
        let args = ["restore", text(two.file()), "--lazy", "--share", text(&socket)];
        let args = [&args[..], &["--beats", "200", "--hash"]].concat();
        let vm = Vm::start(two.folder(), &args);
        vm.set("Paused");
        two.write_over();
        stops(vm, &format!("{codec}, bound: {bound}"), "guest.snap");
        server.kill().expect("it runs");
        server.wait().expect("it ends");
    }
}

/// Pages that a guest has not touched are read from its snapshot when it is snapshotted again.
#[test]
fn a_guest_whose_snapshot_is_overwritten_is_not_snapshotted() {
    needs_vm!();
    for bound in [true, false] {
        let two = Two::new("raw", bound);
        let mut vm = half_way(two.folder(), two.file());
        two.write_over();
        let out = two.folder().join("now.snap");
        let request = json!({ "snapshot_path": out });
        let (status, answer) = vm.ask("PUT", "/snapshot/create", &request);
        assert!(status >= 400, "{status} {answer}");
        let message = answer["fault_message"].as_str().expect("it has a reason");
        assert!(message.contains("was written to after it was opened"), "{message}");
        assert!(!out.exists());
        stops_or_is_stopped(&mut vm);
    }
}

/// A guest that could not be snapshotted leaves no file.
#[track_caller]
fn stops_or_is_stopped(vm: &mut Vm) {
    let _ = vm.ask("PATCH", "/vm", &json!({ "state": "Resumed" }));
    let ran = vm.end();
    assert!(!ran.stdout.contains("BAD"), "{}", ran.stdout);
    ran.failed(5, &MESSAGES);
}

/// Memory that is a mapping of a raw image (a mode of `snap bench`): the guest is not stopped, but the run fails.
#[test]
fn a_run_whose_raw_image_is_written_to_fails() {
    needs_vm!();
    let sample = Sample::small();
    let image = sample.folder.path().join("memory.raw");
    snap(["export", text(&sample.file), "--format", "raw", "-o", text(&image)]).ok();
    let args = ["restore", text(&sample.file), "--image", text(&image), "--beats", "50"];
    Vm::start(sample.folder.path(), &args).end().ok();
    let mut vm = Vm::start(sample.folder.path(), &args);
    vm.set("Paused");
    let file = OpenOptions::new().write(true).open(&image).expect("it opens");
    file.write_all_at(&[0], 0).expect("it can be written");
    vm.set("Resumed");
    let messages =
        ["the guest may have run from two images", "memory.raw", "changed after it was opened"];
    vm.end().failed(1, &messages);
}

/// Otherwise the tests above would only detect other places, and not other snapshots.
#[test]
fn the_two_snapshots_of_these_tests_have_the_same_layout() {
    needs_vm!();
    for codec in ["raw", "lz4", "zstd"] {
        let two = Two::new(codec, true);
        let [a, b] = [two.file(), &two.later].map(|path| Snapshot::open(path).expect("it opens"));
        let (mut same, mut all) = (0, 0);
        a.for_each_entry(0..a.leaf_count(), |page, entry| {
            if let PageEntry::Data { .. } = entry {
                all += 1;
                same += u64::from(b.entry(page)? == entry);
            }
            Ok(())
        })
        .expect("the index can be read");
        let least = if codec == "raw" { all / 2 } else { 1 };
        assert!(same >= least, "{codec}: {same} of {all} pages are at the same place");
    }
}
