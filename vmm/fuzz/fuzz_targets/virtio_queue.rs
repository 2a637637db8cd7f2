//! The memory of a guest with a driver that may put anything into a device's queues.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmm::virtio::any_queue(input));
