//! Live snapshots of a guest whose vCPUs and devices are busy all the time (`busy_guest`).

use std::fs;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::busy_guest::{check_stamps, kernel};
use crate::control::Vm;
use crate::live::memory_of;
use crate::networks::HostTap;
use crate::support::{needs_vm, restore, snap};

/// The snapshots that are taken of each guest.
const SNAPSHOTS: usize = 3;

/// What the guest's devices are connected to.
struct Host {
    folder: tempfile::TempDir,
    /// Of the guest, and of restored copies of it.
    taps: [HostTap; 2],
    /// Bytes that were echoed to the guest.
    echoed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Host {
    /// `None` where there can be no taps. `number` is that of a subnet and in the taps' names: no other test has it.
    fn new(test: &str, number: u8) -> Option<Self> {
        let name = |last: char| format!("sb{}n{number}{last}", std::process::id());
        let taps = [HostTap::new(test, &name('a'))?, HostTap::new(test, &name('b'))?];
        let address = format!("10.213.{number}.1");
        let network = format!("{address}/24");
        for args in [
            ["addr", "add", &network, "dev", &taps[0].0].as_slice(),
            &["link", "set", &taps[0].0, "up"],
            &["link", "set", &taps[1].0, "up"],
        ] {
            assert!(Command::new("ip").args(args).status().expect("ip runs").success());
        }
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("kernel"), kernel()).expect("it is written");
        fs::write(folder.path().join("disk.img"), [b'd'; 64 << 10]).expect("it is written");
        let (echoed, stop) = (Arc::default(), Arc::default());
        let host = Self { folder, taps, echoed, stop };
        host.send_frames(&address);
        host.echo();
        Some(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Sends a frame each millisecond.
    fn send_frames(&self, address: &str) {
        let socket = UdpSocket::bind((address, 0)).expect("the address is there");
        socket.set_broadcast(true).expect("it can be set");
        let stop = Arc::clone(&self.stop);
        let to = format!("{}.255:9", address.rsplit_once('.').expect("an address").0);
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // The tap takes no frame while its queue is full.
                let _ = socket.send_to(&[7; 600], &to);
                thread::sleep(Duration::from_millis(1));
            }
        });
    }

    /// Sends back what the guest sends to port 5000.
    fn echo(&self) {
        let listener = UnixListener::bind(self.path("vsock_5000")).expect("a new name");
        let echoed = Arc::clone(&self.echoed);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, echoed) = (stream.expect("a connection"), Arc::clone(&echoed));
                thread::spawn(move || {
                    let mut bytes = [0; 4096];
                    while let Ok(len @ 1..) = stream.read(&mut bytes) {
                        if stream.write_all(&bytes[..len]).is_err() {
                            break;
                        }
                        echoed.fetch_add(len as u64, Ordering::Relaxed);
                    }
                });
            }
        });
    }

    /// `snap` with the guest's kernel and devices.
    fn with_guest(&self, command: &[&str]) -> Vec<String> {
        let text = |name: &str| self.path(name).display().to_string();
        let fixed = ["--memory", "64M", "--cpus", "3", "--disk-overlay", "memory", "--balloon"];
        let mut args: Vec<String> =
            command.iter().chain(&fixed).map(|word| (*word).to_owned()).collect();
        args.extend(["--kernel".into(), text("kernel")]);
        args.extend(["--disk".into(), text("disk.img") + ",overlay"]);
        args.extend(["--vsock".into(), format!("3,{}", text("vsock"))]);
        args.extend(["--net".into(), format!("tap={}", self.taps[0].0)]);
        args
    }

    /// Restores a copy, which runs beside the guest and checks what it finds.
    #[track_caller]
    fn copy_runs(&self, file: &Path) {
        let (vsock, net) =
            (format!("4,{}", self.path("copy").display()), format!("tap={}", self.taps[1].0));
        for mode in [&[][..], &["--lazy"]] {
            let options = ["--beats", "4", "--vsock", &vsock, "--net", &net];
            let report = restore(file, &[&options, mode].concat()).ok().report();
            assert_eq!((&report["beats"], &report["bad_beats"]), (&json!(4), &json!(0)));
        }
    }

    /// What the host's kernel has received from the guest's tap, and has sent to it.
    fn frames(&self) -> [u64; 2] {
        ["rx_packets", "tx_packets"].map(|count| {
            let path = format!("/sys/class/net/{}/statistics/{count}", self.taps[0].0);
            fs::read_to_string(path).expect("it is there").trim().parse().expect("a number")
        })
    }

    /// Takes live snapshots while everything is in use, and checks each, and the guest after it.
    #[track_caller]
    fn is_saved(&self, mut vm: Vm, options: &[&str]) {
        vm.beats(4);
        let out = self.path("live.snap");
        // Messages of the vsock, frames of the guest, and frames for it, during the snapshots. One of them may be too short
        // for each.
        let mut exchanged = [0; 3];
        let mut last = 0;
        for number in 0..SNAPSHOTS {
            let before = (self.echoed.load(Ordering::Relaxed), self.frames());
            let options = [&["--live", "--force", "--json"][..], options].concat();
            let summary = vm.create(&out, &options).ok().json();
            let after = (self.echoed.load(Ordering::Relaxed), self.frames());
            assert!(summary["live"].is_object(), "{summary}");
            exchanged[0] += after.0 - before.0;
            exchanged[1] += after.1[0] - before.1[0];
            exchanged[2] += after.1[1] - before.1[1];
            let count = check_stamps(&memory_of(&out));
            assert!(count > last, "the guest has done nothing since snapshot {number}");
            last = count;
            vm.beats(2);
            self.copy_runs(&out);
        }
        assert!(exchanged.iter().all(|&count| count > 0), "{exchanged:?}");
        vm.interrupt();
        assert!(fs::read(self.path("disk.img")).expect("it is there").iter().all(|b| *b == b'd'));
    }

    fn start(&self, args: &[&str]) -> Vm {
        Vm::start(self.folder.path(), args)
    }
}

fn words(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

#[test]
fn a_booted_guest_with_busy_vcpus_and_devices_is_saved_at_one_point_in_time() {
    needs_vm!();
    let Some(host) = Host::new("a_booted_guest_with_busy_vcpus", 1) else { return };
    let args = host.with_guest(&["run"]);
    host.is_saved(host.start(&words(&args)), &[]);
}

#[test]
fn restored_guests_with_busy_vcpus_and_devices_are_saved_at_one_point_in_time() {
    needs_vm!();
    let Some(host) = Host::new("restored_guests_with_busy_vcpus", 2) else { return };
    let first = host.path("first.snap").display().to_string();
    let mut args = host.with_guest(&["create", &first]);
    args.extend(["--when".into(), "output:beat 64 ok".into()]);
    snap(args).ok();
    let net = format!("tap={}", host.taps[0].0);
    for mode in [&["--lazy", "--populate", "off"][..], &["--lazy", "--populate", "full"], &[]] {
        let args = [&["restore", &first, "--net", &net][..], mode].concat();
        // In turns the whole guest, and only what has changed.
        let options: &[&str] = if mode.contains(&"off") { &["--diff"] } else { &[] };
        host.is_saved(host.start(&args), options);
    }
}

/// Each checkpoint is a layer on the one before.
#[test]
fn checkpoints_of_a_guest_with_busy_vcpus_and_devices_are_of_one_point_in_time_each() {
    needs_vm!();
    let Some(host) = Host::new("checkpoints_of_a_guest_with_busy_vcpus", 3) else { return };
    let args = host.with_guest(&["run"]);
    let mut vm = host.start(&words(&args));
    let mut last = 0;
    for number in 0..8_u32 {
        let parent = number.checked_sub(1).map(|parent| host.path(&format!("{parent}.snap")));
        let out = host.path(&format!("{number}.snap"));
        let how = json!({ "track_ms": 60000, "parent": parent });
        let request = json!({ "snapshot_path": out, "type": "live", "checkpoint": how });
        let (status, answer) = vm.ask("PUT", "/snapshot/create", &request);
        assert_eq!(status, 200, "{answer}");
        vm.beats(2);
        let count = check_stamps(&memory_of(&out));
        assert!(count > last, "the guest has done nothing since checkpoint {number}");
        last = count;
        if number % 3 == 1 {
            host.copy_runs(&out);
        }
    }
    vm.interrupt();
}
