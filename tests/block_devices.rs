//! Block devices as disks, through the program. Loop devices stand for volumes.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::disks::{Guest, stop};
use crate::overlays::Place;
use crate::support::{Ran, SNAP, needs_vm, run, skip, snap};

/// A loop device on a file, until this is dropped.
struct Loop {
    device: PathBuf,
}

impl Loop {
    /// `None`, and the test is skipped, if this host has none.
    fn on(image: &Path) -> Option<Loop> {
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        match Command::new("losetup").args(["--find", "--show"]).arg(image).output() {
            Ok(output) if output.status.success() => {
                let device = String::from_utf8(output.stdout).expect("a path").trim().into();
                Some(Loop { device })
            }
            Ok(output) => {
                skip(
                    &test,
                    &format!("losetup: {}", String::from_utf8_lossy(&output.stderr).trim()),
                );
                None
            }
            Err(error) => {
                skip(&test, &format!("losetup: {error}"));
                None
            }
        }
    }

    fn name(&self) -> String {
        self.device.display().to_string()
    }

    fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.device).expect("it is there")
    }

    /// The first letters of sectors 0 to 2.
    fn letters(&self) -> String {
        let letter = |at| {
            let mut byte = [0];
            self.open().read_exact_at(&mut byte, at).expect("it is read");
            char::from(byte[0])
        };
        [0, 512, 1024].map(letter).iter().collect()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

/// A place with a guest that has this as its disk, snapshotted in a.snap.
fn stored(disk: &str) -> Place {
    let place = Place::new();
    create(&place, disk).ok();
    place
}

fn create(place: &Place, disk: &str) -> Ran {
    place.snap(&format!("create FOLDER/a.snap --kernel FOLDER/kernel --disk {disk}"))
}

fn image(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, [b'd'; 64 << 10]).expect("it is written");
    path
}

/// The devices are not in the folders of the snapshots.
const ANYWHERE: [&str; 2] = ["--allow-path", "/"];

#[test]
fn a_device_is_written_snapshotted_and_recognized() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let Some(device) = Loop::on(&image(folder.path(), "one")) else { return };
    // By the name of a link, as for a volume: the snapshot stores this name.
    let link = folder.path().join("volume");
    std::os::unix::fs::symlink(&device.device, &link).expect("a link");
    let place = stored(&link.display().to_string());
    assert_eq!(device.letters(), "dWd");
    let file = place.0.path().join("a.snap").display().to_string();
    let about: Value = snap(["info", "--json", &file]).ok().json();
    assert_eq!(about["metadata"]["guest"]["devices"][0]["disk"], link.display().to_string());

    // The time of its name in /dev is not used: after a restart of the host it is another one.
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
    device.open().set_modified(long_ago).expect("the time is set");
    for mode in ["", " --lazy"] {
        let ran = place
            .snap(&format!("restore FOLDER/a.snap --allow-path / --disk-overlay memory{mode}"))
            .ok();
        assert_eq!(ran.stdout, "W\nd\nR\nR\nd\n", "{mode}");
    }
    assert_eq!(device.letters(), "dWd");
    // The link leads to another device with the same content: a volume may be anywhere.
    let copy = folder.path().join("copy");
    let mut bytes = vec![0; 64 << 10];
    device.open().read_exact_at(&mut bytes, 0).expect("it is read");
    fs::write(&copy, &bytes).expect("it is written");
    // A file with the same bytes may have changed before they were copied: the user decides.
    let args = format!("restore FOLDER/a.snap --disk {}", copy.display());
    let messages = ["is a file, and was a block device when the guest was saved", "--force-disks"];
    place.snap(&args).failed(1, &messages);
    let Some(other) = Loop::on(&copy) else { return };
    fs::remove_file(&link).expect("it is there");
    std::os::unix::fs::symlink(&other.device, &link).expect("a link");
    assert_eq!(place.snap("restore FOLDER/a.snap --allow-path /").ok().stdout, "W\nd\nR\nR\nd\n");
    assert_eq!((other.letters(), device.letters()), ("dRR".into(), "dWd".into()));
    // That one has changed now: the sample differs.
    place.snap("restore FOLDER/a.snap --allow-path /").failed(1, &["its sample's CRC-32"]);
    place.snap("restore FOLDER/a.snap --allow-path / --force-disks").ok();
}

#[test]
fn a_file_does_not_replace_a_device() {
    needs_vm!();
    let place = stored("FOLDER/disk.img,ro");
    let Some(device) = Loop::on(&place.0.path().join("disk.img")) else { return };
    let args = format!("restore FOLDER/a.snap --disk {}", device.name());
    let messages = ["is a block device, and was a file when the guest was saved", "--force-disks"];
    place.snap(&args).failed(1, &messages);
    place.snap(&format!("{args} --force-disks")).ok();
}

#[test]
fn readers_and_overlays_share_a_device() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let Some(device) = Loop::on(&image(folder.path(), "one")) else { return };
    for args in [",overlay", ",ro"] {
        let guest = Guest::new();
        guest.stored_with(device.name() + args).ok();
        let reader = guest.start("guest.snap", &ANYWHERE);
        guest.continues("guest.snap", &["--lazy", ANYWHERE[0], ANYWHERE[1]]);
        // But no other guest may write it meanwhile.
        let messages = ["is in use: one guest writes a disk, or many read it"];
        Guest::new().stored_with(device.name()).failed(1, &messages);
        stop(reader);
    }
    let place = stored(&format!("{},overlay", device.name()));
    assert_eq!(place.snap("restore FOLDER/a.snap --allow-path /").ok().stdout, "W\nd\nR\nR\nd\n");
    assert_eq!(device.letters(), "ddd");
}

/// A device that a guest writes has no other guest, and no file system of the host.
#[test]
fn a_device_that_is_in_use_is_refused() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    File::create(&path).and_then(|file| file.set_len(8 << 20)).expect("it is made");
    let Some(device) = Loop::on(&path) else { return };
    let guest = Guest::new();
    guest.stored_with(device.name()).ok();
    let writer = guest.start("guest.snap", &ANYWHERE);
    let in_use = ["is in use: it is mounted, has a volume on it, or belongs to another guest"];
    guest.is_refused(&ANYWHERE, &in_use);
    stop(writer);
    guest.continues("guest.snap", &ANYWHERE);

    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.arg("-q").arg(&device.device);
    if !mkfs.status().is_ok_and(|status| status.success()) {
        return skip(
            "a_device_that_is_in_use_is_refused",
            "there is no mkfs.ext4 for the second part",
        );
    }
    // In a separate namespace, so that it ends with its process.
    let script = "mount \"$DEVICE\" /mnt || exit 77; \"$SNAP\" create \"$OUT\" --kernel \"$KERNEL\" \
                  --disk \"$DEVICE\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).env("DEVICE", &device.device).env("SNAP", SNAP);
    let ran = run({
        command.env("OUT", guest.path("out.snap")).env("KERNEL", guest.path("kernel"));
        command
    });
    match ran.code {
        Some(77) => skip("a_device_that_is_in_use_is_refused", "this user may not mount a device"),
        _ => drop(ran.failed(1, &in_use)),
    }
}

#[test]
fn a_device_with_an_image_on_it_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = image(folder.path(), "one");
    let file = OpenOptions::new().write(true).open(&path).expect("it is there");
    file.write_all_at(b"QFI\xfb", 0).expect("it is written");
    let Some(device) = Loop::on(&path) else { return };
    Guest::new().stored_with(device.name()).failed(1, &["format qcow2"]);
}
