//! How many requests it takes to open a snapshot and to read of it, and how many of them follow each other.

mod support;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use objects::ObjectError;
use snapfmt::{ChunkBuffer, PageIndex, Snapshot};
use support::fake::{Fake, Fate, depth, times_sent};
use support::{Bench, KEY, push_chain};

/// Long: a request that begins after the end of another is taken for dependent on it, and this machine may be busy.
const LATENCY: Duration = Duration::from_millis(200);
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
    // Block by block it would be 256 latencies, and 1.6 s of one connection's rate.
    assert!(received.len() < 40, "{} requests", received.len());
    eprintln!("32 MiB in order in {took:?} with {} requests", received.len());
}

#[test]
fn eight_layers_are_three_round_trips_away_from_a_page() {
    let mut bench = Bench::start(PAGES, LATENCY);
    let (object, memory) = push_chain(&bench, 8);
    bench.memory = memory;
    // Both the name and the list beside the object give all layers: one is in two answers, the other in one. The name
    // also has the ends of the top one. The base takes two requests, each other layer one, and the page one more.
    for (path, listing) in [("/bucket/guest", 2), (&object, 1)] {
        bench.fake.take_received();
        let url = bench.fake.url(path).parse().unwrap();
        let options = bench.options_in(&format!("cache-{listing}"));
        let opened = objects::open(&url, &options).unwrap();
        assert_eq!(opened.snapshot.headers().len(), 8);
        bench.check_page(&opened.snapshot, PAGES as u32 / 2);
        let received = bench.fake.take_received();
        let of_top = if path == object { 2 } else { 0 };
        let count = listing + of_top + 6 + 2 + 1;
        assert_eq!((received.len(), depth(&received)), (count, 3), "{received:?}");
        for layer in 1..8 {
            bench.check_page(&opened.snapshot, layer * 100);
        }
        if path != object {
            // The name gives the lengths, so no block is in two answers.
            let layers = received.iter().filter(|one| one.path.ends_with(".snap"));
            let paths: HashSet<_> = layers.map(|one| one.path.as_str()).collect();
            let mut all = received.clone();
            all.extend(bench.fake.take_received());
            for path in paths {
                let times = times_sent(&all, path);
                assert!(times.values().all(|times| *times == 1), "{path}: {times:?}");
            }
        }
    }
}

#[test]
fn a_page_is_two_round_trips_away_from_a_name() {
    let mut bench = Bench::start(PAGES, LATENCY);
    let (object, memory) = push_chain(&bench, 1);
    bench.memory = memory;
    let url = bench.fake.url("/bucket/guest").parse().unwrap();
    let opened = objects::open(&url, &bench.options()).unwrap();
    // The server is asked for the object only when a page is read. Its ETag is another one than when it was pushed.
    assert!(bench.fake.take_received().iter().all(|one| one.path == "/bucket/guest"));
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    let first = bench.fake.take_received();
    // One of the two requests is for the header, which shows that it is the same object.
    assert_eq!((first.len(), depth(&first)), (2, 1), "{first:?}");
    assert!(first.iter().all(|one| one.path == object && one.if_match.is_none()), "{first:?}");
    bench.check_page(&opened.snapshot, PAGES as u32 / 3);
    assert!(bench.fake.take_received()[0].if_match.is_some());
    // The cache has only what the server has sent, which is not enough to open the object by its address.
    objects::open(&bench.fake.url(&object).parse().unwrap(), &bench.options()).unwrap();
    assert!(bench.fake.take_received().iter().any(|one| one.path == object));
    // With `asks_server`, the ends in the name are not used.
    let asking = bench.options_in("asking").asks_server(true);
    let opened = objects::open(&url, &asking).unwrap();
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    let received = bench.fake.take_received();
    assert_eq!(depth(&received), 3, "{received:?}");
}

#[test]
fn another_snapshot_in_place_of_the_one_in_a_name_gives_no_page() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let (object, _) = push_chain(&bench, 1);
    let url = bench.fake.url("/bucket/guest").parse().unwrap();
    let other = support::write(bench.folder.path(), "other", &support::memory(PAGES, 5));
    bench.fake.put(&object, std::fs::read(other).unwrap());
    let opened = objects::open(&url, &bench.options_in("same length")).unwrap();
    let error = support::chain(&bench.fail_page(&opened.snapshot, PAGES as u32 / 2));
    assert!(error.contains("the object was replaced"), "{error}");
    bench.fake.put(&object, vec![1; 5 << 20]);
    let opened = objects::open(&url, &bench.options_in("another length")).unwrap();
    let error = support::chain(&bench.fail_page(&opened.snapshot, PAGES as u32 / 2));
    assert!(error.contains("length") || error.contains("bytes long"), "{error}");
    bench.fake.remove(&object);
    let opened = objects::open(&url, &bench.options_in("deleted")).unwrap();
    let error = support::chain(&bench.fail_page(&opened.snapshot, PAGES as u32 / 2));
    assert!(error.contains("there is no such object"), "{error}");
}

#[test]
fn a_name_that_is_given_to_another_snapshot_is_of_one_of_the_two() {
    let mut bench = Bench::start(PAGES, Duration::ZERO);
    let (_, memory) = push_chain(&bench, 1);
    let old = bench.fake.bytes("/bucket/guest");
    let (_, newer) = push_chain(&bench, 2);
    let new = bench.fake.bytes("/bucket/guest");
    bench.fake.put("/bucket/guest", old);
    let url = bench.fake.url("/bucket/guest").parse().unwrap();
    // Opened before it is given to another one: all pages are those of the first.
    let opened = objects::open(&url, &bench.options_in("before")).unwrap();
    bench.fake.put("/bucket/guest", new.clone());
    bench.memory = memory;
    bench.check_page(&opened.snapshot, 100);
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    // Between the answers to its two requests.
    let old = bench.fake.bytes("/bucket/guest");
    let (fake, given) = (bench.fake.clone(), std::sync::atomic::AtomicBool::new(false));
    bench.fake.put("/bucket/guest", old);
    bench.fake.decide(move |number, received| {
        let is_second = received.path == "/bucket/guest" && number == 1;
        if is_second && !given.swap(true, std::sync::atomic::Ordering::SeqCst) {
            fake.put("/bucket/guest", new.clone());
        }
        Fate::Answer
    });
    let opened = objects::open(&url, &bench.options_in("between")).unwrap();
    bench.memory = newer;
    bench.check_page(&opened.snapshot, 100);
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
}

#[test]
fn a_name_without_ends_or_with_wrong_ones_is_opened_with_those_of_the_object() {
    let mut bench = Bench::start(PAGES, Duration::ZERO);
    let (_, memory) = push_chain(&bench, 1);
    bench.memory = memory;
    let name = bench.fake.bytes("/bucket/guest");
    let text_bytes =
        name.windows(3).position(|three| three == b"\n}\x89").expect("its text ends") + 2;
    let text = String::from_utf8(name[..text_bytes].to_vec()).expect("UTF-8");
    let ends = text.find(",\n  \"ends\"").expect("it has ends");
    let old = format!("{}\n}}", &text[..ends]).replace("\"snap_name\": 2", "\"snap_name\": 1");
    let mut damaged = name.clone();
    let last = damaged.len() - 100;
    damaged[last] ^= 1;
    damaged[text_bytes + 50] ^= 1;
    for (what, content) in [("old", old.clone().into_bytes()), ("damaged", damaged)] {
        bench.fake.put("/bucket/guest", content);
        let url = bench.fake.url("/bucket/guest").parse().unwrap();
        let opened = objects::open(&url, &bench.options_in(what));
        let opened = opened.unwrap_or_else(|error| panic!("{what}: {}", support::chain(&error)));
        bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    }
    let mut longer = name.clone();
    longer.push(0);
    let shorter = name[..name.len() - 1].to_vec();
    for (what, content) in [("longer", longer), ("shorter", shorter)] {
        bench.fake.put("/bucket/guest", content);
        let url = bench.fake.url("/bucket/guest").parse().unwrap();
        let error = objects::open(&url, &bench.options_in(what)).err().expect(what);
        assert!(matches!(error, ObjectError::Name { .. }), "{}", support::chain(&error));
    }
}

#[test]
fn the_layers_of_a_long_chain_are_not_all_requested_together() {
    let bench = Bench::start(PAGES, Duration::from_millis(50));
    push_chain(&bench, 80);
    let url = bench.fake.url("/bucket/guest").parse().unwrap();
    let opened = objects::open(&url, &bench.options()).unwrap();
    assert_eq!(opened.snapshot.headers().len(), 80);
    // 32 layers, and both ends of the base.
    let most = bench.fake.most_concurrent();
    assert!((16..=33).contains(&most), "{most}");
}

#[test]
fn a_chain_without_a_list_is_opened_layer_by_layer() {
    let mut bench = Bench::start(PAGES, LATENCY);
    let (object, memory) = push_chain(&bench, 8);
    bench.memory = memory;
    bench.fake.remove(&object.replace(".snap", ".layers"));
    bench.fake.take_received();
    let url = bench.fake.url(&object).parse().unwrap();
    let opened = objects::open(&url, &bench.options()).unwrap();
    bench.check_page(&opened.snapshot, 300);
    let received = bench.fake.take_received();
    assert_eq!(depth(&received), 8, "{received:?}");
}

#[test]
fn objects_with_an_id_are_opened_from_the_cache_without_a_request() {
    let mut bench = Bench::start(PAGES, Duration::ZERO);
    let (object, memory) = push_chain(&bench, 8);
    bench.memory = memory;
    // Only the two requests for the name itself are left.
    for (path, count) in [("/bucket/guest", 2), (&object, 0)] {
        let url = bench.fake.url(path).parse().unwrap();
        objects::open(&url, &bench.options()).unwrap();
        bench.fake.take_received();
        let opened = objects::open(&url, &bench.options()).unwrap();
        bench.check_page(&opened.snapshot, 300);
        let received = bench.fake.take_received();
        assert_eq!((received.len(), opened.snapshot.headers().len()), (count, 8), "{received:?}");
    }
    // Of a deleted object, the cache is all that is left.
    let base = Snapshot::open(&bench.file).unwrap().header().id;
    bench.fake.remove(&format!("/bucket/objects/{base}.snap"));
    let url = bench.fake.url(&object).parse().unwrap();
    objects::open(&url, &bench.options()).unwrap();
    let asking = bench.options().asks_server(true);
    let error = objects::open(&url, &asking).err().expect("it is missed");
    assert!(matches!(error, ObjectError::NotFound { .. }), "{}", support::chain(&error));
}

#[test]
fn a_list_that_is_wrong_is_named() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let (object, _) = push_chain(&bench, 8);
    let list = object.replace(".snap", ".layers");
    let right = std::fs::read(bench.folder.path().join(list.trim_start_matches('/'))).unwrap();
    let right = String::from_utf8(right).unwrap();
    let id = &object[object.len() - 41..object.len() - 5];
    let crc = right.find("header_crc\": ").unwrap() + 13;
    for wrong in [
        "{ not a list".to_owned(),
        right.replace(id, "0190b3a2-5c1e-7d5f-8a60-123456789abc"),
        format!("{}1{}", &right[..crc], &right[crc..]),
    ] {
        bench.fake.put(&list, wrong.clone());
        let url = bench.fake.url(&object).parse().unwrap();
        let cache = tempfile::tempdir().unwrap();
        let cache = objects::Cache::open(cache.path(), 1 << 30).unwrap();
        let options = objects::Options::new(cache).retry(support::impatient());
        let error = objects::open(&url, &options).err().expect(&wrong);
        let ObjectError::Name { url, .. } = &error else { panic!("{}", support::chain(&error)) };
        assert!(url.ends_with(&list), "{url}");
    }
}

#[test]
fn a_layer_of_another_length_than_its_name_gives_is_named() {
    for change in [-4096, 4096] {
        let bench = Bench::start(PAGES, Duration::ZERO);
        push_chain(&bench, 8);
        let base = Snapshot::open(&bench.file).unwrap().header().id;
        let mut bytes = std::fs::read(&bench.file).unwrap();
        bytes.resize((bytes.len() as i64 + change) as usize, 0);
        bench.fake.put(&format!("/bucket/objects/{base}.snap"), bytes);
        let url = bench.fake.url("/bucket/guest").parse().unwrap();
        let error = objects::open(&url, &bench.options()).err().expect("it is refused");
        assert!(matches!(error, ObjectError::WrongLength { .. }), "{}", support::chain(&error));
    }
}

#[test]
fn an_object_with_an_id_may_be_replaced_by_its_copy_but_by_nothing_else() {
    let mut bench = Bench::start(PAGES, Duration::ZERO);
    let (object, memory) = push_chain(&bench, 8);
    bench.memory = memory;
    let url = bench.fake.url(&object).parse().unwrap();
    let opened = objects::open(&url, &bench.options()).unwrap();
    let base = Snapshot::open(&bench.file).unwrap().header().id;
    let (base, mut bytes) =
        (format!("/bucket/objects/{base}.snap"), std::fs::read(&bench.file).unwrap());
    bench.fake.put(&base, bytes.clone());
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    bytes[100] ^= 1;
    bench.fake.put(&base, bytes);
    let error = bench.fail_page(&opened.snapshot, PAGES as u32 / 3);
    assert!(
        support::chain(&error).contains("the object was replaced"),
        "{}",
        support::chain(&error)
    );
}

#[test]
fn a_server_whose_etags_always_differ_is_not_asked_without_end() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let (object, _) = push_chain(&bench, 1);
    let opened = objects::open(&bench.fake.url(&object).parse().unwrap(), &bench.options());
    let opened = opened.unwrap();
    let (fake, bytes) = (bench.fake.clone(), std::fs::read(&bench.file).unwrap());
    let key = object.clone();
    bench.fake.decide(move |_, _| {
        fake.put(&key, bytes.clone());
        Fate::Answer
    });
    // This request is answered before the object is replaced for the first time.
    bench.check_page(&opened.snapshot, PAGES as u32 / 3);
    let error = support::chain(&bench.fail_page(&opened.snapshot, PAGES as u32 / 2));
    assert!(error.contains("the object was replaced"), "{error}");
}
