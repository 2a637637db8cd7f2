//! What live snapshots and checkpoints cost the guest, and how soon a checkpoint is durable.
//!
//!     cargo bench -p snapvm --bench live
//!     cargo bench -p snapvm --bench live -- saved first           # only these parts
//!     SNAP_BENCH_DIR=/data cargo bench -p snapvm --bench live      # files in this folder
//!
//! The guests are a few instructions each, with one vCPU and 4 GiB of memory. They write a byte to their console after a
//! fixed amount of work, so that the host sees their speed: by the bytes within a time.
//!
//! - `saved`: the speed while a live snapshot of 100 MiB is written (lz4), in per cent of the speed in the second before
//!   it: of a guest that reads an area at random, and of one that writes to it at random. Also the time that the guest
//!   loses, as work that is not done, from the begin of arming until a second after the end.
//! - `protected`: the same while memory is protected for 200 ms, and nothing is saved: what the protection costs.
//! - `first`: the first write to a block of 64 KiB. A guest writes to one block after the other, and the time of 16 such
//!   writes is compared with the same writes in memory that is not protected.
//! - `checkpoints`: checkpoints of a guest that writes to an area at random. The time until the second one of a chain is
//!   durable, from the begin of arming on, and the guest's speed between the first and the second one, in per cent of that
//!   before the first.
#![allow(unsafe_code, missing_docs, clippy::unwrap_used)]

mod code;
#[path = "../../../vmm/tests/common/kernel.rs"]
mod kernel;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pager::window::WindowOptions;
use snapfmt::{Codec, Progress, Snapshot, WriteOptions};
use snapvm::{Armed, BootConfig, Cut, RunningVm};
use vmm::boot::LinuxConfig;
use vmm::{ConsoleFlow, Payload};

const MEMORY_BYTES: u64 = 4 << 30;
/// What the guests fill of it, and save, while the speed is measured.
const FILLED_BYTES: u32 = 100 << 20;
/// Where a guest works.
const AREA: u32 = 0x1000_0000;
const BLOCK_BYTES: u32 = 64 << 10;
/// Writes of the guest that writes to one block after the other, for a byte on its console.
const STEPS: u32 = 16;

fn main() {
    if let Err(error) = vmm::probe() {
        println!("SKIPPED live: {error}");
        return;
    }
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let full = std::env::args().any(|arg| arg == "--bench");
    let (rounds, second) = match full {
        true => (15, Duration::from_secs(1)),
        false => (1, Duration::from_millis(200)),
    };
    let folder = match std::env::var_os("SNAP_BENCH_DIR") {
        Some(place) => tempfile::tempdir_in(place),
        None => tempfile::tempdir(),
    };
    let folder = folder.unwrap();
    let bench = Bench { folder: folder.path().to_owned(), rounds, second };
    let parts: Vec<_> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|name| name == part);
    for (work, area_mib) in
        [(Work::Read, 100), (Work::Write, 100), (Work::Read, 1), (Work::Write, 1)]
    {
        if wanted("saved") {
            bench.while_saved(work, area_mib);
        }
        if wanted("protected") {
            bench.while_protected(work, area_mib);
        }
    }
    if wanted("first") {
        bench.first_writes();
    }
    if wanted("checkpoints") {
        bench.checkpoints("writes 10 MiB at random", 10 << 20);
        bench.checkpoints("writes 100 MiB at random", 100 << 20);
    }
}

struct Bench {
    folder: PathBuf,
    rounds: usize,
    second: Duration,
}

impl Bench {
    /// The guest's speed while a live snapshot is written.
    fn while_saved(&self, work: Work, area_mib: u32) {
        let mut guest = Guest::start(&self.folder, work, FILLED_BYTES, area_mib << 20);
        let mut rounds = Rounds::default();
        let (mut armed_ms, mut faults) = (Vec::new(), Vec::new());
        let file = self.folder.join("live.snap");
        for _ in 0..self.rounds {
            rounds.add(&mut guest, self.second, |guest| {
                let begin = Instant::now();
                let armed = guest.vm.as_ref().unwrap().arm(WindowOptions::default()).unwrap();
                armed_ms.push(ms(begin.elapsed()));
                let cut = guest.cut_of(armed);
                thread::scope(|scope| {
                    // As `snap` does: the writer's threads give way to the vCPU.
                    scope.spawn(|| {
                        // SAFETY: takes numbers, and affects only when this thread and those that it starts run.
                        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
                        cut.write(&file, &options(), &go).unwrap();
                    });
                });
                faults.push(cut.stats().faults as f64);
            });
            std::fs::remove_file(&file).unwrap();
        }
        println!(
            "saved, {}: {}; protected after {}, {:.0} faults",
            work.name(area_mib),
            rounds.report(),
            spread(&mut armed_ms, "ms"),
            middle(&mut faults)
        );
    }

    /// The guest's speed while its memory is protected, and not saved.
    fn while_protected(&self, work: Work, area_mib: u32) {
        let mut guest = Guest::start(&self.folder, work, FILLED_BYTES, area_mib << 20);
        let mut rounds = Rounds::default();
        for _ in 0..self.rounds {
            rounds.add(&mut guest, self.second, |guest| {
                let armed = guest.vm.as_ref().unwrap().arm(WindowOptions::default()).unwrap();
                thread::sleep(self.second / 5);
                drop(armed);
            });
        }
        println!("only protected, {}: {}", work.name(area_mib), rounds.report());
    }

    /// The first write to a block, protected or not.
    fn first_writes(&self) {
        const AREA_BYTES: u32 = 16 << 20;
        const BYTES_OF_A_PASS: usize = (AREA_BYTES / BLOCK_BYTES / STEPS) as usize;
        let mut guest = Guest::start(&self.folder, Work::Steps, AREA_BYTES, AREA_BYTES);
        let (mut usual, mut copied, mut noted) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.rounds * 4 {
            guest.bytes.lock().unwrap().clear();
            usual.extend(guest.steps_us(BYTES_OF_A_PASS));
            let cut = guest.cut(tracks());
            // After the cut, each write waits for a copy of its block.
            copied.extend(guest.steps_us(BYTES_OF_A_PASS));
            let file = self.folder.join("first.snap");
            cut.write(&file, &options(), &go).unwrap();
            std::fs::remove_file(file).unwrap();
            let armed = cut.end(true);
            armed.arm_again().unwrap();
            guest.bytes.lock().unwrap().clear();
            // Before the next cut, it is only noted.
            noted.extend(guest.steps_us(BYTES_OF_A_PASS));
        }
        let usual = middle(&mut usual);
        println!(
            "first write to a block of 64 KiB, beyond the usual {usual:.1} us, p50: {:.1} us after the cut, {:.1} us before it",
            middle(&mut copied) - usual,
            middle(&mut noted) - usual
        );
    }

    /// Chains of two checkpoints, the second one a second after the first.
    fn checkpoints(&self, name: &str, area_bytes: u32) {
        let mut guest = Guest::start(&self.folder, Work::Write, area_bytes, area_bytes);
        let (mut durable, mut speeds, mut mib) = (Vec::new(), Vec::new(), Vec::new());
        let (first, second) = (self.folder.join("1.snap"), self.folder.join("2.snap"));
        for _ in 0..self.rounds {
            let usual = guest.speed_of(self.second);
            let cut = guest.cut(tracks());
            cut.write(&first, &options(), &go).unwrap();
            let armed = cut.end(true);
            speeds.push(100.0 * guest.speed_of(self.second) / usual);

            let begin = Instant::now();
            let parent = Snapshot::open(&first).unwrap();
            armed.arm_again().unwrap();
            let cut = guest.cut_of(armed);
            let header = cut.write_changes(&second, &parent, &first, &options(), &go).unwrap();
            durable.push(ms(begin.elapsed()));
            mib.push((header.pages() - header.parent_pages) as f64 / 256.0);
            for file in [&first, &second] {
                std::fs::remove_file(file).unwrap();
            }
        }
        println!(
            "checkpoints of a guest that {name}: durable after {}, with {:.1} MiB; between them {} of its usual speed",
            spread(&mut durable, "ms"),
            middle(&mut mib),
            spread(&mut speeds, "%")
        );
    }
}

/// What a guest did in some rounds.
#[derive(Default)]
struct Rounds {
    shares: Vec<f64>,
    totals: Vec<f64>,
    lost: Vec<f64>,
}

impl Rounds {
    /// Measures the guest's speed before, and while `work` is done.
    fn add(&mut self, guest: &mut Guest, second: Duration, work: impl FnOnce(&mut Guest)) {
        let usual = guest.speed_of(second);
        let begin = Instant::now();
        work(guest);
        self.totals.push(ms(begin.elapsed()));
        self.shares.push(100.0 * guest.speed_since(begin) / usual);
        thread::sleep(second);
        self.lost.push(ms(begin.elapsed()) * (1.0 - guest.speed_since(begin) / usual));
    }

    fn report(&mut self) -> String {
        format!(
            "{} of its usual speed for {}; it loses {} until a second later",
            spread(&mut self.shares, "%"),
            spread(&mut self.totals, "ms"),
            spread(&mut self.lost, "ms")
        )
    }
}

fn tracks() -> WindowOptions {
    let mut options = WindowOptions::default();
    options.tracks = true;
    options
}

/// What a guest does in an endless loop.
#[derive(Clone, Copy)]
enum Work {
    /// Reads a word of the area at random.
    Read = 0,
    /// Writes one.
    Write = 1,
    /// Writes to one block after the other.
    Steps = 2,
}

impl Work {
    fn name(self, area_mib: u32) -> String {
        let does = match self {
            Work::Read => "reads",
            Work::Write => "writes",
            Work::Steps => "writes to the blocks of",
        };
        format!("a guest that {does} {area_mib} MiB at random")
    }
}

/// A guest that runs, and the times of the bytes that it has written.
struct Guest {
    work: Work,
    vm: Option<RunningVm>,
    bytes: Arc<Mutex<Vec<Instant>>>,
}

impl Guest {
    /// Starts it, and waits until it has filled its memory.
    fn start(folder: &Path, work: Work, filled_bytes: u32, area_bytes: u32) -> Self {
        let steps = if let Work::Steps = work { STEPS } else { 20_000 };
        let (file, code) =
            (folder.join("kernel"), code::code(work, filled_bytes, area_bytes, steps));
        std::fs::write(&file, kernel::elf(&code, false, 0)).unwrap();
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let times = Arc::clone(&bytes);
        let console = move |_: &[u8]| {
            times.lock().unwrap().push(Instant::now());
            ConsoleFlow::Continue
        };
        let payload = Payload::Linux(LinuxConfig::new(file));
        let vm = BootConfig::new(MEMORY_BYTES, payload).boot(console, Vec::new()).unwrap();
        let guest = Self { work, vm: Some(vm.resume().unwrap()), bytes };
        guest.wait_for_bytes(100);
        guest
    }

    fn wait_for_bytes(&self, count: usize) {
        while self.bytes.lock().unwrap().len() < count {
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Its speed, in bytes a second, in the time that begins now.
    fn speed_of(&self, time: Duration) -> f64 {
        self.bytes.lock().unwrap().clear();
        let begin = Instant::now();
        thread::sleep(time);
        self.speed_since(begin)
    }

    fn speed_since(&self, begin: Instant) -> f64 {
        let seconds = begin.elapsed().as_secs_f64();
        self.bytes.lock().unwrap().iter().filter(|at| **at >= begin).count() as f64 / seconds
    }

    /// The times of the next `count` bytes, in microseconds for one write.
    fn steps_us(&self, count: usize) -> Vec<f64> {
        self.wait_for_bytes(count + 1);
        let bytes = self.bytes.lock().unwrap();
        let times = bytes.windows(2).take(count);
        times.map(|pair| ms(pair[1] - pair[0]) * 1e3 / f64::from(STEPS)).collect()
    }

    fn cut(&mut self, options: WindowOptions) -> Cut {
        let armed = self.vm.as_ref().unwrap().arm(options).unwrap();
        self.cut_of(armed)
    }

    fn cut_of(&mut self, armed: Armed) -> Cut {
        let mut vm = self.vm.take().unwrap().pause().unwrap();
        let cut = vm.cut(armed).unwrap();
        if let Work::Steps = self.work {
            self.bytes.lock().unwrap().clear();
        }
        self.vm = Some(vm.resume().unwrap());
        cut
    }
}

fn options() -> WriteOptions {
    WriteOptions::default().codec(Codec::Lz4)
}

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn middle(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The median, and the range.
fn spread(values: &mut [f64], unit: &str) -> String {
    let median = middle(values);
    format!("{median:.0} {unit} ({:.0} to {:.0})", values[0], values[values.len() - 1])
}
