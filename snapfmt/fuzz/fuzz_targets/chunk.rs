//! One chunk, in a file that is right otherwise: straight to the decoders.
#![no_main]

#[path = "../harness/mod.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|input: &[u8]| harness::chunk(input));
