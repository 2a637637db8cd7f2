//! Spans of faults, as a subscriber of the crate tracing sees them.
#![allow(missing_docs)]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use pager::{Pager, VecSource};
use support::{Memory, PAGE, stamp, stamped, userfaultfd_works};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

type Seen = Arc<Mutex<Vec<(String, u64)>>>;

/// Records the name and the page of each span.
struct Notes {
    seen: Seen,
    next_id: AtomicU64,
}

impl Subscriber for Notes {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut offset = Offset(None);
        span.record(&mut offset);
        let name = span.metadata().name().to_owned();
        let page = offset.0.expect("each span has one") / PAGE as u64;
        self.seen.lock().expect("no panic").push((name, page));
        Id::from_u64(self.next_id.fetch_add(1, Ordering::Relaxed))
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Offset(Option<u64>);

impl Visit for Offset {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "source_offset" {
            self.0 = Some(value);
        }
    }
    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

#[test]
fn each_fault_has_its_spans() {
    if !userfaultfd_works("each_fault_has_its_spans") {
        return;
    }
    let seen = Seen::default();
    let notes = Notes { seen: Arc::clone(&seen), next_id: AtomicU64::new(1) };
    tracing::subscriber::set_global_default(notes).expect("it is the first");
    let memory = Memory::map(64 * PAGE);
    let source = Arc::new(VecSource::new(stamped(64), 16 * PAGE));
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    for page in [5, 6, 40] {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page));
    }
    pager.stop();
    let spans = |page| ["fault", "load", "install"].map(|name| (name.to_owned(), page));
    assert_eq!(*seen.lock().expect("no panic"), [spans(5), spans(40)].concat());
}
