//! If a disk does not answer, every command reports that, and can be interrupted.

use std::ffi::OsStr;
use std::path::Path;

use crate::fuse::SlowDisk;
use crate::support::{Sample, names, needs_vm, snap};
use crate::talking::{Talking, wait_until};

#[test]
fn each_command_that_reads_a_file() {
    needs_vm!();
    let sample = Sample::small();
    let here = sample.folder.path();
    let (raw, layer) = (here.join("memory.raw"), here.join("layer.snap"));
    let export = ["export".as_ref(), sample.file.as_os_str(), "-o".as_ref(), raw.as_os_str()];
    snap(export.into_iter().chain(["--format".as_ref(), "raw".as_ref()])).ok();
    let test = "each_command_that_reads_a_file";
    let Some(disk) = SlowDisk::with(&sample.file, test) else { return };
    let file = disk.file();
    let from = ["create".as_ref(), layer.as_os_str(), "--from".as_ref(), file.as_os_str()];
    snap(from.into_iter().chain(["--when".as_ref(), "output:beat".as_ref()])).ok();
    let out = here.join("out");
    let before = sample.names();
    disk.hang();
    let (file, out) = (file.to_str().expect("text"), out.to_str().expect("text"));
    let (layer, local) = (layer.to_str().expect("text"), sample.file.to_str().expect("text"));
    let socket = here.join("a.sock");
    let socket = socket.to_str().expect("text");
    for args in [
        &["info", file][..],
        &["info", file, "--map"],
        &["verify", file],
        // Its parent is on the slow disk.
        &["verify", layer],
        &["diff", local, file],
        &["cat", file, "--gpa", "1M"],
        &["pages", file],
        &["flatten", file, "-o", out],
        &["rebase", local, "--onto", file, "-o", out],
        &["optimize", file, "-o", out],
        &["train", file, "--beats", "1", "-o", out],
        &["export", file, "--format", "raw", "-o", out],
        &["import", file, "-o", out],
        &["create", out, "--from", file, "--when", "output:beat"],
        &["restore", file, "--api", socket],
        &["restore", "--lazy", file, "--api", socket],
        &["serve", file, "--listen", socket],
    ] {
        let mut waiting = Talking::snap(args);
        waiting.prints(&["waiting for", "to be read", "no time limit; Ctrl-C ends it"]);
        waiting.interrupt();
        assert_eq!(sample.names(), before, "{args:?}");
    }
    for args in [&["run", "--kernel", file][..], &["run", "--kernel", local, "--initrd", file]] {
        let mut waiting = Talking::snap(args);
        if args.len() == 3 {
            waiting.prints(&["waiting for the guest's kernel and disks to be read"]);
            waiting.interrupt();
        }
    }
}

#[test]
fn a_disk_that_stops_while_a_command_reads_it() {
    needs_vm!();
    // Large enough that several reads are needed.
    let sample = Sample::create(&["--memory", "256M", "--work", "192M", "--codec", "raw"]);
    let test = "a_disk_that_stops_while_a_command_reads_it";
    let Some(disk) = SlowDisk::with(&sample.file, test) else { return };
    let other = Sample::create(&["--memory", "256M", "--work", "192M", "--codec", "raw"]);
    let (file, out) = (disk.file(), sample.folder.path().join("out"));
    let (file, out) = (file.to_str().expect("text"), out.to_str().expect("text"));
    for (args, what) in [
        (&["verify", file][..], "verifying is at"),
        (&["restore", file], "loading is at"),
        (&["export", file, "--format", "raw", "-o", out], "exporting is at"),
        (&["export", file, "--format", "elf", "-o", out], "exporting is at"),
        (&["flatten", file, "-o", out], "flattening is at"),
        (&["diff", file, other.file.to_str().expect("text"), "--list"], "to be read"),
        (&["restore", file, "--lazy"], "a page of"),
    ] {
        disk.hang_after(20 << 20);
        let mut waiting = Talking::snap(args);
        waiting.prints(&["waiting for", what, "Ctrl-C ends it"]);
        waiting.interrupt();
        assert_eq!(sample.names(), ["guest.snap"], "{args:?}");
        disk.answer();
    }
}

#[test]
fn a_guest_whose_file_does_not_answer_any_more() {
    needs_vm!();
    let sample = Sample::small();
    let test = "a_guest_whose_file_does_not_answer_any_more";
    let Some(disk) = SlowDisk::with(&sample.file, test) else { return };
    let (file, api) = (disk.file(), sample.folder.path().join("api.sock"));
    for end in [&["--for", "1500ms"][..], &[]] {
        let args = ["restore", "--lazy", "--paused", "--api"].map(OsStr::new);
        let args = args.into_iter().chain([api.as_os_str(), file.as_os_str()]);
        let mut guest = Talking::snap(args.chain(end.iter().map(OsStr::new)));
        guest.prints(&["waiting for a client to resume the guest"]);
        let unanswered = disk.unanswered();
        disk.hang();
        crate::waits::resume(&api);
        wait_until("the guest needs no page", || disk.unanswered() > unanswered);
        guest.prints(&["waiting for a page of", "guest.snap to be read"]);
        if end.is_empty() {
            guest.signal("HUP");
        }
        if !end.is_empty() {
            guest.prints(&["waiting for", "a page that does not come may keep it"]);
        }
        let ran = guest.end();
        match end.is_empty() {
            true => ran.failed(130, &["interrupted"]),
            false => ran.failed(1, &["a page that it waits for does not come"]),
        };
        assert_eq!(sample.names(), ["guest.snap"]);
        disk.answer();
    }
}

#[test]
fn a_disk_that_does_not_write() {
    needs_vm!();
    let sample = Sample::small();
    let test = "a_disk_that_does_not_write";
    let Some(disk) = SlowDisk::with(&sample.file, test) else { return };
    let (out, api) = (disk.folder().join("out"), sample.folder.path().join("api.sock"));
    let (local, api) = (sample.file.to_str().expect("text"), api.to_str().expect("text"));
    let written = |out: &Path| {
        let out = out.to_str().expect("text").to_owned();
        move |args: &[&str]| {
            let args = args.iter().map(|arg| arg.replace("OUT", &out));
            let mut waiting = Talking::snap(args);
            waiting.prints(&["waiting for the disk or the CPU", "is at", "Ctrl-C ends it"]);
            waiting.interrupt();
        }
    };
    let interrupted = written(&out);
    interrupted(&["create", "OUT", "--memory", "32M", "--work", "4M"]);
    interrupted(&["flatten", local, "-o", "OUT"]);
    interrupted(&["export", local, "--format", "raw", "-o", "OUT"]);
    assert!(!disk.has_folder(), "the hidden folder is left");
    // The guest's process reports it, and so does the client.
    let mut guest = Talking::snap(["restore", local, "--api", api]);
    guest.beats(1);
    let mut client = Talking::snap(["create", out.to_str().expect("text"), "--vm", api]);
    client.prints(&["waiting for the guest at", "to be stored"]);
    guest.prints(&["waiting for the disk or the CPU: storing is at"]);
    client.interrupt();
    guest.interrupt();
    assert_eq!(names(sample.folder.path()), ["guest.snap"]);
}
