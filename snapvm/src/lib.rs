//! Snapshots a running KVM guest into one file, and restores it lazily in milliseconds.
//!
//! This library joins the crates [`snapfmt`] (the file), [`pager`] (page faults) and [`vmm`] (the machine) into a VM
//! that owns its memory's pager and file:
//!
//! - [`RestoreConfig`] restores a guest from a snapshot: lazily, eagerly, or sharing memory with others;
//! - [`BootConfig`] boots a new guest;
//! - [`Vm::snapshot`] and [`Vm::snapshot_layer`] write a paused VM to a file;
//! - [`RunningVm::arm`], [`Vm::cut`] and [`Cut::write`] write one that runs, with a pause of milliseconds;
//! - [`Vm::reset`] puts a restored VM back to its snapshot, in place;
//! - [`interchange`] imports and exports memory images, Firecracker's and Cloud Hypervisor's snapshots, ELF cores;
//! - [`record`] records which pages a guest touches first, for a working set.
//!
//! ```no_run
//! use vmm::ConsoleFlow;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let console = |bytes: &[u8]| {
//!     print!("{}", String::from_utf8_lossy(bytes));
//!     ConsoleFlow::Continue
//! };
//! let restored = snapvm::RestoreConfig::open("guest.snap")?.restore(console)?;
//! let running = restored.vm.resume()?;
//! println!("{:?}", running.wait(None));
//! # Ok(())
//! # }
//! ```
//!
//! A [`Vm`] or [`RunningVm`] owns its [`VmMemory`], and with it the pager. So all vCPUs end before the pager does, and
//! a missing page is never read as zeros.
//!
//! This needs Linux on x86-64 with `/dev/kvm`. Lazy restores also need userfaultfd: see [`pager`].

pub use pager;
pub use pager::with_causes;
pub use snapfmt;
pub use vmm;

mod boot;
mod checkpoint;
mod devices;
mod error;
mod guest_memory;
pub mod interchange;
mod kept_pages;
mod live;
mod memory;
mod memory_map;
mod metadata;
mod observer;
mod pagemap;
mod recording;
mod reset;
mod restore;
pub mod room;
mod stable_file;
mod staged_output;
mod vm;
mod working_set;
mod write;
mod written_pages;

pub use boot::BootConfig;
pub use devices::{DeviceConnections, DeviceError};
pub use error::{BootError, GuestFailure, MemoryError, RestoreError, SnapshotError};
pub use guest_memory::ArrivingBytes;
pub use live::{Armed, Cut, Written};
pub use memory::VmMemory;
pub use memory_map::{gpa_ranges, to_ranges, to_regions};
pub use metadata::GuestMetadata;
pub use observer::{Observer, Silent, Step};
pub use recording::{FirstOutput, Pace, RecordError, Touched, record};
pub use reset::{ResetError, ResetStats};
pub use restore::{MemoryFrom, RestoreConfig, RestoredVm, remote_fault_overhead, snapshot_name};
pub use stable_file::StableFile;
pub use staged_output::{OutputError, OutputShape, StagedOutput};
pub use vm::{RunningVm, Vm};
pub use working_set::{Prefetch, working_set_pages};
pub use write::{path_of_parent, refuse_as_output, refuse_same};
