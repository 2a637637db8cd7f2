//! A snapshot does not choose the files of the host that its guest gets.

use std::fs::{self, File};
use std::os::unix::fs::symlink;

use crate::kernel;
use crate::support::{Ran, needs_vm, snap};

/// A snapshot in `ours`, of a guest with a device whose path is in `theirs`.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a folder"));
        for folder in ["ours", "theirs"] {
            fs::create_dir(place.0.path().join(folder)).expect("it is made");
        }
        let code = [&kernel::out(0x680, 1)[..7], &kernel::power_off()].concat();
        fs::write(place.0.path().join("kernel"), kernel::elf(&code, true, 0)).expect("written");
        let disk = File::create_new(place.0.path().join("theirs/disk")).expect("it is made");
        disk.set_len(1 << 20).expect("it grows");
        place
    }

    /// `snap` with these arguments; AT stands for the place.
    fn snap(&self, args: &str) -> Ran {
        let at = self.0.path().display().to_string();
        snap(args.split(' ').map(|arg| arg.replace("AT", &at)).collect::<Vec<_>>())
    }
}

#[test]
fn a_disk_outside_the_snapshots_folder_is_used_only_if_it_is_allowed() {
    needs_vm!();
    let place = Place::new();
    place.snap("create AT/ours/a.snap --kernel AT/kernel --disk AT/theirs/disk").ok();
    let path = place.0.path().canonicalize().expect("it is there");
    let named = path.join("theirs/disk").display().to_string();
    for mode in ["", " --lazy"] {
        let refused = place.snap(&format!("restore AT/ours/a.snap{mode}"));
        let option = format!("--allow-path {}", path.join("theirs").display());
        refused.failed(1, &["ours/a.snap: ", "names the disk", &named, "--disk", &option]);
        for option in ["--allow-path AT/theirs", "--allow-path AT", "--allow-path /"] {
            place.snap(&format!("restore AT/ours/a.snap{mode} {option}")).ok();
        }
        place.snap(&format!("restore AT/ours/a.snap{mode} --disk AT/theirs/disk")).ok();
        place
            .snap(&format!("restore AT/ours/a.snap{mode} --allow-path AT/ours"))
            .failed(1, &["names the disk"]);
    }
    // A link in an allowed folder does not lead out of it.
    let disk = path.join("theirs/disk");
    fs::rename(&disk, path.join("secret")).expect("it is moved");
    symlink("../secret", &disk).expect("it is linked");
    place
        .snap("restore AT/ours/a.snap --allow-path AT/theirs")
        .failed(1, &["names the disk", "--disk"]);
    place.snap("restore AT/ours/a.snap --allow-path AT").ok();
    // Neither a pipe nor a device in the place of an image is opened.
    fs::remove_file(&disk).expect("it is removed");
    rustix::fs::mkfifoat(rustix::fs::CWD, &disk, rustix::fs::Mode::RUSR).expect("a pipe");
    place
        .snap("restore AT/ours/a.snap --allow-path AT/theirs")
        .failed(1, &["neither a regular file nor a block device"]);
}

#[test]
fn a_disk_beside_the_snapshot_needs_no_option() {
    needs_vm!();
    let place = Place::new();
    place.snap("create AT/theirs/a.snap --kernel AT/kernel --disk AT/theirs/disk").ok();
    place.snap("restore AT/theirs/a.snap").ok();
    // Also with a relative path of the snapshot.
    let mut command = std::process::Command::new(crate::support::SNAP);
    command.args(["restore", "a.snap"]).current_dir(place.0.path().join("theirs"));
    crate::support::run(command).ok();
}

#[test]
fn a_socket_outside_the_snapshots_folder_is_created_only_if_it_is_allowed() {
    needs_vm!();
    let place = Place::new();
    place.snap("create AT/ours/a.snap --kernel AT/kernel --vsock 3,AT/theirs/vsock").ok();
    place
        .snap("restore AT/ours/a.snap")
        .failed(1, &["names the socket", "theirs/vsock", "--vsock CID,SOCKET", "--allow-path"]);
    assert!(!place.0.path().join("theirs/vsock").exists());
    place.snap("restore AT/ours/a.snap --allow-path AT/theirs").ok();
    place.snap("restore AT/ours/a.snap --vsock 4,AT/theirs/other").ok();
}
