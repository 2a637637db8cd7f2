//! A small virtual machine monitor for KVM, made for guests that are paused, saved, and restored before
//! all of their memory has arrived.
//!
//! A guest is a value of one of two types. [`PausedVm::boot`] and [`PausedVm::restore`] return a [`PausedVm`],
//! whose [`VmState`] can be read. [`PausedVm::resume`] turns it into a [`RunningVm`], and [`RunningVm::pause`]
//! turns it back. The caller provides the guest memory: a `GuestMemoryMmap` of [`memory_layout`]'s ranges, with
//! any backing, private or shared, complete or filled on demand by userfaultfd.
//!
//! # Features
//! - An embedded [`demo`] guest that needs no kernel and checks its memory until it is stopped.
//! - Linux kernels, by PVH and by the 64-bit boot protocol, on several vCPUs: see [`boot`].
//! - A trait for devices in guest physical memory, [`MmioDevice`]. Their state is part of the machine's state.
//! - Restore in about the time of the necessary KVM calls, independent of the size of memory: memory slots that
//!   contain only zeros are registered while the guest already runs.
//! - A console that can pause the guest at exactly the instruction that wrote a byte.
//! - A state encoding with a version, frozen by tests, safe to decode from untrusted bytes.
//! - A page that cannot be read stops the guest, and the error has its address. It never becomes zeros, and it
//!   causes neither a hang nor a SIGBUS.
//!
//! # Not features
//! - Other architectures than x86_64; AMX state; nested guests; 32-bit PAE guests while they run.
//! - Translation between CPU models: KVM refuses what it does not support.
//!
//! # Signals
//! The first guest installs two handlers in the process. The one for `SIGRTMIN + 5` interrupts vCPU threads. The
//! one for SIGBUS handles the signals that a vCPU thread gets while it runs its guest, and passes all others to
//! the handler that was installed before.
//!
//! # Example
//! Boot the demo guest, run three beats, save the guest, restore it into the same memory, run one more beat:
//!
//! ```
//! use std::sync::Arc;
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//! use vmm::demo::DemoConfig;
//! use vmm::{ConsoleFlow, Payload, PausedVm, RestoreOptions, memory_layout};
//!
//! /// Pauses the guest after a number of lines.
//! fn lines(mut count: usize) -> impl FnMut(&[u8]) -> ConsoleFlow + Send {
//!     move |bytes| {
//!         print!("{}", String::from_utf8_lossy(bytes));
//!         count -= bytes.iter().filter(|&&byte| byte == b'\n').count();
//!         if count == 0 { ConsoleFlow::Pause } else { ConsoleFlow::Continue }
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! if let Err(error) = vmm::probe() {
//!     eprintln!("SKIPPED: {error}");
//!     return Ok(());
//! }
//! let ranges: Vec<_> = memory_layout(64 << 20)?
//!     .iter()
//!     .map(|range| (GuestAddress(range.gpa), range.len as usize))
//!     .collect();
//! let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges)?);
//!
//! // "ready ..." and beats 1 to 3.
//! let payload = Payload::Demo(DemoConfig::new(8 << 20));
//! let running = PausedVm::boot(Arc::clone(&memory), &payload, lines(4))?.resume()?;
//! assert!(running.wait(None).unwrap().is_resumable());
//! let state = running.pause()?.state()?;
//!
//! // "beat 4 ok".
//! let restored = PausedVm::restore(memory, &state, lines(1), &RestoreOptions::default())?;
//! assert!(restored.resume()?.wait(None).unwrap().is_resumable());
//! # Ok(())
//! # }
//! ```

#[cfg(not(target_os = "linux"))]
compile_error!("vmm supports Linux only: it needs KVM");

mod arch;
pub mod boot;
mod console;
mod control;
pub mod demo;
mod devices;
mod discards;
mod error;
mod frozen;
mod generation;
mod give_back;
mod host;
mod kick;
pub mod layout;
mod memory_slots;
mod payload;
mod run_loop;
mod serial;
mod slot_layout;
pub mod state;
mod threads;
pub mod virtio;
mod vm;
mod vm_clock;
mod written;

pub use arch::{HostCpu, SNAPSHOT_TRIGGER_PORT, VcpuError};
pub use console::{Console, ConsoleFlow};
pub use control::{Stop, VcpuActivity, VmHandle};
pub use devices::{
    DEVICE_WINDOW_BYTES, DEVICE_WINDOWS_GPA, DEVICES_MAX, DeviceContext, DeviceError,
    FrozenContent, MmioDevice, device_window,
};
pub use discards::{Discards, HeldDiscards};
pub use error::KvmError;
pub use frozen::Frozen;
pub use give_back::drop_private_pages;
pub use host::{
    FeaturesError, HostReport, KVM_API_VERSION, KVM_DEVICE, ProbeError, missing_features, probe,
};
pub use layout::{LayoutError, MemoryRange, memory_layout};
pub use payload::{Payload, PayloadError};
pub use state::{StateError, VmState};
pub use threads::{ThreadKind, on_thread_start};
pub use vm::{
    BootError, BootOptions, Clock, MemoryMismatch, PauseError, PausedVm, ResetError, RestoreError,
    RestoreOptions, ResumeError, RunningVm, SaveError,
};
pub use written::WriteLog;
