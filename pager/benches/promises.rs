//! The promises of the pager about its speed, each compared to a bare loop in the same run.
//!
//!     cargo bench -p snapvm-pager --bench promises
//!
//! Rounds alternate. A result is the median over the rounds.
#![allow(unsafe_code)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use pager::uffd::{Features, Message, MessageBatch, Uffd, Wait};
use pager::{PageSource, Pager, Placement, Populate, VecSource};
use support::{Memory, PAGE, shuffled, stamp};

struct Bench {
    rounds: usize,
    mib: usize,
}

fn main() {
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let full = std::env::args().any(|arg| arg == "--bench");
    if !support::userfaultfd_works("bench promises") {
        return;
    }
    let bench = if full { Bench { rounds: 7, mib: 512 } } else { Bench { rounds: 1, mib: 8 } };
    println!("{:<58} {:>9} {:>9} {:>7}", "", "bare", "pager", "ratio");
    bench.one_fault();
    bench.random_order();
    bench.beside_population();
    bench.threads(1);
    bench.threads(2);
}

impl Bench {
    /// One fault of a warm 4 KiB page: a bare loop on the same CPU, and a pager without any pinned thread.
    fn one_fault(&self) {
        const PAGES: usize = 4096;
        let source: Arc<dyn PageSource> = Arc::new(VecSource::new(stamps(PAGES), PAGE));
        let [bare, follows, free] = self.alternate([
            &|| {
                let memory = Memory::map(PAGES * PAGE);
                let _bare = Bare::start(&memory, 0, Style::PollsIfEmpty);
                pin(0);
                touch_each(&memory, PAGES)
            },
            &|| {
                let memory = Memory::map(PAGES * PAGE);
                let pager = Pager::builder(source.clone()).region(memory.whole()).start();
                let _pager = pager.expect("it starts");
                pin(0);
                touch_each(&memory, PAGES)
            },
            &|| {
                let memory = Memory::map(PAGES * PAGE);
                let pager = Pager::builder(source.clone()).region(memory.whole()).start();
                let _pager = pager.expect("it starts");
                touch_each(&memory, PAGES)
            },
        ]);
        row("one fault, p50 us; the faulting thread bound", bare.p50, follows.p50);
        row("one fault, mean us; the faulting thread bound", bare.mean, follows.mean);
        row("one fault, p50 us; nothing bound at all", bare.p50, free.p50);
        row("one fault, mean us; nothing bound at all", bare.mean, free.mean);
        let [spin] = self.alternate([&|| {
            let memory = Memory::map(PAGES * PAGE);
            let builder = Pager::builder(source.clone()).region(memory.whole());
            let _pager = builder.placement(Placement::Spin).start().expect("it starts");
            touch_each(&memory, PAGES)
        }]);
        row("one fault, p50 us; nothing bound, the pager spins", bare.p50, spin.p50);
    }

    /// All pages in random order: chunks of 64 KiB compared to the usual handler of single pages, in thousand pages per
    /// second.
    fn random_order(&self) {
        let pages = self.mib * 256;
        let source: Arc<dyn PageSource> = Arc::new(VecSource::new(stamps(pages), 16 * PAGE));
        let rounds = Bench { rounds: self.rounds.min(3), ..*self };
        let [bare, ours] = rounds.alternate([
            &|| {
                let memory = Memory::map(pages * PAGE);
                let _bare = Bare::start(&memory, 0, Style::PollsAlways);
                pin(0);
                whole(|| touch_all(&memory, &shuffled(pages, 3)), pages)
            },
            &|| {
                let memory = Memory::map(pages * PAGE);
                let pager = Pager::builder(source.clone()).region(memory.whole()).start();
                let _pager = pager.expect("it starts");
                whole(|| touch_all(&memory, &shuffled(pages, 3)), pages)
            },
        ]);
        let what = format!("all of {} MiB, random order, thousand pages/s", self.mib);
        row(&what, 1e3 / bare.mean, 1e3 / ours.mean);
    }

    /// The p99 of faults, without population (first column) and with it at full speed.
    fn beside_population(&self) {
        let pages = self.mib.min(256) * 256;
        let source: Arc<dyn PageSource> = Arc::new(VecSource::new(stamps(pages), 16 * PAGE));
        let faults = |populate: Populate| {
            let memory = Memory::map(pages * PAGE);
            let builder = Pager::builder(source.clone()).region(memory.whole());
            let pager = builder.populate(populate).start().expect("it starts");
            let mut times = Vec::new();
            // A guest that computes for 200 us between two faults. Only touches that faulted count.
            for page in shuffled(pages / 16, 5).into_iter().take(2000) {
                let begin = Instant::now();
                while begin.elapsed().as_micros() < 200 {
                    std::hint::spin_loop();
                }
                let before = pager.stats().faults;
                let begin = Instant::now();
                assert_eq!(memory.read_u64(page * 16 * PAGE), stamp(page * 16));
                let took = begin.elapsed().as_nanos() as f64 / 1e3;
                if took > 2.0 || pager.stats().faults > before {
                    times.push(took);
                }
            }
            times
        };
        let [off, full] = self.alternate([&|| faults(Populate::Off), &|| faults(Populate::Full)]);
        row("a fault, p50 us: without, with population at full speed", off.p50, full.p50);
        row("a fault, p99 us: without, with population at full speed", off.p99, full.p99);
    }

    /// Pages per second of all threads together, compared to one thread.
    fn threads(&self, slices: usize) {
        const PAGES: usize = 8192;
        let source: Arc<dyn PageSource> = Arc::new(VecSource::new(stamps(PAGES), PAGE));
        let with = |threads: usize| {
            let memory = Memory::map(PAGES * PAGE);
            let builder = Pager::builder(source.clone()).region(memory.whole());
            let _pager = builder.slices(slices).start().expect("it starts");
            let order = shuffled(PAGES, 23);
            let touch = || {
                thread::scope(|scope| {
                    for part in order.chunks(PAGES.div_ceil(threads)) {
                        let memory = &memory;
                        scope.spawn(move || touch_all(memory, part));
                    }
                });
            };
            whole(touch, PAGES)
        };
        let all = self.alternate([&|| with(1), &|| with(2), &|| with(4), &|| with(8)]);
        for (threads, figures) in [1, 2, 4, 8].into_iter().zip(&all) {
            let what = format!("{threads} faulting threads, {slices} slices, thousand pages/s");
            row(&what, 1e3 / all[0].mean, 1e3 / figures.mean);
        }
    }

    /// Runs each contender once in each round, in a new thread, so that none inherits an affinity.
    fn alternate<const N: usize>(
        &self,
        contenders: [&(dyn Fn() -> Vec<f64> + Sync); N],
    ) -> [Figures; N] {
        let mut of_rounds: [Vec<Figures>; N] = std::array::from_fn(|_| Vec::new());
        for _ in 0..self.rounds {
            for (run, figures) in contenders.iter().zip(&mut of_rounds) {
                let times = thread::scope(|scope| scope.spawn(run).join().expect("it runs"));
                figures.push(Figures::of(times));
            }
        }
        of_rounds.map(|rounds| {
            let median = |of: fn(&Figures) -> f64| quantile(rounds.iter().map(of).collect(), 0.5);
            Figures { p50: median(|f| f.p50), p99: median(|f| f.p99), mean: median(|f| f.mean) }
        })
    }
}

/// Microseconds.
struct Figures {
    p50: f64,
    p99: f64,
    mean: f64,
}

impl Figures {
    fn of(times: Vec<f64>) -> Figures {
        let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
        Figures { p50: quantile(times.clone(), 0.5), p99: quantile(times, 0.99), mean }
    }
}

fn quantile(mut values: Vec<f64>, at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get((values.len() as f64 * at) as usize).copied().unwrap_or(f64::NAN)
}

fn row(what: &str, bare: f64, ours: f64) {
    println!("{what:<58} {bare:>9.1} {ours:>9.1} {:>6.2}x", ours / bare);
}

fn stamps(pages: usize) -> Vec<u8> {
    support::stamped(pages)
}

fn touch_each(memory: &Memory, pages: usize) -> Vec<f64> {
    let touch = |page: usize| {
        let begin = Instant::now();
        let word = memory.read_u64(page * PAGE);
        let took = begin.elapsed().as_nanos() as f64 / 1e3;
        assert_eq!(word, stamp(page));
        took
    };
    shuffled(pages, 17).into_iter().map(touch).collect()
}

fn touch_all(memory: &Memory, order: &[usize]) {
    for &page in order {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page));
    }
}

/// Microseconds per page.
fn whole(work: impl FnOnce(), pages: usize) -> Vec<f64> {
    let begin = Instant::now();
    work();
    vec![begin.elapsed().as_nanos() as f64 / 1e3 / pages as f64]
}

/// `read` and `UFFDIO_COPY` of one page that is already in memory, in its own thread, and nothing else.
#[derive(Clone, Copy, PartialEq)]
enum Style {
    /// `poll` only if there is nothing to read, which is the fastest way.
    PollsIfEmpty,
    /// `poll` before each read, as in the example of userfaultfd(2) and in other page servers.
    PollsAlways,
}

struct Bare {
    stop: Option<io::PipeWriter>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Bare {
    fn start(memory: &Memory, cpu: usize, style: Style) -> Bare {
        let uffd = Uffd::open(Features::EVENT_REMOVE, Features::NONE).expect("checked in main");
        // SAFETY: the mapping outlives the userfaultfd in all callers, and has no references into it.
        unsafe { uffd.register(memory.addr(), memory.len() as u64) }.expect("anonymous memory");
        let (stopped, stop) = io::pipe().expect("a pipe");
        let (start, content) = (memory.addr(), stamps(memory.len() / PAGE));
        let thread = thread::spawn(move || {
            pin(cpu);
            let mut batch = MessageBatch::new();
            loop {
                let stop = || uffd.wait(stopped.as_fd()).expect("poll") == Wait::Stop;
                if style == Style::PollsAlways && stop() {
                    break;
                }
                uffd.read(&mut batch).expect("read");
                if batch.is_empty() && stop() {
                    break;
                }
                for message in batch.messages() {
                    let Message::Pagefault { address, .. } = message else { continue };
                    let at = (address - start) as usize & !(PAGE - 1);
                    let page = &content[at..at + PAGE];
                    // SAFETY: the fault was in `memory`, which is registered with it.
                    unsafe { uffd.copy(start + at as u64, page) }.expect("UFFDIO_COPY");
                }
            }
        });
        Bare { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the loop does not panic");
        }
    }
}

fn pin(cpu: usize) {
    // SAFETY: all zero bits are an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the benchmark only asks for CPU 0.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the calling thread, and a valid set of that size.
    let result = unsafe { libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}
