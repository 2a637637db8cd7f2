//! Each kind of failure, at each request of opening a chain and reading a page: the right bytes, or an error that names
//! the object. Never other bytes, and never a wait that is much longer than the patience.

mod support;

use std::time::{Duration, Instant};

use objects::ObjectError;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{PageIndex, Permanent, ReadError};
use support::fake::Fate;
use support::{Bench, chain, push_chain};

const PAGES: usize = 4096;
/// A page in the middle of the base, which opening does not fetch.
const FAR: u32 = PAGES as u32 / 2;
/// Two for the name, which has the ends of the top layer; one for the other layer, two for the base; the page.
const REQUESTS: usize = 6;

/// A chain of three layers with a name, and how to open it with an empty cache.
struct Setup {
    bench: Bench,
    object: String,
}

impl Setup {
    fn new() -> Self {
        let mut bench = Bench::start(PAGES, Duration::ZERO);
        let (object, memory) = push_chain(&bench, 3);
        bench.memory = memory;
        bench.fake.take_received();
        Self { bench, object }
    }

    /// Opens the snapshot with an empty cache and reads a page. The bytes must be right; the error is returned.
    fn open_and_read(&self, path: &str) -> Result<(), String> {
        let started = Instant::now();
        let cache = tempfile::tempdir().expect("a folder");
        let cache = objects::Cache::open(cache.path(), 1 << 30).expect("a cache");
        let options = objects::Options::new(cache).retry(support::impatient());
        let url = self.bench.fake.url(path).parse().expect("an address");
        let read = objects::open(&url, &options).map_err(|error| kind(&error)).and_then(|opened| {
            let mut bytes = [0; PAGE_BYTES];
            let page = PageIndex(FAR);
            let read = opened.snapshot.read_page(page, &mut Default::default(), &mut bytes);
            read.map_err(|error| read_kind(&error))?;
            let at = FAR as usize * PAGE_BYTES;
            assert!(bytes == self.bench.memory[at..at + PAGE_BYTES], "wrong bytes");
            Ok(())
        });
        // The patience is one second, for each of the requests that follow each other.
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        read
    }
}

/// The name of an error's variant. Its text must contain the address.
fn kind(error: &ObjectError) -> String {
    let text = chain(error);
    assert!(text.contains("http://127.0.0.1:"), "no address: {text}");
    if let ObjectError::Snapshot { error, .. } = error {
        return read_kind(error);
    }
    let name = format!("{error:?}");
    name.split([' ', '(', '{']).next().expect("a name").to_owned()
}

fn read_kind(error: &ReadError) -> String {
    match error.root() {
        ReadError::Io { source, .. } => {
            let permanent = source.get_ref().and_then(|inner| inner.downcast_ref::<Permanent>());
            let cause = permanent.and_then(|permanent| {
                permanent.cause().downcast_ref::<std::sync::Arc<ObjectError>>()
            });
            kind(cause.unwrap_or_else(|| panic!("no error of an object: {}", chain(error))))
        }
        ReadError::Corrupt(_) => "Corrupt".to_owned(),
        ReadError::Chain(_) => "Chain".to_owned(),
        ReadError::NotASnapshot { .. } => "NotASnapshot".to_owned(),
        error => panic!("{}", chain(error)),
    }
}

/// From the request with each number on, requests have this fate: one of them, or all.
fn at_each_request(setup: &Setup, path: &str, fate: &Fate, all: bool) -> Vec<Result<(), String>> {
    let results = (0..REQUESTS).map(|failing| {
        let fate = fate.clone();
        setup.bench.fake.decide(move |number, _| {
            match number == failing || all && number > failing {
                true => fate.clone(),
                false => Fate::Answer,
            }
        });
        setup.open_and_read(path)
    });
    results.collect()
}

#[test]
fn what_passes_is_retried_at_each_request() {
    let setup = Setup::new();
    for fate in [
        Fate::Status(408, "RequestTimeout"),
        Fate::Status(425, "TooEarly"),
        Fate::Status(429, "TooManyRequests"),
        Fate::Status(500, "InternalError"),
        Fate::Status(502, "BadGateway"),
        Fate::Status(503, "SlowDown"),
        Fate::Status(504, "GatewayTimeout"),
        Fate::Status(400, "ExpiredToken"),
        Fate::Status(401, "Unauthorized"),
        Fate::Status(403, "AccessDenied"),
        Fate::Reset,
        Fate::Truncate(0),
        Fate::Truncate(10_000),
        Fate::Late(Duration::from_millis(300)),
    ] {
        let results = at_each_request(&setup, "/bucket/guest", &fate, false);
        assert!(results.iter().all(Result::is_ok), "{fate:?}: {results:?}");
    }
}

#[test]
fn what_does_not_pass_is_named_at_each_request() {
    let setup = Setup::new();
    for (fate, kinds) in [
        (Fate::Status(503, "SlowDown"), &["Unavailable"][..]),
        (Fate::Reset, &["Unavailable"]),
        (Fate::Truncate(0), &["Unavailable"]),
        (Fate::Status(403, "AccessDenied"), &["Denied"]),
        (Fate::Status(404, "NoSuchKey"), &["NotFound"]),
        // The first requests for an object have no condition, so that this answer to them has no meaning.
        (Fate::Status(412, "PreconditionFailed"), &["Replaced", "Refused"]),
        (Fate::Status(416, "InvalidRange"), &["WrongLength", "Empty"]),
        (Fate::Status(501, "NotImplemented"), &["Refused"]),
        (Fate::NoRanges, &["NoRanges"]),
        // A name without its first byte is taken for a snapshot.
        (Fate::Flip, &["Corrupt", "NotASnapshot"]),
    ] {
        let results = at_each_request(&setup, "/bucket/guest", &fate, true);
        let named = |result: &Result<(), String>| {
            result.as_ref().is_err_and(|kind| kinds.contains(&kind.as_str()))
        };
        assert!(results.iter().all(named), "{fate:?}: {results:?}");
    }
}

#[test]
fn damage_on_the_way_is_healed_or_named_at_each_request() {
    let setup = Setup::new();
    let results = at_each_request(&setup, "/bucket/guest", &Fate::Flip, false);
    // All but the name have checksums. Of its two answers, which are the same, the one that comes first is used.
    for (number, result) in results.iter().enumerate() {
        let of_name = number < 2 && *result == Err("NotASnapshot".to_owned());
        assert!(result.is_ok() || of_name, "at request {number}: {result:?}");
    }
}

#[test]
fn an_object_that_changes_at_any_request_gives_no_other_bytes() {
    for deleted in [false, true] {
        for failing in 0..REQUESTS {
            let setup = Setup::new();
            let base = snapfmt::Snapshot::open(&setup.bench.file).expect("it opens").header().id;
            let path = format!("/bucket/objects/{base}.snap");
            // Another snapshot of the same length.
            let other = support::memory(PAGES, 5);
            let other = support::write(setup.bench.folder.path(), "other", &other);
            let other = std::fs::read(other).expect("it is there");
            let fake = setup.bench.fake.clone();
            setup.bench.fake.decide(move |number, _| {
                if number == failing {
                    match deleted {
                        true => fake.remove(&path),
                        false => fake.put(&path, other.clone()),
                    }
                    // The answer to this request is already decided, so it is sent again.
                    return Fate::Reset;
                }
                Fate::Answer
            });
            let error = setup.open_and_read("/bucket/guest").expect_err("it is noticed");
            let named: &[&str] = match deleted {
                true => &["NotFound"],
                // A base that was replaced before it was opened is not the one that the name lists.
                false => &["Replaced", "WrongLength", "Chain"],
            };
            assert!(named.contains(&error.as_str()), "at request {failing}: {error}");
        }
    }
}

#[test]
fn the_list_of_parents_is_not_needed_but_its_failures_are_named() {
    let setup = Setup::new();
    let only_list = |fate: Fate| {
        setup.bench.fake.decide(move |_, received| match received.path.ends_with(".layers") {
            true => fate.clone(),
            false => Fate::Answer,
        });
        setup.open_and_read(&setup.object)
    };
    // Without the right to list a bucket, S3 answers 403 for an object that is not there.
    for fate in [Fate::Status(404, "NoSuchKey"), Fate::Status(403, "AccessDenied")] {
        assert_eq!(only_list(fate), Ok(()));
    }
    assert_eq!(only_list(Fate::Status(503, "SlowDown")), Err("Unavailable".to_owned()));
    // It does not begin as a list does, as a page that a web server sends instead of 404.
    assert_eq!(only_list(Fate::Flip), Ok(()));
}

#[test]
fn a_server_that_stops_sending_is_asked_again() {
    let setup = Setup::new();
    let cache = setup.bench.options_in("patient").retry(objects::Retry::default());
    let url = setup.bench.fake.url("/bucket/guest").parse().expect("an address");
    let opened = objects::open(&url, &cache).expect("it opens");
    setup.bench.fake.decide(|number, _| match number {
        0 => Fate::Late(Duration::from_secs(60)),
        _ => Fate::Answer,
    });
    let started = Instant::now();
    setup.bench.check_page(&opened.snapshot, FAR);
    let took = started.elapsed().as_secs_f64();
    assert!((9.0..20.0).contains(&took), "10 s of silence are a failure, not {took} s");
}
