//! Imports and exports memory images and the snapshots of other virtual machine monitors, bit for bit.
//!
//! [`Import`] reads a flat image of memory, a Firecracker pair, a Cloud Hypervisor folder or a mapped-ram file of QEMU.
//! [`Export`] writes them, or an ELF core. The state of another program is opaque: it is stored in a state section with
//! its own tag.
//!
//! ```no_run
//! use snapvm::interchange::{Export, ExportFormat, Import, MemoryImage, VMSTATE};
//! use snapvm::{StagedOutput, snapfmt::{Snapshot, WriteOptions}};
//! # use std::{ops::ControlFlow, path::Path};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let go = |_| ControlFlow::Continue(());
//! let vmstate = VMSTATE.read(Path::new("vm.state"))?;
//! let import = Import::firecracker(MemoryImage::open(Path::new("mem.file"))?, vmstate, None)?;
//! import.write(Path::new("guest.snap"), &WriteOptions::default(), &go)?;
//!
//! let snapshot = Snapshot::open("guest.snap")?;
//! let export = Export::new(&snapshot, ExportFormat::Firecracker)?;
//! let out = StagedOutput::new(Path::new("snapshot-dir"), export.shape(), false)?;
//! export.write(&out, &go)?;
//! out.publish()?;
//! # Ok(())
//! # }
//! ```

mod async_pf;
mod cloud_hypervisor;
mod elf;
mod error;
mod export;
mod file_view;
mod firecracker;
mod foreign_file;
mod import;
mod imported_from;
mod layout;
mod mapped_ram_error;
mod memory_image;
mod qemu;

pub use async_pf::has_async_page_faults;
pub use cloud_hypervisor::{CONFIG, STATE};
pub use error::{ExportError, ImportError, LayoutError, NotMemory};
pub use export::{Export, ExportFormat};
pub use file_view::FileView;
pub use firecracker::{GuestArch, VMSTATE};
pub use foreign_file::ForeignFile;
pub use import::Import;
pub use imported_from::imported_from;
pub use mapped_ram_error::MappedRamError;
pub use memory_image::MemoryImage;
pub use qemu::MAPPED_RAM;
