//! Clones of a guest that are restored at the same time, until each of them has answered: the guest has read some of its
//! memory and written a line.
//!
//!     cargo bench -p snapvm-cli --bench answers
//!     SNAP_BENCH_KERNEL=vmlinux SNAP_BENCH_INITRD=initrd.cpio SNAP_BENCH_ANSWER='tick 1 ok' cargo bench -p snapvm-cli --bench answers
//!
//! The second measures this Linux guest, snapshotted when its console shows READY, whose answer is this text.
//! `SNAP_BENCH_CMDLINE` is its command line, `SNAP_BENCH_MEMORY` the size of its memory. Without a kernel it is the demo
//! guest, whose answer is a beat. `SNAP_BENCH_CLONES` is the number of clones, `SNAP_BENCH_ROUNDS` that of the rounds.
//!
//! In each round all modes take turns, a different one first each time: `eager`, `mmap` (a raw image, mapped privately),
//! `lazy`, `lazy+hot` (of a file with a working set) and `shared` (with one `snap serve`). A clone is a process `snap
//! restore`. Times count from the start of the first process. The output has the medians over the rounds.
#![allow(missing_docs, clippy::unwrap_used)]

mod clock;

use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clock::{median, unix_ms};

const SNAP: &str = env!("CARGO_BIN_EXE_snap");
const MODES: [&str; 5] = ["eager", "mmap", "lazy", "lazy+hot", "shared"];

fn main() {
    if let Err(error) = vmm::probe() {
        println!("SKIPPED answers: {error}");
        return;
    }
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let full = env::args().any(|arg| arg == "--bench");
    let number =
        |name: &str, usual: usize| setting(name).map_or(usual, |text| text.parse().unwrap());
    let (clones, rounds) = if full { (number("CLONES", 64), number("ROUNDS", 5)) } else { (2, 1) };
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::new(folder.path());

    let mut of_modes: Vec<Vec<Answers>> = MODES.map(|_| Vec::new()).into();
    // The first round loads the files into the page cache.
    for round in 0..=rounds {
        for turn in 0..MODES.len() {
            let mode = (round + turn) % MODES.len();
            let answers = guest.restore(MODES[mode], clones);
            if round > 0 {
                of_modes[mode].push(answers);
            }
        }
    }
    println!("{clones} clones at once until each has answered, ms, medians of {rounds} rounds:");
    println!(
        "{:>10} {:>12} {:>8} {:>8} {:>8} {:>16} {:>14}",
        "mode", "last entry", "first", "median", "all", "all / clones", "all, of eager"
    );
    let eager_ms = median(of_modes[0].iter().map(|answers| answers.all_ms));
    for (mode, answers) in MODES.iter().zip(&of_modes) {
        let of = |pick: fn(&Answers) -> f64| median(answers.iter().map(pick));
        let all_ms = of(|answers| answers.all_ms);
        println!(
            "{mode:>10} {:>12.1} {:>8.1} {:>8.1} {all_ms:>8.1} {:>16.2} {:>13.2}x",
            of(|answers| answers.last_entry_ms),
            of(|answers| answers.first_ms),
            of(|answers| answers.median_ms),
            all_ms / clones as f64,
            all_ms / eager_ms
        );
    }
}

fn setting(name: &str) -> Option<String> {
    env::var(format!("SNAP_BENCH_{name}")).ok()
}

/// When the clones of a round had answered.
struct Answers {
    first_ms: f64,
    median_ms: f64,
    all_ms: f64,
    /// When the last of them had entered its guest.
    last_entry_ms: f64,
}

struct Guest {
    folder: PathBuf,
    answer: String,
}

impl Guest {
    fn new(folder: &Path) -> Self {
        let guest = Self {
            folder: folder.to_owned(),
            answer: setting("ANSWER").unwrap_or_else(|| " ok".into()),
        };
        let mut create = Command::new(SNAP);
        create.args(["create", "--quiet"]).arg(guest.path("guest.snap"));
        create.args(["--memory", &setting("MEMORY").unwrap_or_else(|| "64M".into())]);
        match setting("KERNEL") {
            None => drop(create.args(["--work", "8M"])),
            Some(kernel) => {
                create.args(["--when", "output:READY", "--kernel", &kernel]);
                for (name, option) in [("INITRD", "--initrd"), ("CMDLINE", "--cmdline")] {
                    if let Some(value) = setting(name) {
                        create.args([option, &value]);
                    }
                }
            }
        }
        succeeds(&mut create);
        let snap = |args: &[&str]| {
            succeeds(Command::new(SNAP).args(args).current_dir(folder).arg("--quiet"));
        };
        snap(&["export", "guest.snap", "--format", "raw", "-o", "guest.raw"]);
        snap(&["train", "guest.snap", "-o", "trained.snap", "--until", &guest.answer]);
        snap(&["optimize", "trained.snap", "-o", "hot.snap"]);
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn restore(&self, mode: &str, clones: usize) -> Answers {
        let server = (mode == "shared").then(|| self.serve());
        let start = unix_ms();
        let started: Vec<Child> = (0..clones).map(|_| self.start(mode)).collect();
        let (mut answered, mut entered) = (Vec::new(), Vec::new());
        for clone in started {
            let output = clone.wait_with_output().unwrap();
            let report = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{mode}: {report}");
            let report: serde_json::Value = serde_json::from_str(&report).unwrap();
            assert_eq!(report["stop"], "done", "{mode}: {report}");
            let after = |what: &str| {
                report["started_unix_ms"].as_f64().unwrap() - start + report[what].as_f64().unwrap()
            };
            answered.push(after("end_ms"));
            entered.push(after("first_instruction_ms"));
        }
        if let Some(mut server) = server {
            server.kill().unwrap();
            server.wait().unwrap();
        }
        let latest = |times: &[f64]| times.iter().copied().fold(0.0, f64::max);
        Answers {
            first_ms: answered.iter().copied().fold(f64::INFINITY, f64::min),
            median_ms: median(answered.iter().copied()),
            all_ms: latest(&answered),
            last_entry_ms: latest(&entered),
        }
    }

    fn start(&self, mode: &str) -> Child {
        let mut clone = Command::new(SNAP);
        clone.args(["restore", "--report", "json", "--for", "300s", "--until", &self.answer]);
        let file = if mode == "lazy+hot" { "hot.snap" } else { "guest.snap" };
        clone.arg(self.path(file));
        match mode {
            "mmap" => drop(clone.arg("--image").arg(self.path("guest.raw"))),
            "lazy" => drop(clone.args(["--lazy", "--prefetch", "off"])),
            "lazy+hot" => drop(clone.arg("--lazy")),
            "shared" => drop(clone.args(["--lazy", "--share"]).arg(self.path("clones.sock"))),
            _ => {}
        }
        clone.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn serve(&self) -> Child {
        let mut server = Command::new(SNAP);
        server.arg("serve").arg(self.path("guest.snap"));
        server.arg("--listen").arg(self.path("clones.sock")).stderr(Stdio::piped());
        let mut server = server.spawn().unwrap();
        let mut lines = BufReader::new(server.stderr.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert!(line.starts_with("serving "), "{line}");
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        server
    }
}

fn succeeds(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
