//! What a name has of its object is used for one open only, and the server confirms it before a guest gets a page.

mod support;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use objects::ObjectError;
use snapfmt::Snapshot;
use snapfmt::layout::HEADER_BYTES;
use support::{Bench, chain, memory, push_chain, write};

/// A snapshot of 32 MiB, and one that fits into a block.
const PAGES: usize = 8192;
const FEW_PAGES: usize = 3;
const NAME: &str = "/bucket/guest";

/// The text of a name, and what follows it.
fn parts(name: &[u8]) -> (serde_json::Value, Vec<u8>) {
    let mut texts = serde_json::Deserializer::from_slice(name).into_iter();
    let text = texts.next().expect("a text").expect("JSON");
    (text, name[texts.byte_offset()..].to_vec())
}

fn joined(text: &serde_json::Value, ends: &[u8]) -> Vec<u8> {
    [&serde_json::to_vec_pretty(text).expect("it is JSON")[..], ends].concat()
}

/// CRC-32 as in zlib.
fn crc(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ (0xEDB8_8320 & 0u32.wrapping_sub(crc & 1));
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

/// A snapshot of other memory that claims to be the one in the bench, with the same length.
fn forged(bench: &Bench, pages: usize) -> Vec<u8> {
    let path = write(bench.folder.path(), "forged", &memory(pages, 5));
    let mut bytes = std::fs::read(path).expect("it was written");
    let real = std::fs::read(&bench.file).expect("it was written");
    assert_eq!(bytes.len(), real.len());
    bytes[40..56].copy_from_slice(&real[40..56]);
    let sum = crc(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The name of the bench, with the ends of these bytes and this ETag.
fn forged_name(bench: &Bench, bytes: &[u8], etag: Option<&str>) -> Vec<u8> {
    let (mut text, ends) = parts(&bench.fake.bytes(NAME));
    let sum = &bytes[HEADER_BYTES - 4..HEADER_BYTES];
    text["layers"][0]["header_crc"] = u32::from_le_bytes(sum.try_into().expect("four")).into();
    if let Some(etag) = etag {
        text["ends"]["etag"] = etag.into();
    }
    let tail = &bytes[bytes.len() - (ends.len() - HEADER_BYTES)..];
    joined(&text, &[&bytes[..HEADER_BYTES], tail].concat())
}

fn open(bench: &Bench, path: &str, cache: &str) -> Result<objects::Opened, ObjectError> {
    objects::open(&bench.fake.url(path).parse().expect("an address"), &bench.options_in(cache))
}

#[test]
fn forged_ends_of_a_name_reach_neither_the_address_nor_another_name() {
    for pages in [PAGES, FEW_PAGES] {
        let bench = Bench::start(pages, Duration::ZERO);
        let (object, _) = push_chain(&bench, 1);
        let bytes = forged(&bench, pages);
        bench.fake.put_with(&object, bench.fake.bytes(&object), Some("\"real\"".into()));
        for (etag, reads) in [("\"false\"", false), ("\"false\"", true), ("\"real\"", true)] {
            let cache = format!("{pages} {} {reads}", etag.len());
            bench.fake.put("/bucket/forged", forged_name(&bench, &bytes, Some(etag)));
            // The name is opened before the server is asked for its object, but gives no page.
            let opened = open(&bench, "/bucket/forged", &cache).expect("its ends are whole");
            if reads {
                let error = chain(&bench.fail_page(&opened.snapshot, pages as u32 / 2));
                assert!(error.contains("the object was replaced"), "{etag}: {error}");
            }
            for path in [&object, NAME] {
                let opened = open(&bench, path, &cache);
                let opened = opened.unwrap_or_else(|error| panic!("{etag}: {}", chain(&error)));
                bench.check_page(&opened.snapshot, pages as u32 / 2);
                bench.check_page(&opened.snapshot, 0);
            }
            let url = bench.fake.url(&object).parse().expect("an address");
            let asking = bench.options_in(&cache).asks_server(true);
            let opened = objects::open(&url, &asking).expect("it is there");
            bench.check_page(&opened.snapshot, pages as u32 / 3);
            // Now the cache has the object, and the name is not of that.
            let error = open(&bench, "/bucket/forged", &cache).err().expect("it is refused");
            assert!(matches!(error, ObjectError::Name { .. }), "{}", chain(&error));
        }
    }
}

#[test]
fn a_small_layer_is_requested_before_its_page_is_read() {
    let mut bench = Bench::start(FEW_PAGES, Duration::ZERO);
    let (object, memory) = push_chain(&bench, 1);
    bench.memory = memory;
    let opened = open(&bench, NAME, "cache").expect("it is there");
    bench.check_page(&opened.snapshot, 0);
    assert!(bench.fake.take_received().iter().any(|one| one.path == object));
    bench.fake.remove(&object);
    let opened = open(&bench, NAME, "empty").expect("the name has its ends");
    let error = chain(&bench.fail_page(&opened.snapshot, 0));
    assert!(error.contains("there is no such object"), "{error}");
}

#[test]
fn the_etag_in_a_name_does_not_make_another_snapshot_its_object() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let (object, _) = push_chain(&bench, 1);
    let (text, _) = parts(&bench.fake.bytes(NAME));
    let etag = text["ends"]["etag"].as_str().expect("it has one").to_owned();
    bench.fake.put_with(&object, forged(&bench, PAGES), Some(etag));
    let opened = open(&bench, NAME, "cache").expect("the name has its ends");
    let error = chain(&bench.fail_page(&opened.snapshot, PAGES as u32 / 2));
    assert!(error.contains("the object was replaced"), "{error}");
}

#[test]
fn an_object_that_was_replaced_is_opened_from_the_cache_only_once() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let (object, _) = push_chain(&bench, 1);
    let real = bench.fake.bytes(&object);
    let other = std::fs::read(write(bench.folder.path(), "other", &memory(PAGES, 5)));
    let other = other.expect("it was written");
    for (cache, bytes) in [("same length", other), ("another length", vec![1; 5 << 20])] {
        drop(open(&bench, &object, cache).expect("it is there"));
        bench.fake.put(&object, bytes);
        bench.fake.take_received();
        let opened = open(&bench, &object, cache).expect("it is in the cache");
        assert!(bench.fake.take_received().is_empty());
        bench.fail_page(&opened.snapshot, PAGES as u32 / 2);
        let error = open(&bench, &object, cache).err().expect("the server has another one");
        assert!(
            matches!(error, ObjectError::Name { .. } | ObjectError::Snapshot { .. }),
            "{}",
            chain(&error)
        );
        bench.fake.put(&object, real.clone());
        let opened = open(&bench, &object, cache).expect("it is there again");
        bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    }
}

#[test]
fn a_copy_is_confirmed_although_the_cache_has_dropped_the_header() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let (object, _) = push_chain(&bench, 1);
    drop(open(&bench, &object, "cache").expect("it is there"));
    bench.fake.put(&object, bench.fake.bytes(&object));
    bench.fake.take_received();
    let opened = open(&bench, &object, "cache").expect("it is in the cache");
    assert!(bench.fake.take_received().is_empty());
    for entry in std::fs::read_dir(bench.folder.path().join("cache")).expect("a folder").flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.ends_with(".blocks")) {
            let file = std::fs::File::options().write(true).open(entry.path()).expect("it opens");
            // The state of the first block: it is not there.
            file.write_all_at(&[0], 4096).expect("it is written");
        }
    }
    bench.check_page(&opened.snapshot, PAGES as u32 / 2);
    bench.check_page(&opened.snapshot, 0);
}

#[test]
fn an_object_with_an_id_in_its_key_is_the_snapshot_with_that_id() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let (object, _) = push_chain(&bench, 1);
    let other = write(bench.folder.path(), "other", &memory(PAGES, 5));
    bench.fake.put(&object, std::fs::read(&other).expect("it was written"));
    bench.fake.remove(&object.replace(".snap", ".layers"));
    let url = bench.fake.url(&object).parse().expect("an address");
    for asks in [false, true] {
        let options = bench.options_in(&format!("{asks}")).asks_server(asks);
        let error = objects::open(&url, &options).err().expect("it is refused");
        assert!(chain(&error).contains("another snapshot"), "{}", chain(&error));
    }
    let id = Snapshot::open(&other).expect("it opens").header().id;
    let own = format!("/bucket/objects/{id}.snap");
    bench.fake.put(&own, std::fs::read(&other).expect("it was written"));
    open(&bench, &own, "own").expect("its key is its id");
}

#[test]
fn a_name_with_the_length_of_no_snapshot_is_refused() {
    let bench = Bench::start(FEW_PAGES, Duration::ZERO);
    push_chain(&bench, 1);
    let (mut text, ends) = parts(&bench.fake.bytes(NAME));
    for len_bytes in [0, 4095, 1 << 60, u64::MAX] {
        text["layers"][0]["file_bytes"] = len_bytes.into();
        bench.fake.put(NAME, joined(&text, &ends));
        let error = open(&bench, NAME, "cache").err().expect("it is refused");
        assert!(matches!(error, ObjectError::Name { .. }), "{}", chain(&error));
    }
}
