//! Mounts a snapshot as a folder of read-only files that are decoded when they are read.
//!
//! | file | content |
//! |---|---|
//! | `memory.raw` | guest memory, regions end to end |
//! | `memory.core` | an ELF core for gdb, crash and drgn |
//! | `firecracker/memory`, `firecracker/vmstate` | if it was imported from Firecracker |
//! | `cloud-hypervisor/config.json`, `state.json`, `memory-ranges` | if it was imported from Cloud Hypervisor |
//! | `qemu/migration`, `qemu/migration-lazy` | if it was imported from QEMU |
//!
//! The bytes are those of `snapvm::interchange::Export`. What was read stays in the page cache of the kernel: a second
//! process that maps a file shares it, and the kernel drops it when memory is short. A damaged page is EIO, and SIGBUS for a
//! process that has mapped it; it is never zeros.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{os::fd::AsFd, path::Path, sync::Arc};
//!
//! let snapshot = Arc::new(snapvm::snapfmt::Snapshot::open("guest.snap")?);
//! let options = mount::MountOptions::default();
//! let mount = mount::Mount::new(&snapshot, Path::new("/mnt/guest"), &options, |event| {
//!     eprintln!("{event:?}");
//! })?;
//! // Dropping `stop` unmounts it.
//! let (stopped, stop) = std::io::pipe()?;
//! # drop(stop);
//! mount.run(stopped.as_fd())?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod activity;
mod error;
mod filesystem;
mod loader;
mod mount;
mod mount_point;
mod pages;
mod tree;

pub use error::{MountError, MountEvent, ReadFailure};
pub use mount::{Mount, MountOptions, Populate};
