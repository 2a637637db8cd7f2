//! Faults of a guest whose snapshot is on a server that answers 20 ms late, through one slice, with an empty cache.
//!
//!     cargo bench -p snapvm-objects --bench faults

#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pager::Populate;
use support::fake::Fate;
use support::guest::Guest;
use support::{Bench, KEY};

const LATENCY: Duration = Duration::from_millis(20);
/// Pages of a block of the cache.
const BLOCK: usize = 64;

fn main() {
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let full = std::env::args().any(|arg| arg == "--bench");
    let faults = if full { 1500 } else { 100 };
    let bench = Bench::start((faults + 32) * BLOCK, LATENCY);
    let file_bytes = std::fs::read(&bench.file).expect("it is there");
    println!("{faults} faults, each on another block of 128 KiB of {KEY}, latency {LATENCY:?}");
    let Some(one) = run(&bench, faults, 1) else { return };
    row("1 thread", &one);
    if let Some(many) = run(&bench, faults, 16) {
        row("16 threads", &many);
        println!("16 threads against 1, pages a second: {:.1} x", many.rate / one.rate);
    }
    bench.fake.put(KEY, file_bytes);
    bench.fake.decide(|number, _| match number % 100 == 50 {
        true => Fate::Late(Duration::from_secs(1)),
        false => Fate::Answer,
    });
    if let Some(slow) = run(&bench, faults, 1) {
        row("1 thread, 1 % of requests take 1 s", &slow);
    }
    if let Some(slow) = run(&bench, faults, 16) {
        row("16 threads, 1 % of requests take 1 s", &slow);
    }
}

struct Measured {
    times: Vec<Duration>,
    rate: f64,
    requests: usize,
}

fn run(bench: &Bench, faults: usize, threads: usize) -> Option<Measured> {
    // A cache of its own.
    static CACHES: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let number = CACHES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let options = bench.options_in(&format!("cache-{number}"));
    let opened = objects::open(&bench.url(), &options).expect("it opens");
    let guest = Guest::start("bench faults", &Arc::new(opened.snapshot), 1, Populate::Off)?;
    // Not one after the other: that would be read ahead.
    let blocks = (8..faults + 8).map(|block| block * BLOCK + BLOCK / 2);
    let pages: Vec<usize> =
        (0..7).flat_map(|start| blocks.clone().skip(start).step_by(7)).collect();
    bench.fake.take_received();
    let begun = Instant::now();
    let mut times = guest.check_all(&bench.memory, &pages, threads);
    let rate = faults as f64 / begun.elapsed().as_secs_f64();
    times.sort_unstable();
    guest.pager.stop();
    Some(Measured { times, rate, requests: bench.fake.take_received().len() })
}

fn row(what: &str, measured: &Measured) {
    let ms = |of: usize| {
        // The smallest time that so many thousandths of the times do not exceed.
        let rank = (measured.times.len() * of).div_ceil(1000).max(1);
        measured.times[rank - 1].as_secs_f64() * 1e3
    };
    println!(
        "{what:<40} p50 {:6.1} ms  p99 {:7.1} ms  p99.9 {:7.1} ms  {:7.0} pages/s  {} requests",
        ms(500),
        ms(990),
        ms(999),
        measured.rate,
        measured.requests
    );
}
