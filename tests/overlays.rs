//! Disks that are not changed (`--disk IMG,overlay`, `--disk-overlay`), through the program.

use std::fs;

use crate::kernel;
use crate::support::{Ran, SNAP, needs_vm, snap};
use crate::virtio_guest::{WRITE, fill, request, set, show, start, submit};

const HEADER: u32 = 0x40_0000;
const STATUS: u32 = 0x40_1000;
const DATA: u32 = 0x40_2000;

/// Reads a sector, and prints its first letter.
pub(crate) fn read(count: u8, sector: u32) -> Vec<u8> {
    let header = [set(HEADER, 0), set(HEADER + 8, sector)].concat();
    let buffers = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    [header, submit(0, count, &buffers), show(DATA)].concat()
}

/// Fills a sector with a letter.
pub(crate) fn write(count: u8, sector: u32, letter: u8) -> Vec<u8> {
    let header = [set(HEADER, 1), set(HEADER + 8, sector), fill(DATA, 512, letter)].concat();
    [header, submit(0, count, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)])].concat()
}

/// A folder with a disk of the letter `d`, and a guest that writes W to sector 1 and is snapshotted; then it reads
/// sectors 1 and 2, writes R to both, reads sector 2 and requests a snapshot; then it reads sectors 1 and 8.
pub(crate) struct Place(pub(crate) tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let code = [
            start(0, 0),
            write(1, 1, b'W'),
            request(),
            read(2, 1),
            read(3, 2),
            write(4, 1, b'R'),
            write(5, 2, b'R'),
            read(6, 2),
            request(),
            read(7, 1),
            read(8, 8),
            kernel::power_off(),
        ];
        let folder = tempfile::tempdir().expect("a folder");
        let file = |name: &str| folder.path().join(name);
        fs::write(file("kernel"), kernel::elf(&code.concat(), true, 0)).expect("it is written");
        fs::write(file("disk.img"), [b'd'; 64 << 10]).expect("it is written");
        Self(folder)
    }

    fn args(&self, args: &str) -> Vec<String> {
        let folder = self.0.path().display().to_string();
        args.split(' ').map(|arg| arg.replace("FOLDER", &folder)).collect()
    }

    /// `snap` with these arguments; FOLDER stands for the place.
    pub(crate) fn snap(&self, args: &str) -> Ran {
        snap(self.args(args))
    }

    pub(crate) fn create(&self, disk: &str) {
        let args = "create FOLDER/a.snap --kernel FOLDER/kernel --disk FOLDER/disk.img";
        self.snap(&format!("{args}{disk}")).ok();
    }

    /// The first letters of sectors 0 to 2 of the image itself.
    pub(crate) fn image(&self) -> String {
        let bytes = fs::read(self.0.path().join("disk.img")).expect("it is there");
        [0, 512, 1024].map(|at| char::from(bytes[at])).iter().collect()
    }
}

#[test]
fn an_overlay_is_in_the_snapshot_and_every_restore_has_its_own() {
    needs_vm!();
    let place = Place::new();
    place.create(",overlay");
    assert_eq!(place.image(), "ddd");
    for mode in ["", " --lazy", " --lazy --disk-overlay memory", " --disk-overlay FOLDER"] {
        let ran = place.snap(&format!("restore FOLDER/a.snap{mode}")).ok();
        assert_eq!(ran.stdout, "W\nd\nR\nR\nd\n", "{mode}");
    }
    assert_eq!(place.image(), "ddd");
    // Snapshotted again, with its later writes, also in another file.
    place.snap("create FOLDER/b.snap --from FOLDER/a.snap --when request").ok();
    place.snap("flatten FOLDER/b.snap -o FOLDER/c.snap").ok();
    for file in ["b", "c"] {
        let ran = place.snap(&format!("restore FOLDER/{file}.snap")).ok();
        assert_eq!(ran.stdout, "R\nd\n");
    }
    place.snap("verify FOLDER/a.snap").ok();
    // With a changed image the guest does not run.
    fs::write(place.0.path().join("disk.img"), [b'x'; 64 << 10]).expect("it is written");
    place.snap("restore FOLDER/a.snap").failed(1, &["has changed since the guest was saved"]);
    place
        .snap("restore FOLDER/a.snap --disk-overlay FOLDER/none --force-disks")
        .failed(1, &["cannot make the overlay of the disk", "No such file"]);
    fs::remove_file(place.0.path().join("disk.img")).expect("it was there");
    place.snap("restore FOLDER/a.snap").failed(1, &["the guest's disk", "cannot open the disk"]);
}

#[test]
fn restores_share_a_disk_that_was_snapshotted_without_an_overlay() {
    needs_vm!();
    let place = Place::new();
    place.create("");
    assert_eq!(place.image(), "dWd");
    for mode in ["", " --lazy"] {
        let ran = place.snap(&format!("restore FOLDER/a.snap --disk-overlay memory{mode}")).ok();
        assert_eq!(ran.stdout, "W\nd\nR\nR\nd\n", "{mode}");
        assert_eq!(place.image(), "dWd");
    }
    // Without an overlay the guest writes the image itself, so that it cannot be restored again.
    assert_eq!(place.snap("restore FOLDER/a.snap").ok().stdout, "W\nd\nR\nR\nd\n");
    assert_eq!(place.image(), "dRR");
    place.snap("restore FOLDER/a.snap").failed(1, &["has changed since the guest was saved"]);
    // The program leaves no files.
    let names = fs::read_dir(place.0.path()).expect("it is there").count();
    assert_eq!(names, 3, "{SNAP} left something");
}
