//! Booting a Linux kernel: what a boot loader and a PC's firmware would have left in memory.
//!
//! [`Kernel`] reads the file. A kernel with a PVH entry is booted by PVH (`pvh`), any other one by the 64-bit
//! boot protocol (`zero_page`). The addresses are in `address_map`.

mod e820;
mod entry;
mod error;
mod kernel;
mod pvh;
mod zero_page;

use vm_memory::GuestMemoryMmap;

pub(crate) use entry::Entry;
pub use error::KernelError;
pub(crate) use kernel::Kernel;

use super::acpi;
use crate::boot::{Board, LinuxError, Loaded};
use crate::layout::MemoryRange;

impl Kernel {
    /// Writes everything but the kernel, the initrd and the command line that the guest reads when it boots.
    /// Returns the first state of the boot CPU.
    pub(crate) fn write_boot_data(
        &self,
        memory: &GuestMemoryMmap,
        ranges: &[MemoryRange],
        board: Board,
        loaded: &Loaded,
    ) -> Result<Entry, LinuxError> {
        let rsdp_gpa = acpi::write(memory, board)?;
        match self.pvh_entry {
            Some(entry) => pvh::write(memory, ranges, loaded, rsdp_gpa, entry),
            None => zero_page::write(memory, ranges, loaded, rsdp_gpa, self),
        }
    }
}
