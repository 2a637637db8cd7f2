//! One cache for threads, readers and processes: a block is fetched once, and damage to the cache heals.

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use objects::{Cache, Options};
use snapfmt::ReadAt;
use support::fake::{Fate, depth, times_sent};
use support::{Bench, KEY, chain, impatient};

const PAGES: usize = 4096;

/// The file of the one object in the cache. Another file is only locked.
fn cache_file(bench: &Bench) -> PathBuf {
    let names = std::fs::read_dir(bench.folder.path().join("cache")).expect("it is there");
    let mut paths = names.map(|name| name.expect("it can be read").path());
    paths.find(|path| path.extension() == Some("blocks".as_ref())).expect("one object")
}

fn once(bench: &Bench) {
    let received = bench.fake.take_received();
    // The first two answers contain no block that the readers have requested.
    let times = times_sent(&received, KEY);
    let more: Vec<_> = times.iter().filter(|(_, times)| **times > 1).collect();
    assert!(more.is_empty(), "{more:?}: {received:?}");
}

#[test]
fn threads_that_miss_the_same_block_wait_for_one_request() {
    let bench = Bench::start(PAGES, Duration::from_millis(20));
    let opened = bench.open();
    bench.fake.take_received();
    let start = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                bench.check_page(&opened.snapshot, PAGES as u32 / 2);
            });
        }
    });
    assert_eq!(bench.fake.take_received().len(), 1);
}

#[test]
fn readers_with_one_cache_fetch_each_block_once() {
    let bench = Bench::start(PAGES, Duration::from_millis(2));
    let (one, other) = (bench.open(), bench.open());
    bench.fake.take_received();
    thread::scope(|scope| {
        for (number, opened) in [&one, &other].into_iter().enumerate() {
            let bench = &bench;
            scope.spawn(move || {
                for step in 0..PAGES as u32 {
                    // Readers start from the front or from the back.
                    let page = if number == 0 { step } else { PAGES as u32 - 1 - step };
                    bench.check_page(&opened.snapshot, page);
                }
            });
        }
    });
    once(&bench);
}

#[test]
fn announced_ranges_are_fetched_by_parallel_requests() {
    let bench = Bench::start(4 * PAGES, Duration::from_millis(30));
    let opened = bench.open();
    bench.fake.take_received();
    let object = &opened.objects[0];
    object.expect(0..object.len_bytes().unwrap());
    let mut bytes = vec![0; 1 << 20];
    // The read waits for the requests, and sends none again.
    for at in (0..60).map(|at| at << 20) {
        object.read_exact_at(&mut bytes, at).unwrap();
    }
    let received = bench.fake.take_received();
    assert!(received.iter().all(|one| one.range.end - one.range.start <= 2 << 20), "{received:?}");
    assert!(received.len() <= 36, "{} requests", received.len());
    assert!(depth(&received) <= 10, "{received:?}");
    assert!(bench.fake.most_concurrent() >= 4);
}

#[test]
fn a_long_read_has_its_requests_under_way_together() {
    let bench = Bench::start(4 * PAGES, Duration::from_millis(30));
    let opened = bench.open();
    bench.fake.take_received();
    let mut bytes = vec![0; 40 << 20];
    opened.objects[0].read_exact_at(&mut bytes, 2 << 20).unwrap();
    let file = std::fs::read(&bench.file).unwrap();
    assert!(bytes == file[2 << 20..42 << 20]);
    let received = bench.fake.take_received();
    assert_eq!((received.len(), depth(&received)), (5, 1), "{received:?}");
}

#[test]
fn flipped_bytes_in_the_cache_heal() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let opened = bench.open();
    for page in 0..PAGES as u32 {
        bench.check_page(&opened.snapshot, page);
    }
    let path = cache_file(&bench);
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    let mut bytes = vec![0; len as usize - (8 << 10)];
    ReadAt::read_exact_at(&file, &mut bytes, 8 << 10).unwrap();
    // Bytes of the whole object are flipped: header, chunks, index and all sections.
    bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
    let flip = || file.write_all_at(&bytes, 8 << 10).unwrap();
    flip();
    bench.fake.take_received();
    for page in (0..PAGES as u32).step_by(100) {
        bench.check_page(&opened.snapshot, page);
    }
    once(&bench);
    // Opening and verifying must succeed, too.
    flip();
    let opened = bench.open();
    let verified =
        opened.snapshot.verify(2.try_into().unwrap(), &|_| std::ops::ControlFlow::Continue(()));
    verified.unwrap_or_else(|error| panic!("{}", chain(&error)));
}

#[test]
fn a_truncated_or_removed_cache_file_is_no_error() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let opened = bench.open();
    bench.check_page(&opened.snapshot, 0);
    std::fs::remove_file(cache_file(&bench)).unwrap();
    // The reader has the file open.
    bench.check_page(&opened.snapshot, 0);
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    let again = bench.open();
    for len in [4096 + 10, 4096 + 200_000, 0] {
        File::options().write(true).open(cache_file(&bench)).unwrap().set_len(len).unwrap();
        // The read gives neither zeros nor SIGBUS.
        bench.check_page(&again.snapshot, 0);
        let again_too = bench.open();
        for opened in [&opened, &again, &again_too] {
            bench.check_page(&opened.snapshot, PAGES as u32 / 3);
        }
    }
}

#[test]
fn a_cache_smaller_than_the_object_holds_its_limit() {
    let bench = Bench::start(4 * PAGES, Duration::ZERO);
    let limit = 40 << 20;
    let cache = Cache::open(bench.folder.path().join("small"), limit).unwrap();
    let options = Options::new(cache).retry(impatient());
    let opened = objects::open(&bench.url(), &options).unwrap();
    for round in 0..2 {
        for page in 0..4 * PAGES as u32 {
            bench.check_page(&opened.snapshot, page);
        }
        let listed = options.cache.list().unwrap();
        let cached = listed[0].cached_bytes;
        // Each process checks the size every 32 MiB.
        assert!(cached <= limit + (32 << 20), "{cached} bytes in round {round}");
        assert!(listed[0].in_use);
    }
    drop(opened);
    options.cache.prune(limit).unwrap();
    assert!(options.cache.list().unwrap().iter().map(|c| c.cached_bytes).sum::<u64>() <= limit);
}

#[test]
fn a_request_of_a_stopped_reader_does_not_stop_the_others() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let (one, other) = (bench.open(), bench.open());
    bench.fake.take_received();
    // The first request is late; the second reader looks at the cache meanwhile.
    bench.fake.decide(|number, _| match number {
        0 => Fate::Late(Duration::from_secs(3)),
        _ => Fate::Answer,
    });
    thread::scope(|scope| {
        scope.spawn(|| bench.check_page(&one.snapshot, PAGES as u32 / 2));
        thread::sleep(Duration::from_millis(100));
        // This is another block.
        let started = Instant::now();
        bench.check_page(&other.snapshot, PAGES as u32 / 3);
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        bench.check_page(&other.snapshot, PAGES as u32 / 2);
    });
    assert_eq!(bench.fake.take_received().len(), 2);
}
