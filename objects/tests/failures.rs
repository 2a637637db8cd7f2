//! Readers of a store that fails get the right bytes, or an error with the object's address.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use objects::ObjectError;
use snapfmt::{Permanent, ReadAt, ReadError};
use support::fake::{Fate, Received, times_sent};
use support::{Bench, KEY, chain};

const PAGES: usize = 4096;
/// A page in the middle of the file, which opening does not fetch.
const FAR: u32 = PAGES as u32 / 2;

/// The object's error inside of a read error.
#[track_caller]
fn object_error(error: &ReadError) -> &ObjectError {
    let ReadError::Io { source, .. } = error.root() else { panic!("{}", chain(error)) };
    assert!(Permanent::is_in(source), "the layer below has tried: {}", chain(error));
    let permanent: &Permanent =
        source.get_ref().and_then(|inner| inner.downcast_ref()).expect("it is permanent");
    let cause: &Arc<ObjectError> = permanent.cause().downcast_ref().expect("an object's error");
    cause
}

/// Each request in turn fails once in this way; all reads must succeed.
fn passes(bench: &Bench, what: &str, fate: impl Fn() -> Fate + Send + Sync + Copy + 'static) {
    for failing in 0..3 {
        bench.fake.take_received();
        bench.fake.decide(move |number, _| match number == failing {
            true => fate(),
            false => Fate::Answer,
        });
        let options = bench.options_in(&format!("{what} {failing}"));
        let opened = objects::open(&bench.url(), &options);
        let opened = opened.unwrap_or_else(|error| panic!("{what}: {}", chain(&error)));
        bench.check_page(&opened.snapshot, FAR);
        let received = bench.fake.take_received();
        assert_eq!(received.len(), 4, "{what} of request {failing}: {received:?}");
    }
}

#[test]
fn temporary_errors_are_retried() {
    let bench = &Bench::start(PAGES, Duration::ZERO);
    passes(bench, "503", || Fate::Status(503, "SlowDown"));
    passes(bench, "500", || Fate::Status(500, "InternalError"));
    passes(bench, "429", || Fate::Status(429, "TooManyRequests"));
    passes(bench, "408", || Fate::Status(408, "RequestTimeout"));
    passes(bench, "a reset", || Fate::Reset);
}

#[test]
fn an_answer_that_breaks_off_is_continued_where_it_broke_off() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    passes(&bench, "a short body", || Fate::Truncate(100_000));
    bench.fake.decide(|_, _| Fate::Answer);
    let opened = bench.open();
    bench.fake.take_received();
    bench.fake.decide(|number, _| if number == 0 { Fate::Truncate(100_000) } else { Fate::Answer });
    bench.check_page(&opened.snapshot, FAR);
    let received = bench.fake.take_received();
    assert_eq!(received[1].range.start, received[0].range.start + 100_000, "{received:?}");
}

#[test]
fn an_outage_longer_than_the_patience_is_named() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let opened = bench.open();
    bench.fake.decide(|_, _| Fate::Status(503, "SlowDown"));
    let started = Instant::now();
    let error = bench.fail_page(&opened.snapshot, FAR);
    let took = started.elapsed();
    assert!((0.7..3.0).contains(&took.as_secs_f64()), "{took:?}");
    assert!(matches!(object_error(&error), ObjectError::Unavailable { attempts: 5.., .. }));
    let text = chain(&error);
    assert!(text.contains("HTTP 503: SlowDown") && text.contains(KEY), "{text}");
    // A read waits for the end of a shorter outage. A failed read may succeed later.
    bench.fake.decide(|number, _| match number < 5 {
        true => Fate::Reset,
        false => Fate::Answer,
    });
    bench.check_page(&opened.snapshot, FAR);
}

#[test]
fn a_server_that_cannot_be_reached_is_named() {
    let bench = Bench::start(3, Duration::ZERO);
    // No server listens at this port.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{free}/guest.snap").parse().unwrap();
    let error = objects::open(&url, &bench.options()).err().expect("it fails");
    let text = chain(&error);
    assert!(matches!(error, ObjectError::Unavailable { .. }), "{text}");
    assert!(text.contains("cannot connect") && text.contains("refused"), "{text}");
}

#[test]
fn an_object_that_is_not_there_or_deleted_is_named_without_a_wait() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let url = bench.fake.url("/bucket/other.snap").parse().unwrap();
    let error = objects::open(&url, &bench.options()).err().expect("it fails");
    assert!(matches!(error, ObjectError::NotFound { .. }), "{}", chain(&error));
    let opened = bench.open();
    bench.fake.remove(KEY);
    let started = Instant::now();
    let error = bench.fail_page(&opened.snapshot, FAR);
    assert!(matches!(object_error(&error), ObjectError::NotFound { .. }));
    assert!(started.elapsed() < Duration::from_millis(500));
}

#[test]
fn an_object_that_is_replaced_under_a_reader_is_named() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let opened = bench.open();
    let other = support::write(bench.folder.path(), "other.snap", &support::memory(PAGES, 5));
    let other = std::fs::read(other).unwrap();
    bench.fake.put(KEY, other.clone());
    let error = bench.fail_page(&opened.snapshot, FAR);
    let ObjectError::Replaced { url, expected, .. } = object_error(&error) else {
        panic!("{}", chain(&error));
    };
    assert_eq!((url, expected.as_str()), (&bench.url().to_string(), "\"etag-0\""));
    // Cached blocks stay readable.
    bench.check_page(&opened.snapshot, 0);

    // It is replaced between the two requests of opening; the second try sees one object.
    let fake = bench.fake.clone();
    let first = AtomicUsize::new(0);
    let original = std::fs::read(&bench.file).unwrap();
    bench.fake.decide(move |_, received| {
        if received.range.start > 0 && first.fetch_add(1, Ordering::SeqCst) == 0 {
            fake.put(KEY, original.clone());
            return Fate::Status(503, "SlowDown");
        }
        Fate::Answer
    });
    let opened = objects::open(&bench.url(), &bench.options_in("empty")).expect("it opens");
    bench.check_page(&opened.snapshot, FAR);
}

#[test]
fn a_server_that_ignores_conditions_is_detected() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    // A weak ETag is not sent as a condition, so only the answers show it.
    let bytes = std::fs::read(&bench.file).unwrap();
    bench.fake.put_with(KEY, bytes.clone(), Some("W/\"weak\"".into()));
    let opened = bench.open();
    bench.check_page(&opened.snapshot, FAR);
    bench.fake.put_with(KEY, bytes.clone(), Some("W/\"other\"".into()));
    let error = bench.fail_page(&opened.snapshot, FAR + 300);
    let ObjectError::Replaced { expected, found, .. } = object_error(&error) else {
        panic!("{}", chain(&error));
    };
    assert_eq!((expected.as_str(), found.as_deref()), ("W/\"weak\"", Some("W/\"other\"")));
    // The object has the same ETag and another length.
    bench.fake.put_with(KEY, &bytes[..bytes.len() - 4096], Some("W/\"weak\"".into()));
    let error = bench.fail_page(&opened.snapshot, FAR + 300);
    assert!(matches!(object_error(&error), ObjectError::WrongLength { .. }), "{}", chain(&error));
}

#[test]
fn credentials_are_read_again_once() {
    let bench = &Bench::start(PAGES, Duration::ZERO);
    passes(bench, "403", || Fate::Status(403, "AccessDenied"));
    passes(bench, "401", || Fate::Status(401, "Unauthorized"));
    passes(bench, "an expired token", || Fate::Status(400, "ExpiredToken"));
    bench.fake.decide(|_, _| Fate::Answer);
    let opened = bench.open();
    bench.fake.take_received();
    bench.fake.decide(|_, _| Fate::Status(403, "AccessDenied"));
    let error = bench.fail_page(&opened.snapshot, FAR);
    assert!(matches!(object_error(&error), ObjectError::Denied { status: 403, .. }));
    assert_eq!(bench.fake.take_received().len(), 2);
    // The body of the answer may hold anything.
    assert!(!chain(&error).contains("hunter2"), "{}", chain(&error));
}

#[test]
fn servers_and_objects_that_cannot_be_read_safely_are_refused() {
    let refused = |prepare: &dyn Fn(&Bench)| {
        let bench = Bench::start(PAGES, Duration::ZERO);
        prepare(&bench);
        objects::open(&bench.url(), &bench.options()).err().expect("it is refused")
    };
    let error = refused(&|bench| bench.fake.put_with(KEY, vec![1; 9000], None));
    assert!(matches!(error, ObjectError::NoEtag { .. }), "{}", chain(&error));
    let error = refused(&|bench| bench.fake.decide(|_, _| Fate::NoRanges));
    assert!(matches!(error, ObjectError::NoRanges { .. }), "{}", chain(&error));
    let error = refused(&|bench| bench.fake.put(KEY, Vec::new()));
    assert!(matches!(error, ObjectError::Empty { .. }), "{}", chain(&error));
    let error = refused(&|bench| bench.fake.put(KEY, vec![1; 900_000]));
    assert!(matches!(error, ObjectError::Snapshot { .. }), "{}", chain(&error));
    let error = refused(&|bench| bench.fake.put(KEY, "{ not a name"));
    assert!(matches!(error, ObjectError::Name { .. }), "{}", chain(&error));
    let error = refused(&|bench| bench.fake.decide(|_, _| Fate::Status(501, "NotImplemented")));
    assert!(matches!(error, ObjectError::Refused { status: Some(501), .. }), "{}", chain(&error));
}

#[test]
fn damage_in_the_bucket_is_damage_after_one_more_fetch() {
    let bench = Bench::start(PAGES, Duration::ZERO);
    let opened = bench.open();
    // The ETag is the same and bytes differ. No store does that, but a broken proxy may.
    let mut bytes = std::fs::read(&bench.file).unwrap();
    for byte in &mut bytes[4 << 20..12 << 20] {
        *byte ^= 1;
    }
    bench.fake.put_with(KEY, bytes, Some("\"etag-0\"".into()));
    bench.fake.take_received();
    let error = bench.fail_page(&opened.snapshot, FAR);
    assert!(matches!(error, ReadError::Corrupt(_)), "{}", chain(&error));
    let received: Vec<Received> = bench.fake.take_received();
    assert!(times_sent(&received, KEY).values().all(|times| *times == 2), "{received:?}");
}

#[test]
fn reads_beyond_the_end_are_refused() {
    let bench = Bench::start(3, Duration::ZERO);
    let opened = bench.open();
    let object = &opened.objects[0];
    let len = object.len_bytes().unwrap();
    let mut byte = [0];
    object.read_exact_at(&mut byte, len - 1).unwrap();
    let error = object.read_exact_at(&mut byte, len).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    object.read_exact_at(&mut [], len).unwrap();
    object.expect(u64::MAX - 5..u64::MAX);
    assert!(!object.refetch(len..u64::MAX));
    assert_eq!((object.is_cached(len - 1), object.is_cached(len)), (Some(true), None));
}
