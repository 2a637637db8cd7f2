//! Layers whose list of parents the server does not give: the parents are found one after the other.

mod support;

use std::time::Duration;

use objects::open;
use support::fake::Fate;
use support::{Bench, chain, push_chain};

/// A layer of a chain of three that a push has written, and the path of its list.
fn pushed() -> (Bench, String, String) {
    let mut bench = Bench::start(500, Duration::ZERO);
    let (object, memory) = push_chain(&bench, 3);
    bench.memory = memory;
    let list = object.replace(".snap", ".layers");
    assert!(bench.fake.paths().contains(&list), "{list}");
    (bench, object, list)
}

/// Opens the layer, with a cache of its own.
#[track_caller]
fn opens(bench: &Bench, object: &str, what: &str) {
    let url = bench.fake.url(object).parse().expect("an address");
    let opened = open(&url, &bench.options_in(what));
    let opened = opened.unwrap_or_else(|error| panic!("{what}: {}", chain(&error)));
    assert_eq!(opened.objects.len(), 3, "{what}");
    for page in [100, 200, 300] {
        bench.check_page(&opened.snapshot, page);
    }
}

#[test]
fn a_refused_list_is_requested_once() {
    let (bench, object, list) = pushed();
    let refused = list.clone();
    bench.fake.decide(move |_, received| match received.path == refused {
        true => Fate::Status(403, "AccessDenied"),
        false => Fate::Answer,
    });
    bench.fake.take_received();
    opens(&bench, &object, "refused");
    let received = bench.fake.take_received();
    assert_eq!(received.iter().filter(|one| one.path == list).count(), 1, "{received:?}");
}

#[test]
fn a_web_server_that_answers_with_something_else_has_no_list() {
    let (bench, object, list) = pushed();
    bench.fake.put(&list, "<html>There is no such page.</html>");
    opens(&bench, &object, "a page");
    bench.fake.put(&list, "");
    opens(&bench, &object, "an empty page");
    bench.fake.put_with(&list, "<html></html>", None);
    opens(&bench, &object, "no ETag");
    for (what, fate) in [("no ranges", Fate::NoRanges), ("501", Fate::Status(501, "X"))] {
        let path = list.clone();
        bench.fake.decide(move |_, received| match received.path == path {
            true => fate.clone(),
            false => Fate::Answer,
        });
        opens(&bench, &object, what);
    }
}

#[test]
fn a_list_that_is_not_valid_is_an_error() {
    let (bench, object, list) = pushed();
    bench.fake.put(&list, r#"{"snap_name": 1, "layers": []}"#);
    let url = bench.fake.url(&object).parse().expect("an address");
    let error = open(&url, &bench.options()).err().expect("the list is not valid");
    assert!(matches!(error, objects::ObjectError::Name { .. }), "{}", chain(&error));
}
