//! How many requests it takes to open a snapshot and to read of it, and how many of them follow each other.

mod support;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use snapfmt::{ChunkBuffer, PageIndex, Snapshot};
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
    let received = bench.fake.take_received();
    assert_eq!((received.len(), depth(&received)), (2, 1), "{received:?}");
    // This page is in the middle of the file, which the first answers do not contain.
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    let first_page = started.elapsed();
    let more = bench.fake.take_received();
    assert_eq!((more.len(), depth(&more)), (1, 1), "{more:?}");
    eprintln!("at a latency of {LATENCY:?}: open {opening:?}, first page {first_page:?}");
    // All requests after the first contain the ETag.
    assert!(more[0].if_match.is_some() && received.iter().all(|one| one.if_match.is_none()));
}

#[test]
fn a_page_at_the_front_needs_no_further_request() {
    let bench = Bench::start(PAGES, LATENCY);
    let opened = bench.open();
    bench.check_page(&opened.snapshot, 0);
    assert_eq!(bench.fake.take_received().len(), 2);
}

#[test]
fn an_object_that_is_cached_is_opened_with_one_request_without_a_body() {
    let bench = Bench::start(PAGES, LATENCY);
    drop(bench.open());
    bench.fake.take_received();
    let opened = bench.open();
    bench.check_page(&opened.snapshot, 0);
    let received = bench.fake.take_received();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].method, "HEAD");
}

#[test]
fn a_small_object_is_opened_too() {
    let bench = Bench::start(3, Duration::ZERO);
    let opened = bench.open();
    for page in 0..3 {
        bench.check_page(&opened.snapshot, page);
    }
    assert_eq!(bench.fake.take_received().len(), 2);
}

#[test]
fn reading_in_order_is_not_bound_by_the_latency() {
    // 20 MB/s for each connection: four of them are 80 MB/s.
    let bench = Bench::with(PAGES, Fake::with_rate(LATENCY, Some(20 << 20)));
    let opened = bench.open();
    bench.fake.take_received();
    let started = Instant::now();
    let mut buffer = ChunkBuffer::new();
    for page in 0..PAGES as u32 {
        let found = opened.snapshot.page(PageIndex(page), &mut buffer).unwrap().unwrap();
        assert!(found == &bench.memory[page as usize * 4096..(page as usize + 1) * 4096]);
    }
    let took = started.elapsed();
    let received = bench.fake.take_received();
    assert!(times_sent(&received, KEY).values().all(|times| *times == 1), "{received:?}");
    assert!(bench.fake.most_concurrent() >= 3, "{}", bench.fake.most_concurrent());
    // Block by block it would be 128 latencies, and 1.6 s of one connection's rate.
    assert!(received.len() < 20, "{} requests", received.len());
    eprintln!("32 MiB in order in {took:?} with {} requests", received.len());
}

/// A base and seven layers on it, each of which has changed one page, and the name of the last.
fn push_chain(bench: &Bench) -> (String, Vec<u8>) {
    let mut memory = bench.memory.clone();
    let mut files = vec![bench.file.clone()];
    for number in 1..8u8 {
        let page = usize::from(number) * 100 * 4096;
        memory[page..page + 4096].fill(number);
        let (parent, file) =
            (&files[files.len() - 1], bench.folder.path().join(format!("{number}")));
        support::write_on(parent, &file, &memory, page as u64);
        files.push(file);
    }
    let bucket = bench.folder.path().join("bucket");
    let name = format!("file://{}/guest", bucket.display()).parse().unwrap();
    let top = Snapshot::open(&files[7]).unwrap();
    let proceed = |_| ControlFlow::Continue(());
    objects::push(&top, &name, false, support::impatient(), &proceed).unwrap();
    for entry in std::fs::read_dir(bucket.join("objects")).unwrap().flatten() {
        let path = format!("/bucket/objects/{}", entry.file_name().to_str().unwrap());
        bench.fake.put(&path, std::fs::read(entry.path()).unwrap());
    }
    bench.fake.put("/bucket/guest", std::fs::read(bucket.join("guest")).unwrap());
    (format!("/bucket/objects/{}.snap", top.header().id), memory)
}

#[test]
fn a_name_of_eight_layers_is_three_round_trips_away_from_a_page() {
    let mut bench = Bench::start(PAGES, LATENCY);
    let (object, memory) = push_chain(&bench);
    bench.memory = memory;
    bench.fake.take_received();
    let name = bench.fake.url("/bucket/guest").parse().unwrap();
    let opened = objects::open(&name, &bench.options()).unwrap();
    assert_eq!(opened.snapshot.headers().len(), 8);
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    let received = bench.fake.take_received();
    assert_eq!((received.len(), depth(&received)), (2 + 16 + 1, 3), "{received:?}");
    for layer in 1..8 {
        bench.check_page(&opened.snapshot, layer * 100);
    }
    // Without the name, each layer gives the id of its parent.
    let object = bench.fake.url(&object).parse().unwrap();
    let opened = objects::open(&object, &bench.options_in("empty")).unwrap();
    bench.check_page(&opened.snapshot, 300);
    let received = bench.fake.take_received();
    assert_eq!(depth(&received), 8, "{received:?}");
}
