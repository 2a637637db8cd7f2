//! Guests of a real Firecracker whose memory comes from a file, from `snap mount` and from `snap serve`: the time to the
//! first output and to the fifth tick, warm and cold, and the memory of 1, 10 and 50 clones.
//!
//!     SNAP_FIRECRACKER=firecracker SNAP_BENCH_KERNEL=vmlinux SNAP_BENCH_INITRD=work.cpio \
//!         SNAP_BENCH_CMDLINE='console=ttyS0 work=16' cargo bench -p snapvm-cli --bench firecracker
//!
//! The guest writes a line with READY to its console, and then lines that begin with "tick". `SNAP_BENCH_CLONES` are the
//! numbers of clones, `1,10,50` if that is not set; `SNAP_BENCH_ROUNDS` how often a time is measured, 7 times if that is
//! not set. Clones are started one after the other; each is paused at its fifth tick. Memory is the sum of the PSS of all
//! clones, and that of the server. "Cold" needs root: it drops the page cache of the whole machine.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../tests/firecracker_machine.rs"]
mod firecracker_machine;

use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use firecracker_machine::{Firecracker, program};
use serde_json::json;

const SNAP: &str = env!("CARGO_BIN_EXE_snap");
const MEMORY_MIB: u64 = 128;

fn main() {
    let names = (program(), env::var_os("SNAP_BENCH_KERNEL"), env::var_os("SNAP_BENCH_INITRD"));
    let (Some(program), Some(kernel), Some(initrd)) = names else {
        println!(
            "SKIPPED firecracker: $SNAP_FIRECRACKER, $SNAP_BENCH_KERNEL or $SNAP_BENCH_INITRD is not set"
        );
        return;
    };
    let folder = tempfile::tempdir_in(".").unwrap();
    let place = Place { folder: folder.path().canonicalize().unwrap(), program };
    place.prepare(&json!({
        "kernel_image_path": PathBuf::from(kernel),
        "initrd_path": PathBuf::from(initrd),
        "boot_args": setting("CMDLINE", "console=ttyS0 reboot=k panic=1 quiet"),
    }));
    let rounds = setting("ROUNDS", "7").parse().unwrap();
    times(&place, rounds, false);
    times(&place, rounds, true);
    let clones = setting("CLONES", "1,10,50");
    memory(&place, &clones.split(',').map(|count| count.parse().unwrap()).collect::<Vec<_>>());
}

fn setting(name: &str, default: &str) -> String {
    env::var(format!("SNAP_BENCH_{name}")).unwrap_or(default.into())
}

/// Where a guest's memory comes from.
#[derive(Clone, Copy)]
enum Backend {
    /// Firecracker maps its own memory file.
    File,
    /// It maps the file of a mounted snapshot.
    Mount,
    /// A server answers its faults.
    Serve,
    /// The same; the guest has no asynchronous page faults.
    ServeWithoutAsync,
}

const BACKENDS: [(Backend, &str); 4] = [
    (Backend::File, "File"),
    (Backend::Mount, "File on snap mount"),
    (Backend::Serve, "Uffd, snap serve"),
    (Backend::ServeWithoutAsync, "the same, --no-async-pf"),
];

struct Place {
    folder: PathBuf,
    program: PathBuf,
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Snapshots a guest that has ticked three times, and imports it.
    fn prepare(&self, boot_source: &serde_json::Value) {
        let mut guest = Firecracker::start(&self.program, &self.folder, "first");
        guest.boot(boot_source, MEMORY_MIB);
        ticks(&mut guest, 3);
        guest.set_state("Paused");
        guest.snapshot("Full", &self.path("memory"), &self.path("vmstate"));
        snap(&["import", "memory", "--vmstate", "vmstate", "-o", "fc.snap"], &self.folder);
        let format = ["--format", "firecracker", "--no-async-pf"];
        snap(&[&["export", "fc.snap", "-o", "without"], &format[..]].concat(), &self.folder);
        fs::create_dir(self.path("mounted")).unwrap();
    }

    /// Starts what the guests' memory comes from.
    fn serve(&self, backend: Backend) -> Option<Server> {
        let (args, ready): (&[&str], _) = match backend {
            Backend::File => return None,
            Backend::Mount => (&["mount", "fc.snap", "mounted"], "mounted/firecracker/memory"),
            Backend::Serve | Backend::ServeWithoutAsync => {
                (&["serve", "fc.snap", "--listen", "pages"], "pages")
            }
        };
        let mut server = Command::new(SNAP);
        server.args(args).current_dir(&self.folder).stdin(Stdio::null());
        server.stdout(Stdio::null()).stderr(Stdio::null());
        let server = Server(server.spawn().unwrap());
        while !self.path(ready).exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Some(server)
    }

    /// Restores a guest, and lets it run to its fifth tick. Returns the times from its load to its first and its fifth.
    fn clone(&self, backend: Backend, number: usize) -> (Firecracker, Duration, Duration) {
        let mut guest = Firecracker::start(&self.program, &self.folder, &format!("clone-{number}"));
        let (vmstate, kind, memory) = match backend {
            Backend::File => ("vmstate", "File", "memory"),
            Backend::Mount => ("mounted/firecracker/vmstate", "File", "mounted/firecracker/memory"),
            Backend::Serve => ("vmstate", "Uffd", "pages"),
            Backend::ServeWithoutAsync => ("without/vmstate", "Uffd", "pages"),
        };
        let began = Instant::now();
        guest.load(&self.path(vmstate), kind, &self.path(memory));
        ticks(&mut guest, 1);
        let first = began.elapsed();
        ticks(&mut guest, 4);
        (guest, first, began.elapsed())
    }
}

/// A process of `snap` that is ended when this is dropped, after its guests.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        Command::new("kill").args(["-INT", &self.0.id().to_string()]).status().unwrap();
        self.0.wait().unwrap();
    }
}

/// Waits for so many lines that begin with "tick".
fn ticks(guest: &mut Firecracker, count: usize) {
    // Byte by byte: what comes after the last line stays in the pipe.
    let mut lines = BufReader::with_capacity(1, &mut guest.serial);
    let (mut found, mut line) = (0, String::new());
    while found < count {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "the guest has ended");
        assert!(!line.contains("BAD"), "{line}");
        found += usize::from(line.starts_with("tick"));
    }
}

fn times(place: &Place, rounds: usize, cold: bool) {
    let which = if cold { "cold" } else { "warm" };
    if cold && fs::OpenOptions::new().write(true).open("/proc/sys/vm/drop_caches").is_err() {
        println!("SKIPPED cold: the page cache cannot be dropped");
        return;
    }
    println!("{which}, ms to the first output and to the fifth tick, medians of {rounds}:");
    let mut all = vec![(Vec::new(), Vec::new()); BACKENDS.len()];
    for round in 0..=rounds {
        for ((backend, _), times) in BACKENDS.iter().zip(&mut all) {
            if cold {
                drop_caches(&place.program);
            }
            let server = place.serve(*backend);
            let (guest, first, fifth) = place.clone(*backend, 0);
            drop(guest);
            drop(server);
            // The first round warms up.
            if round > 0 {
                times.0.push(first);
                times.1.push(fifth);
            }
        }
    }
    for ((_, name), (first, fifth)) in BACKENDS.iter().zip(&mut all) {
        println!("  {name:<24} {:8.1} {:8.1}", median_ms(first), median_ms(fifth));
    }
}

fn median_ms(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

/// Drops the page cache, except for the programs.
fn drop_caches(firecracker: &Path) {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    for program in [firecracker, Path::new(SNAP)] {
        File::open(program).unwrap().read_to_end(&mut Vec::new()).unwrap();
    }
}

fn memory(place: &Place, counts: &[usize]) {
    println!("MiB, the sum of the PSS of all clones, and the PSS of the server:");
    for (backend, name) in BACKENDS {
        for &count in counts {
            let server = place.serve(backend);
            let guests: Vec<_> = (0..count)
                .map(|number| {
                    let (guest, _, _) = place.clone(backend, number);
                    guest.set_state("Paused");
                    guest
                })
                .collect();
            let sum: f64 = guests.iter().map(|guest| pss_mib(guest.id())).sum();
            let own = server.as_ref().map_or(0.0, |server| pss_mib(server.0.id()));
            println!("  {name:<24} {count:3} clones: {sum:8.1} {own:8.1}");
            drop(guests);
            drop(server);
        }
    }
}

fn pss_mib(process: u32) -> f64 {
    let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    pss.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
}

/// Runs a command of `snap` to its end.
fn snap(args: &[&str], folder: &Path) {
    let status = Command::new(SNAP).args(["--quiet"]).args(args).current_dir(folder).status();
    assert!(status.unwrap().success(), "{args:?}");
}
