//! Snapshots of other virtual machine monitors: what their files are called, which guest address
//! each byte of them belongs to, and how they are kept in a snapshot of ours.
//!
//! Their state stays opaque: it is a state section under a tag of its own, bit for bit.

pub(crate) mod async_pf;
pub(crate) mod cloud_hypervisor;
pub(crate) mod elf;
pub(crate) mod firecracker;
pub(crate) mod memory_file;
pub(crate) mod staging;
pub(crate) mod state;
