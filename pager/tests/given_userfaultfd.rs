//! A pager serves with a descriptor of the crate `userfaultfd` instead of opening one.
#![allow(missing_docs)]

mod support;

use std::sync::Arc;

use pager::uffd::{ForeignUffdError, OpenError, Uffd};
use pager::{FailurePolicy, Pager, StartError, VecSource};
use support::{Memory, PAGE, stamp, stamped, userfaultfd_works};
use userfaultfd::{FeatureFlags, UffdBuilder};

const PAGES: usize = 4096;

fn uffd(features: FeatureFlags) -> Uffd {
    // Blocking: the pager makes it non-blocking.
    let uffd = UffdBuilder::new().require_features(features).non_blocking(false).create();
    Uffd::try_from(uffd.expect("userfaultfd works here")).expect("it is one")
}

#[test]
fn all_pages_are_served_by_the_given_descriptor() {
    if !userfaultfd_works("all_pages_are_served_by_the_given_descriptor") {
        return;
    }
    let memory = Memory::map(PAGES * PAGE);
    let pager = Pager::builder(Arc::new(VecSource::new(stamped(PAGES), 16 * PAGE)))
        .region(memory.whole())
        // With a given descriptor there is one slice.
        .slices(4)
        .userfaultfd(uffd(FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_REMAP))
        .on_error(FailurePolicy::Kill)
        .start()
        .expect("it starts");
    for page in (0..PAGES).rev() {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page));
    }
    memory.remove(7, 1);
    assert_eq!(memory.read_u64(7 * PAGE), 0, "a page that was given back is zero");
    assert!(pager.failure().is_none());
}

#[test]
fn features_that_are_missing_are_reported() {
    if !userfaultfd_works("features_that_are_missing_are_reported") {
        return;
    }
    let memory = Memory::map(PAGE);
    let start = |features, policy| {
        Pager::builder(Arc::new(VecSource::new(stamped(1), PAGE)))
            .region(memory.whole())
            .userfaultfd(uffd(features))
            .on_error(policy)
            .start()
    };
    let remap = FeatureFlags::EVENT_REMAP;
    match start(FeatureFlags::EVENT_REMOVE, FailurePolicy::Kill) {
        Err(StartError::Open(OpenError::Unsupported { missing, .. })) => {
            assert_eq!(missing, remap.bits());
        }
        other => panic!("{other:?}"),
    }
    // That crate cannot request POISON.
    let poison = start(FeatureFlags::EVENT_REMOVE | remap, FailurePolicy::Poison);
    assert!(matches!(poison, Err(StartError::PoisonUnavailable)), "{poison:?}");
}

#[test]
fn another_descriptor_is_refused() {
    let file = std::fs::File::open("/dev/null").expect("there is one");
    match Uffd::from_fd(file.into()) {
        Err(ForeignUffdError::NoUserfaultfd { found }) => assert_eq!(found, "/dev/null"),
        other => panic!("{other:?}"),
    }
}
