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

/// A folder with a guest that has a disk. It is snapshotted at its request, then it prints its command line and halts.
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

    /// Snapshots it, with `--disk` and this.
    #[track_caller]
    pub(crate) fn stored_with(&self, disk: impl AsRef<OsStr>) -> Ran {
        let (kernel, disk) = (self.path("kernel"), Path::new(&disk));
        let paths = [("--kernel", &*kernel), ("--disk", disk)];
        self.snap("create", "guest.snap", &["--force", "--cmdline", "continues here"], &paths)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    #[track_caller]
    fn snap(&self, command: &str, file: &str, args: &[&str], paths: &[(&str, &Path)]) -> Ran {
        let mut all = vec![command.into(), self.path(file).into_os_string()];
        all.extend(args.iter().map(Into::into));
        for (option, path) in paths {
            all.extend([option.into(), path.as_os_str().to_owned()]);
        }
        snap(all)
    }

    /// Restores it: it prints its line, and then no more.
    #[track_caller]
    pub(crate) fn continues(&self, file: &str, args: &[&str]) {
        let ran = self.snap("restore", file, &[args, &["--until", "\n"]].concat(), &[]).ok();
        assert!(ran.stdout.starts_with("continues"), "{}", ran.stdout);
    }

    /// The restore is refused, and the guest does not run.
    #[track_caller]
    pub(crate) fn is_refused(&self, args: &[&str], messages: &[&str]) {
        for mode in [&["--lazy"][..], &[]] {
            let ran = self.snap("restore", "guest.snap", &[mode, args].concat(), &[]);
            assert_eq!(ran.stdout, "");
            ran.failed(1, messages);
        }
    }

    /// A guest that uses the disk until this is dropped.
    pub(crate) fn start(&self, file: &str, args: &[&str]) -> Child {
        let mut command = Command::new(SNAP);
        command.args(["restore", "--lazy"]).arg(self.path(file)).args(args).stdin(Stdio::null());
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("snap starts");
        let mut line = String::new();
        let stdout = child.stdout.as_mut().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("it can be read");
        if !line.starts_with("continues") {
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
fn a_changed_disk_is_refused() {
    needs_vm!();
    let guest = Guest::create(false);
    guest.continues("guest.snap", &["--lazy"]);
    // The guest has written nothing: the disk is unchanged.
    guest.continues("guest.snap", &[]);

    let copy = guest.path("copy");
    let copied = Command::new("cp").arg("-p").arg(guest.path("disk")).arg(&copy).status();
    assert!(copied.expect("cp runs").success());
    let disk = OpenOptions::new().write(true).open(guest.path("disk")).expect("it is there");
    disk.write_all_at(b"other content", 4096).expect("it is written");
    let changed = ["disk", "has changed since the guest was saved: its change time"];
    guest.is_refused(&[], &changed);
    guest.continues("guest.snap", &["--force-disks"]);
    guest.continues("guest.snap", &["--disk", copy.to_str().expect("a plain name")]);

    disk.set_len(DISK_BYTES / 2).expect("it shrinks");
    let shrunk = ["its length in bytes is 524288, expected 1048576"];
    guest.is_refused(&[], &shrunk);
    guest.is_refused(&["--force-disks"], &shrunk);
    disk.set_len(DISK_BYTES / 2 + 1).expect("it grows");
    guest.is_refused(&[], &["has 524289 bytes, expected a multiple of 512"]);

    fs::remove_file(guest.path("disk")).expect("it is there");
    guest.is_refused(&[], &["cannot open the disk", "No such file", "--disk gives its new path"]);
    fs::create_dir(guest.path("disk")).expect("it is made");
    guest.is_refused(&[], &["disk"]);
    guest.is_refused(&["--disk", "a", "--disk", "b"], &["--disk is given 2 times"]);
}

#[test]
fn one_guest_writes_a_disk_or_many_read_it() {
    needs_vm!();
    let guest = Guest::create(false);
    let first = guest.start("guest.snap", &[]);
    guest.is_refused(&[], &["disk", "is in use: one guest writes a disk"]);
    stop(first);
    guest.continues("guest.snap", &[]);

    let readers = Guest::create(true);
    let first = readers.start("guest.snap", &[]);
    readers.continues("guest.snap", &["--lazy"]);
    stop(first);
}

#[test]
fn a_layer_has_the_fingerprint_of_its_time() {
    needs_vm!();
    let guest = Guest::create(false);
    let base = guest.path("guest.snap");
    let args = ["--when", "output:continues"];
    guest.snap("create", "layer.snap", &args, &[("--from", &base)]).ok();
    let ran = guest.snap("restore", "layer.snap", &["--until", "\n"], &[]).ok();
    assert!(ran.stdout.starts_with(" here"), "{}", ran.stdout);
    // Both are refused while a guest uses the disk, and no file is left.
    let first = guest.start("guest.snap", &[]);
    guest
        .snap("create", "second.snap", &args, &[("--from", &base)])
        .failed(1, &["disk", "is in use"]);
    stop(first);
    assert_eq!(names(guest.folder.path()), ["disk", "guest.snap", "kernel", "layer.snap"]);
}

#[test]
fn invalid_disks_are_refused_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("kernel"), kernel::elf(&kernel::power_off(), true, 0)).expect("it is written");
    fs::write(path("odd"), [0; 513]).expect("it is written");
    fs::write(path("empty"), []).expect("it is written");
    for (name, messages) in [
        ("none", "No such file"),
        ("odd", "has 513 bytes, expected a multiple of 512"),
        ("empty", "has 0 bytes"),
        (".", "disk"),
    ] {
        let (out, kernel, disk) = (path("out.snap"), path("kernel"), path(name));
        let args = ["create".as_ref(), out.as_os_str(), "--kernel".as_ref(), kernel.as_os_str()];
        snap(args.into_iter().chain(["--disk".as_ref(), disk.as_os_str()])).failed(1, &[messages]);
        assert!(!out.exists());
    }
}

/// An image in another format, which a guest would see as garbage, is refused, except with `,raw`.
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
        for args in ["", ",ro", ",overlay"] {
            let mut arg = disk.clone().into_os_string();
            arg.push(args);
            let ran = guest.stored_with(&arg);
            ran.failed(1, &["the disk ", &format!("in the format {format}"), "qemu-img", ",raw"]);
            arg.push(",raw");
            guest.stored_with(&arg).ok();
        }
    }
    // Compressed files mostly have no whole sectors, but the message is about the format.
    fs::write(guest.path("odd"), b"\x1f\x8b\x08 and 13 more").expect("it is written");
    guest.stored_with(guest.path("odd")).failed(1, &["in the format gzip"]);
    // A guest may write any bytes on its disk: it is restored anyway.
    let disk = write("own", 0, b"a file system");
    guest.stored_with(&disk).ok();
    write("own", 0, b"QFI\xfb");
    guest.continues("guest.snap", &["--force-disks"]);
}

/// Images that qemu-img makes, if it is installed.
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
