//! Guests with network interfaces and balloons, through the program.

use std::fs;
use std::process::Command;

use crate::kernel;
use crate::support::{Ran, needs_vm, skip, snap};

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

    /// `snap` with these arguments; FOLDER stands for the place.
    fn snap(&self, args: &str) -> Ran {
        let folder = self.0.path().display().to_string();
        snap(args.split(' ').map(|arg| arg.replace("FOLDER", &folder)).collect::<Vec<_>>())
    }

    fn create(&self, device: &str) -> Ran {
        self.snap(&format!("create FOLDER/a.snap --kernel FOLDER/kernel{device}"))
    }
}

/// A tap of this host, removed when this is dropped.
pub(crate) struct HostTap(pub(crate) String);

impl HostTap {
    pub(crate) fn new(test: &str, name: &str) -> Option<Self> {
        let made = Command::new("ip").args(["tuntap", "add", name, "mode", "tap"]).output();
        match made {
            Ok(made) if made.status.success() => Some(Self(name.into())),
            Ok(made) => {
                skip(test, &String::from_utf8_lossy(&made.stderr));
                None
            }
            Err(error) => {
                skip(test, &format!("ip: {error}"));
                None
            }
        }
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["tuntap", "del", &self.0, "mode", "tap"]).output();
    }
}

#[test]
fn invalid_networks_are_refused_before_the_guest_runs() {
    needs_vm!();
    let place = Place::new();
    place
        .create(" --net tap=snapnone")
        .failed(1, &["--net", "there is no interface snapnone", "ip tuntap add snapnone mode tap"]);
    place.create(" --net tap=a/b").failed(1, &["cannot be an interface's name"]);
    place.create(" --net snap0").failed(2, &["expected tap=NAME[,mac=MAC]"]);
    place.create(" --net mac=02:00:00:00:00:01").failed(2, &["expected tap=NAME"]);
    place.create(" --net tap=t,mac=03:00:00:00:00:01").failed(2, &["expected six bytes"]);
    assert!(!place.0.path().join("a.snap").exists());
    place.create("").ok();
    place
        .snap("restore FOLDER/a.snap --net tap=snap0")
        .failed(1, &["--net is given 1 times, and the guest has 0 network interfaces"]);
}

#[test]
fn a_network_stays_with_the_guest_and_can_be_moved() {
    needs_vm!();
    let name = format!("snap{}", std::process::id());
    let Some(tap) = HostTap::new("a_network_stays_with_the_guest", &name) else { return };
    let place = Place::new();
    place.create(&format!(" --net tap={name},mac=02:00:00:00:00:07")).ok();
    place
        .snap("restore FOLDER/a.snap")
        .failed(1, &["names the tap", &format!("--net tap={name}"), "--allow-path /dev/net"]);
    place.snap("restore FOLDER/a.snap --allow-path /dev/net").ok();
    place.snap(&format!("restore FOLDER/a.snap --net tap={name}")).ok();
    let lo = place.create(" --force --net tap=lo");
    lo.failed(1, &["cannot attach to the tap lo", "Invalid argument"]);
    drop(tap);
    place.snap("restore FOLDER/a.snap --allow-path /dev/net").failed(
        1,
        &["the guest's network interface (--net gives it another tap)", "there is no interface"],
    );
    let other = format!("{name}b");
    let Some(_tap) = HostTap::new("a_network_stays_with_the_guest", &other) else { return };
    place.snap(&format!("restore --lazy FOLDER/a.snap --net tap={other}")).ok();
}

#[test]
fn a_balloon_stays_with_the_guest() {
    needs_vm!();
    let place = Place::new();
    place.create(" --balloon").ok();
    place.snap("restore --lazy FOLDER/a.snap").ok();
    let info = place.snap("info FOLDER/a.snap --json").ok();
    assert!(info.stdout.contains("virtio-balloon"), "{}", info.stdout);
}
