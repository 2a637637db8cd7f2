//! QEMU: the file that `migrate file:PATH` writes with the capability `mapped-ram`.
//!
//! It is QEMU's migration stream, in which the pages of each RAM block have a place of their own
//! (docs/devel/migration/mapped-ram.rst and `mapped_ram_setup_ramblock` in migration/ram.c of QEMU). The pages become
//! memory of the snapshot. All other bytes, the device state among them, are the skeleton of the file, which is kept
//! unchanged in one state section.

mod addresses;
mod bitmap;
mod skeleton;
mod stream;

pub(super) use addresses::placed;
pub(super) use bitmap::WrittenPages;
pub use skeleton::MAPPED_RAM;
pub(super) use skeleton::Skeleton;
pub(super) use stream::{MappedRam, is_stream};

/// A view of the file for a QEMU that maps main memory from another file.
pub(super) const LAZY: &str = "migration-lazy";
