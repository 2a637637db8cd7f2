//! The fuzz targets on a stable compiler: every seed, and some thousand mutations of them.
//!
//! `SNAP_FUZZ_RUNS` sets another number of mutations. `docs/testing.md` describes how to run the same targets under
//! libFuzzer.

#[path = "../../snapfmt/tests/corpus/mod.rs"]
mod corpus;
#[path = "../fuzz/harness/mod.rs"]
#[allow(dead_code, reason = "shared with the tests of QEMU's files")]
mod harness;

#[test]
fn mapped_ram() {
    corpus::run("mapped_ram", 400, harness::mapped_ram);
}

#[test]
fn skeleton() {
    corpus::run("skeleton", 1500, harness::skeleton);
}

#[test]
fn firecracker() {
    corpus::run("firecracker", 2000, harness::firecracker);
}

#[test]
fn cloud_hypervisor() {
    corpus::run("cloud_hypervisor", 2000, harness::cloud_hypervisor);
}
