//! A state.json of Cloud Hypervisor with any content.
#![no_main]

#[path = "../harness/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the other targets")]
mod harness;

libfuzzer_sys::fuzz_target!(|input: &[u8]| harness::cloud_hypervisor(input));
