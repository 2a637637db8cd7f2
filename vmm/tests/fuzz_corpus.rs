//! The fuzz target on a stable compiler: every seed, and some thousand mutations of them.
//!
//! `SNAP_FUZZ_RUNS` sets another number of mutations. `docs/testing.md` describes how to run the same target under
//! libFuzzer.

#[path = "../fuzz/harness/mod.rs"]
mod harness;

use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

#[test]
fn seeds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/state_decode");
    let mut seeds = 0;
    for entry in std::fs::read_dir(folder).expect("the seeds are there") {
        let path = entry.expect("a file").path();
        harness::state_decode(&std::fs::read(path).expect("a seed"));
        seeds += 1;
    }
    assert!(seeds > 5);
}

#[test]
fn mutations() {
    let runs = std::env::var("SNAP_FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok());
    let config =
        Config { cases: runs.unwrap_or(4000), failure_persistence: None, ..Config::default() };
    // From a fixed seed, so that a failure is reproducible.
    let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let len = harness::TEMPLATE.len() as u16;
    // Half of the patches hit the counts and ranges at the beginning.
    let place = prop_oneof![0..256u16, 0..len];
    let byte = prop_oneof![Just(0), Just(0xff), any::<u8>()];
    let patch = (place, prop::collection::vec(byte, 1..=16));
    let new_len = prop_oneof![4 => Just(0), 1 => 1..2 * len];
    let input = (new_len, prop::collection::vec(patch, 0..6)).prop_map(|(new_len, patches)| {
        let mut input = new_len.to_le_bytes().to_vec();
        for (place, bytes) in patches {
            input.extend(place.to_le_bytes());
            input.push(bytes.len() as u8 - 1);
            input.extend(bytes);
        }
        input
    });
    TestRunner::new_with_rng(config, random)
        .run(&input, |input| {
            harness::state_decode(&input);
            Ok(())
        })
        .expect("no input panics");
}
