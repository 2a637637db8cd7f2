//! `snap fork`, from the request to the first instruction of the first and the last child, which the children report.
//!
//!     cargo bench -p snapvm-cli --bench forks
//!
//! The request is the start of the process `snap fork`. The guest is the demo guest: booted, or restored lazily. The
//! output has the median and the best of the rounds.
#![allow(missing_docs, clippy::unwrap_used)]

mod clock;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clock::{median, unix_ms};

const SNAP: &str = env!("CARGO_BIN_EXE_snap");

fn main() {
    if let Err(error) = vmm::probe() {
        println!("SKIPPED forks: {error}");
        return;
    }
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let full = std::env::args().any(|arg| arg == "--bench");
    let rounds = if full { [(1, 41), (50, 9)] } else { [(1, 1), (2, 1)] };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.snap").display().to_string();
    let sizes = ["--memory", "128M", "--work", "44M"];
    let created = snap(&["create", "--quiet", &file]).args(sizes).output().unwrap();
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    println!("ms after the request, median (best):");
    println!(
        "{:>24} {:>9} {:>15} {:>15} {:>15} {:>15} {:>15}",
        "guest", "children", "paused for", "cut", "all started", "first runs", "last runs"
    );
    let guests = [
        ("booted, 64 MiB", &["run", "--memory", "64M", "--work", "8M"][..]),
        ("restored lazily, 128 MiB", &["restore", "--lazy", &file]),
        ("restored eagerly, 128 MiB", &["restore", &file]),
    ];
    for (name, args) in guests {
        for (children, rounds) in rounds {
            let guest = Running::start(folder.path(), args);
            let forks: Vec<_> = (0..rounds).map(|_| guest.fork(children)).collect();
            let column = |pick: fn(&Fork) -> f64| {
                let best = forks.iter().map(pick).fold(f64::INFINITY, f64::min);
                format!("{:.1} ({best:.1})", median(forks.iter().map(pick)))
            };
            println!(
                "{name:>24} {children:>9} {:>15} {:>15} {:>15} {:>15} {:>15}",
                column(|fork| fork.pause_ms),
                column(|fork| fork.cut_ms),
                column(|fork| fork.started_ms),
                column(|fork| fork.first_ms),
                column(|fork| fork.last_ms)
            );
        }
    }
}

/// Times of one fork, after the request.
struct Fork {
    pause_ms: f64,
    cut_ms: f64,
    /// Until the last child's process was started.
    started_ms: f64,
    /// The first instruction of the first child.
    first_ms: f64,
    /// That of the last one.
    last_ms: f64,
}

fn snap(args: &[&str]) -> Command {
    let mut command = Command::new(SNAP);
    command.args(args).stdin(Stdio::null());
    command
}

/// A guest with a control socket.
struct Running {
    guest: Child,
    socket: PathBuf,
}

impl Running {
    fn start(folder: &Path, args: &[&str]) -> Self {
        let socket = folder.join("guest.sock");
        let _ = std::fs::remove_file(&socket);
        let mut guest = snap(args);
        guest.arg("--api").arg(&socket).stdout(Stdio::null()).stderr(Stdio::null());
        let guest = guest.spawn().unwrap();
        while !socket.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // It has work that it can rewrite.
        std::thread::sleep(Duration::from_millis(500));
        Self { guest, socket }
    }

    fn fork(&self, children: usize) -> Fork {
        let mut fork = snap(&["fork", "--json", "-n", &children.to_string(), "--vm"]);
        fork.arg(&self.socket).args(["--", "--report", "json", "--beats", "1"]);
        let request = unix_ms();
        let output = fork.output().unwrap();
        let reports = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{reports}");
        let first_instruction = |report: serde_json::Value| {
            let started_ms = report["started_unix_ms"].as_f64().unwrap() - request;
            started_ms + report["first_instruction_ms"].as_f64().unwrap()
        };
        let reports = serde_json::Deserializer::from_str(&reports).into_iter();
        let runs: Vec<f64> = reports.map(|report| first_instruction(report.unwrap())).collect();
        assert_eq!(runs.len(), children);
        let done: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let of = |what: &str| done[what].as_f64().unwrap();
        Fork {
            pause_ms: of("pause_ms"),
            cut_ms: of("cut_ms"),
            started_ms: of("total_ms"),
            first_ms: runs.iter().copied().fold(f64::INFINITY, f64::min),
            last_ms: runs.iter().copied().fold(0.0, f64::max),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.guest.kill().unwrap();
        self.guest.wait().unwrap();
    }
}
