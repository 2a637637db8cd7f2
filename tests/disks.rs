//! Disks through the program: what a restore checks before the guest runs.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::kernel;
use crate::support::{Ran, SNAP, end_of, names, needs_vm, signal, skip, snap};

const DISK_BYTES: u64 = 1 << 20;

/// A folder with a guest that has a disk: stored when it asks for it, then it prints its command line and
/// stands still.
pub(crate) struct Guest {
    folder: TempDir,
}

impl Guest {
    #[track_caller]
    fn create(read_only: bool) -> Guest {
        let guest = Guest::new();
        let disk = File::create_new(guest.path("disk")).expect("it is made");
        disk.write_all_at(b"a file system", 0).expect("it is written");
        disk.set_len(DISK_BYTES).expect("it grows");
        let mut arg = guest.path("disk").into_os_string();
        arg.push(if read_only { ",ro" } else { "" });
        guest.stored_with(&arg).ok();
        guest
    }

    /// A folder with a kernel in it.
    pub(crate) fn new() -> Guest {
        let guest = Guest { folder: tempfile::tempdir().expect("a folder") };
        let request = &kernel::out(0x680, 1)[..7];
        let code = [request, kernel::PRINT_CMDLINE_PVH, &[0xeb, 0xfe]].concat();
        fs::write(guest.path("kernel"), kernel::elf(&code, true, 0)).expect("it is written");
        guest
    }

    /// Stores it, with `--disk` and this.
    #[track_caller]
    pub(crate) fn stored_with(&self, disk: impl AsRef<OsStr>) -> Ran {
        let (kernel, disk) = (self.path("kernel"), Path::new(&disk));
        let paths = [("--kernel", &*kernel), ("--disk", disk)];
        self.snap("create", "guest.snap", &["--force", "--cmdline", "goes on"], &paths)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    #[track_caller]
    fn snap(&self, command: &str, file: &str, words: &[&str], paths: &[(&str, &Path)]) -> Ran {
        let mut all = vec![command.into(), self.path(file).into_os_string()];
        all.extend(words.iter().map(Into::into));
        for (option, path) in paths {
            all.extend([option.into(), path.as_os_str().to_owned()]);
        }
        snap(all)
    }

    /// It prints its line, and then no more.
    #[track_caller]
    pub(crate) fn goes_on(&self, file: &str, words: &[&str]) {
        let ran = self.snap("restore", file, &[words, &["--until", "\n"]].concat(), &[]).ok();
        assert!(ran.stdout.starts_with("goes on"), "{}", ran.stdout);
    }

    /// It does not run at all.
    #[track_caller]
    pub(crate) fn is_refused(&self, words: &[&str], says: &[&str]) {
        for mode in [&["--lazy"][..], &[]] {
            let ran = self.snap("restore", "guest.snap", &[mode, words].concat(), &[]);
            assert_eq!(ran.stdout, "");
            ran.failed(1, says);
        }
    }

    /// A guest that has the disk for as long as this is not ended.
    pub(crate) fn start(&self, file: &str) -> Child {
        let mut command = Command::new(SNAP);
        command.args(["restore", "--lazy"]).arg(self.path(file)).stdin(Stdio::null());
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("snap starts");
        let mut line = String::new();
        let stdout = child.stdout.as_mut().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("it can be read");
        if !line.starts_with("goes on") {
            let _ = child.kill();
            panic!("{line:?}");
        }
        child
    }
}

pub(crate) fn stop(child: Child) {
    signal(child.id(), "INT");
    Ran::from(end_of(child)).failed(130, &["interrupted"]);
}

#[test]
fn a_disk_that_is_not_as_it_was_is_refused() {
    needs_vm!();
    let guest = Guest::create(false);
    guest.goes_on("guest.snap", &["--lazy"]);
    // The guest has written nothing: the disk is as it was.
    guest.goes_on("guest.snap", &[]);

    let copy = guest.path("copy");
    let copied = Command::new("cp").arg("-p").arg(guest.path("disk")).arg(&copy).status();
    assert!(copied.expect("cp runs").success());
    let disk = OpenOptions::new().write(true).open(guest.path("disk")).expect("it is there");
    disk.write_all_at(b"other content", 4096).expect("it is written");
    let changed = ["disk", "has changed since the guest was saved: its change time"];
    guest.is_refused(&[], &changed);
    guest.goes_on("guest.snap", &["--force-disks"]);
    guest.goes_on("guest.snap", &["--disk", copy.to_str().expect("a plain name")]);

    disk.set_len(DISK_BYTES / 2).expect("it shrinks");
    let shrunk = ["its length in bytes is 524288, expected 1048576"];
    guest.is_refused(&[], &shrunk);
    guest.is_refused(&["--force-disks"], &shrunk);
    disk.set_len(DISK_BYTES / 2 + 1).expect("it grows");
    guest.is_refused(&[], &["has 524289 bytes, expected a multiple of 512"]);

    fs::remove_file(guest.path("disk")).expect("it is there");
    guest.is_refused(&[], &["cannot open the disk", "No such file", "--disk says where it is now"]);
    fs::create_dir(guest.path("disk")).expect("it is made");
    guest.is_refused(&[], &["disk"]);
    guest.is_refused(&["--disk", "a", "--disk", "b"], &["--disk is given 2 times"]);
}

#[test]
fn one_guest_writes_a_disk_or_many_read_it() {
    needs_vm!();
    let guest = Guest::create(false);
    let first = guest.start("guest.snap");
    guest.is_refused(&[], &["disk", "is in use: one guest writes a disk"]);
    stop(first);
    guest.goes_on("guest.snap", &[]);

    let readers = Guest::create(true);
    let first = readers.start("guest.snap");
    readers.goes_on("guest.snap", &["--lazy"]);
    stop(first);
}

#[test]
fn a_layer_knows_the_disk_as_it_is_then() {
    needs_vm!();
    let guest = Guest::create(false);
    let base = guest.path("guest.snap");
    let words = ["--when", "output:goes"];
    guest.snap("create", "layer.snap", &words, &[("--from", &base)]).ok();
    let ran = guest.snap("restore", "layer.snap", &["--until", "\n"], &[]).ok();
    assert!(ran.stdout.starts_with(" on"), "{}", ran.stdout);
    // Neither can be had while a guest has the disk, and nothing is left of what could not be made.
    let first = guest.start("guest.snap");
    guest
        .snap("create", "second.snap", &words, &[("--from", &base)])
        .failed(1, &["disk", "is in use"]);
    stop(first);
    assert_eq!(names(guest.folder.path()), ["disk", "guest.snap", "kernel", "layer.snap"]);
}

#[test]
fn disks_that_are_none_are_refused_at_the_beginning() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("kernel"), kernel::elf(&kernel::power_off(), true, 0)).expect("it is written");
    fs::write(path("odd"), [0; 513]).expect("it is written");
    fs::write(path("empty"), []).expect("it is written");
    for (name, says) in [
        ("none", "No such file"),
        ("odd", "has 513 bytes, expected a multiple of 512"),
        ("empty", "has 0 bytes"),
        (".", "disk"),
    ] {
        let (out, kernel, disk) = (path("out.snap"), path("kernel"), path(name));
        let args = ["create".as_ref(), out.as_os_str(), "--kernel".as_ref(), kernel.as_os_str()];
        snap(args.into_iter().chain(["--disk".as_ref(), disk.as_os_str()])).failed(1, &[says]);
        assert!(!out.exists());
    }
}

/// What a guest would see as garbage is refused by its name; unless it is said to be meant.
#[test]
fn images_of_other_formats_are_refused() {
    needs_vm!();
    let guest = Guest::new();
    let write = |name: &str, at: usize, signature: &[u8]| {
        let mut bytes = vec![0; 64 << 10];
        bytes[at..at + signature.len()].copy_from_slice(signature);
        fs::write(guest.path(name), bytes).expect("it is written");
        guest.path(name)
    };
    let last_sector = (64 << 10) - 512;
    for (format, at, signature) in [
        ("qcow2", 0, &b"QFI\xfb\0\0\0\x03"[..]),
        ("VMDK", 0, b"KDMV\x01\0\0\0"),
        ("VMDK", 0, b"# Disk DescriptorFile\nversion=1\n"),
        ("VHDX", 0, b"vhdxfile"),
        ("VDI", 64, &[0x7f, 0x10, 0xda, 0xbe]),
        ("VHD", 0, b"conectix"),
        ("VHD", last_sector, b"conectix"),
        ("xz", 0, b"\xfd7zXZ\0"),
    ] {
        let disk = write("disk", at, signature);
        for words in ["", ",ro", ",overlay"] {
            let mut arg = disk.clone().into_os_string();
            arg.push(words);
            let ran = guest.stored_with(&arg);
            ran.failed(1, &["the disk ", &format!("in the format {format}"), "qemu-img", ",raw"]);
            arg.push(",raw");
            guest.stored_with(&arg).ok();
        }
    }
    // What is compressed mostly has no whole sectors: that is not what is wrong with it.
    fs::write(guest.path("odd"), b"\x1f\x8b\x08 and 13 more").expect("it is written");
    guest.stored_with(guest.path("odd")).failed(1, &["in the format gzip"]);
    // A guest may write what it likes on its disk: it is brought back all the same.
    let disk = write("own", 0, b"a file system");
    guest.stored_with(&disk).ok();
    write("own", 0, b"QFI\xfb");
    guest.goes_on("guest.snap", &["--force-disks"]);
}

/// What qemu-img makes, where there is one.
#[test]
fn images_of_qemu_are_refused() {
    let guest = Guest::new();
    for format in ["qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"] {
        let path = guest.path(format);
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-f", format]).arg(&path).arg("8M");
        match make.output() {
            Err(error) => return skip("images_of_qemu_are_refused", &format!("qemu-img: {error}")),
            // Not every build has all of them.
            Ok(output) if !output.status.success() => continue,
            Ok(_) => drop(guest.stored_with(&path).failed(1, &["in the format "])),
        }
    }
}
