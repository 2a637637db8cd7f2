//! Faults on memory whose pages are in object storage, through the pager as a guest takes them.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pager::{Pager, Populate, Region, SnapshotSource};
use snapfmt::{Codec, Contents, MemoryRegion, WriteOptions, write_snapshot};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::fake::{BLOCK_BYTES, Fake, Fate};
use crate::{Amount, Bound, LATENCY, LINK, line, quantile};

const KEY: &str = "/bucket/guest.snap";
const THREADS: usize = 16;

pub(crate) fn measure(amount: Amount) {
    let latency = LATENCY.as_secs_f64() * 1e3;
    // Each fault is in another block, and some blocks are in the first answers.
    let blocks = amount.faults as u64 + 16;
    let file = random_snapshot(blocks * BLOCK_BYTES);
    let with_link = Fake::with_link(LATENCY, LINK);
    let without = Fake::start(LATENCY);
    with_link.put(KEY, file.clone());
    without.put(KEY, file);

    let Some((mut times, one)) = faults(&with_link, blocks, 1) else { return };
    line("cold fault, p50", quantile(&mut times, 0.5), "ms", Some(Bound::AtMost(latency + 2.0)));
    line("cold fault, p99", quantile(&mut times, 0.99), "ms", None);
    let Some((_, many)) = faults(&with_link, blocks, THREADS) else { return };
    let what = "faults a second: 16 waiting threads, times those of one";
    line(what, many / one, "x", Some(Bound::AtLeast(12.0)));
    let share = many * BLOCK_BYTES as f64 / LINK as f64 * 100.0;
    line("  share of the link that 16 threads use", share, "%", None);
    let (Some((_, one)), Some((_, many))) =
        (faults(&without, blocks, 1), faults(&without, blocks, THREADS))
    else {
        return;
    };
    let what = "  the same on a link without a limit";
    line(what, many / one, "x", Some(Bound::AtLeast(12.0)));

    // From the 51st request on, one in a hundred.
    with_link.decide(|number, _| match number % 100 {
        50 => Fate::Late(Duration::from_secs(1)),
        _ => Fate::Answer,
    });
    let Some((mut times, _)) = faults(&with_link, blocks, 1) else { return };
    let bound = Bound::AtMost(3.0 * latency);
    line(
        "cold fault with 1 % of the GETs at 1 s, p99",
        quantile(&mut times, 0.99),
        "ms",
        Some(bound),
    );
    println!();
}

/// A snapshot of memory that does not compress.
fn random_snapshot(len_bytes: u64) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut memory = Vec::with_capacity(len_bytes as usize);
    while (memory.len() as u64) < len_bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memory.extend(state.to_le_bytes());
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest.snap");
    let regions = [MemoryRegion { gpa: 0, len: len_bytes, source_offset: 0 }];
    let data = [0..len_bytes];
    let options = WriteOptions::default().codec(Codec::Raw);
    let contents = Contents::new(&regions, &memory, &data);
    write_snapshot(&path, contents, &options, &|_| ControlFlow::Continue(())).unwrap();
    std::fs::read(path).unwrap()
}

/// The milliseconds of each fault, and faults a second: with an empty cache, one in each block, in random order.
fn faults(fake: &Fake, blocks: u64, threads: usize) -> Option<(Vec<f64>, f64)> {
    let cache = tempfile::tempdir().unwrap();
    let cache = objects::Cache::open(cache.path(), 1 << 30).unwrap();
    let url = fake.url(KEY).parse().unwrap();
    let opened = objects::open(&url, &objects::Options::new(cache)).unwrap();
    let memory: GuestMemoryMmap<()> =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (blocks * BLOCK_BYTES) as usize)])
            .unwrap();
    let memory = Arc::new(memory);
    let regions = Region::of_guest_memory(&memory, |_| 0).unwrap();
    let pager = Pager::builder(Arc::new(SnapshotSource::new(Arc::new(opened.snapshot))))
        .regions(regions)
        .populate(Populate::Off)
        .start();
    let pager = match pager {
        Ok(pager) => pager,
        Err(error) => {
            println!("SKIPPED faults: {error}");
            return None;
        }
    };
    // The ends are in the first answers.
    let inner = 5..blocks - 6;
    let count = (inner.end - inner.start) as usize;
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    let times: Vec<f64> = thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut times = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count {
                            return times;
                        }
                        // A step that shares no factor with the count visits each block once.
                        let block = inner.start + (number * step(count) % count) as u64;
                        let at = GuestAddress(block * BLOCK_BYTES + BLOCK_BYTES / 2);
                        let begun = Instant::now();
                        let _: u64 = memory.read_obj(at).unwrap();
                        times.push(begun.elapsed().as_secs_f64() * 1e3);
                    }
                })
            })
            .collect();
        all.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let rate = count as f64 / started.elapsed().as_secs_f64();
    pager.stop();
    Some((times, rate))
}

/// About 0.6 of the count, without a common factor.
fn step(count: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    (count * 5 / 8..).find(|step| gcd(*step, count) == 1).unwrap_or(1).max(1)
}
