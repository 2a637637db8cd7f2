//! One chunk in a file that is otherwise correct, to test the decoders.
#![no_main]

#[path = "../harness/mod.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|input: &[u8]| harness::chunk(input));
