//! End-to-end tests: the binary `snap` as its users run it.

#[cfg(feature = "age")]
mod age_keys;
mod bad_files;
mod bad_hosts;
mod balloon;
mod benchmarks;
mod block_devices;
mod busy_guest;
mod checkpoints;
mod command_line;
mod continuity;
mod control;
mod core_dumps;
mod diff_imports;
mod disks;
mod doctors;
mod failing_restores;
#[cfg(feature = "objects")]
#[path = "../objects/tests/support/fake.rs"]
#[allow(dead_code, reason = "shared with the tests of the library")]
mod fake_objects;
#[path = "../snapfmt/tests/common/mod.rs"]
mod file_bytes;
mod firecracker;
#[allow(dead_code, reason = "shared with a benchmark")]
mod firecracker_machine;
mod foreign_paths;
mod foreign_text;
mod forks;
mod fuse;
mod golden_files;
mod guest_floods;
mod hangups;
mod hostile_sockets;
mod import_export;
mod independent_reader;
mod integrity;
mod interruptions;
mod jailed;
mod keeping;
#[path = "../vmm/tests/common/kernel.rs"]
mod kernel;
mod layers;
mod limits;
mod linux_guests;
mod live;
mod live_devices;
mod looking_inside;
mod mounting;
mod mounts;
mod networks;
#[cfg(feature = "objects")]
mod object_storage;
#[cfg(feature = "objects")]
mod object_store_oci;
#[cfg(feature = "objects")]
mod object_store_s3;
#[cfg(feature = "objects")]
mod object_store_tls;
mod overlays;
mod overwritten;
mod page_cache;
mod qemu;
mod qemu_machine;
mod recorded_serving;
mod rekeying;
mod resets;
mod running;
mod scattered_memory;
#[path = "../snapfmt/fuzz/harness/seal.rs"]
#[allow(dead_code, reason = "shared with the fuzz targets")]
mod seal;
mod sealing;
#[cfg(feature = "objects")]
mod secrets;
mod serving;
mod slow_disks;
mod slow_readers;
mod sockets;
mod streams;
mod strict;
mod strict_serving;
mod support;
mod talking;
mod uniqueness;
mod virtio_guest;
mod waits;
mod working_sets;
