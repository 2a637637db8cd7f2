//! The functions of the fuzz targets. libFuzzer calls them on nightly; `tests/fuzz_corpus.rs` calls them on stable.
//!
//! Each takes a file of another program that may have any content. What is imported is exported as the same bytes.

mod cloud_hypervisor;
mod firecracker;
mod mapped_ram;
mod place;
pub(crate) mod qemu_file;

pub(crate) use cloud_hypervisor::cloud_hypervisor;
pub(crate) use firecracker::firecracker;
pub(crate) use mapped_ram::{mapped_ram, skeleton};
