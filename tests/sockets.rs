//! Guests with sockets to the host (`--vsock`), through the program.

use std::fs;
use std::path::PathBuf;

use crate::kernel;
use crate::support::{needs_vm, snap};

/// A folder with a guest that requests a snapshot, and powers off when it is restored.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let request = &kernel::out(0x680, 1)[..7];
        let code = [request, &kernel::power_off()].concat();
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("kernel"), kernel::elf(&code, true, 0)).expect("written");
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `snap` with these arguments; FOLDER stands for the place.
    fn snap(&self, args: &str) -> crate::support::Ran {
        let folder = self.0.path().display().to_string();
        snap(args.split(' ').map(|arg| arg.replace("FOLDER", &folder)).collect::<Vec<_>>())
    }
}

#[test]
fn a_vsock_stays_with_the_guest_and_can_be_moved() {
    needs_vm!();
    let place = Place::new();
    let create = "create FOLDER/a.snap --kernel FOLDER/kernel --vsock";
    place.snap(&format!("{create} 3,FOLDER/sock")).ok();
    assert!(!place.path("sock").exists(), "the socket's name is left");
    let info = place.snap("info FOLDER/a.snap --json").ok();
    assert!(info.stdout.contains("\"cid\": 3"), "{}", info.stdout);

    place.snap("restore FOLDER/a.snap").ok();
    place.snap("restore --lazy FOLDER/a.snap --vsock 4,FOLDER/other").ok();
    // A file of another program, or a left one, is not removed.
    fs::write(place.path("sock"), "mine").expect("it is written");
    place.snap("restore FOLDER/a.snap").failed(
        1,
        &["the guest's vsock (--vsock gives it another socket)", "sock exists", "remove it"],
    );
    assert_eq!(fs::read(place.path("sock")).expect("it is there"), b"mine");
    place.snap("restore FOLDER/a.snap --vsock 4,FOLDER/other").ok();
}

#[test]
fn invalid_vsocks_are_refused_before_the_guest_runs() {
    needs_vm!();
    let place = Place::new();
    let create = |vsock: &str| {
        place.snap(&format!("create FOLDER/a.snap --kernel FOLDER/kernel --vsock {vsock}"))
    };
    create("3").failed(2, &["expected CID,SOCKET"]);
    create("x,FOLDER/sock").failed(2, &["the context id is not a number"]);
    create("2,FOLDER/sock").failed(1, &["--vsock", "context id 2, expected 3 to 4294967294"]);
    create("3,FOLDER/none/sock").failed(1, &["cannot bind the socket", "No such file"]);
    let long = format!("3,FOLDER/{}", "x".repeat(120));
    create(&long).failed(1, &["cannot be a socket's name"]);
    assert!(!place.path("a.snap").exists());
    place.snap("create FOLDER/a.snap --kernel FOLDER/kernel").ok();
    place
        .snap("restore FOLDER/a.snap --vsock 3,FOLDER/sock")
        .failed(1, &["--vsock is given, and the guest has no vsock"]);
}
