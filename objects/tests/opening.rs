//! How many requests it takes to open a snapshot and to read of it, and how many of them follow each other.

mod support;

use std::time::{Duration, Instant};

use snapfmt::{ChunkBuffer, PageIndex};
use support::fake::{Fake, depth, times_sent};
use support::{Bench, KEY};

const LATENCY: Duration = Duration::from_millis(20);
/// A snapshot of 32 MiB.
const PAGES: usize = 8192;

#[test]
fn the_first_page_is_two_round_trips_away() {
    let bench = Bench::start(PAGES, LATENCY);
    let started = Instant::now();
    let opened = bench.open();
    let opening = started.elapsed();
    let asked = bench.fake.take_asked();
    assert_eq!((asked.len(), depth(&asked)), (2, 1), "{asked:?}");
    // In the middle of the file, far from what came with the first answers.
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    let first_page = started.elapsed();
    let more = bench.fake.take_asked();
    assert_eq!((more.len(), depth(&more)), (1, 1), "{more:?}");
    eprintln!("at a latency of {LATENCY:?}: open {opening:?}, first page {first_page:?}");
    // All requests after the first name what they are for.
    assert!(more[0].if_match.is_some() && asked.iter().all(|one| one.if_match.is_none()));
}

#[test]
fn a_page_at_the_front_needs_no_further_request() {
    let bench = Bench::start(PAGES, LATENCY);
    let opened = bench.open();
    bench.check_page(&opened.snapshot, 0);
    assert_eq!(bench.fake.take_asked().len(), 2);
}

#[test]
fn an_object_that_is_cached_is_opened_with_one_request_without_a_body() {
    let bench = Bench::start(PAGES, LATENCY);
    drop(bench.open());
    bench.fake.take_asked();
    let opened = bench.open();
    bench.check_page(&opened.snapshot, 0);
    let asked = bench.fake.take_asked();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].method, "HEAD");
}

#[test]
fn a_small_object_is_opened_too() {
    let bench = Bench::start(3, Duration::ZERO);
    let opened = bench.open();
    for page in 0..3 {
        bench.check_page(&opened.snapshot, page);
    }
    assert_eq!(bench.fake.take_asked().len(), 2);
}

#[test]
fn reading_in_order_is_not_bound_by_the_latency() {
    // 20 MB/s for each connection: four of them are 80 MB/s.
    let bench = Bench::with(PAGES, Fake::with_rate(LATENCY, Some(20 << 20)));
    let opened = bench.open();
    bench.fake.take_asked();
    let started = Instant::now();
    let mut buffer = ChunkBuffer::new();
    for page in 0..PAGES as u32 {
        let found = opened.snapshot.page(PageIndex(page), &mut buffer).unwrap().unwrap();
        assert!(found == &bench.memory[page as usize * 4096..(page as usize + 1) * 4096]);
    }
    let took = started.elapsed();
    let asked = bench.fake.take_asked();
    assert!(times_sent(&asked, KEY).values().all(|times| *times == 1), "{asked:?}");
    assert!(bench.fake.most_concurrent() >= 3, "{}", bench.fake.most_concurrent());
    // Block by block it would be 128 latencies, and 1.6 s of one connection's rate.
    assert!(asked.len() < 20, "{} requests", asked.len());
    eprintln!("32 MiB in order in {took:?} with {} requests", asked.len());
}
