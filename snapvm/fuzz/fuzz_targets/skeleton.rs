//! What a snapshot keeps of a mapped-ram file, from an untrusted writer.
#![no_main]

#[path = "../harness/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the other targets")]
mod harness;

libfuzzer_sys::fuzz_target!(|input: &[u8]| harness::skeleton(input));
