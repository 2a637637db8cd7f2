//! A whole file: open it, read every page in every way, verify it.
#![no_main]

#[path = "../harness/mod.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|input: &[u8]| harness::open_and_read(input));
