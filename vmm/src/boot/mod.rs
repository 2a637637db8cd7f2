//! Booting Linux: what a boot loader and a PC's firmware would have left in memory.
//!
//! ```text
//! gpa        what                                   who reads it
//! 0x500      descriptor table                       64-bit protocol
//! 0x6000     hvm_start_info, module, memory map     PVH
//! 0x7000     boot_params ("zero page")              64-bit protocol
//! 0x10000    page tables, first 1 GiB one to one    64-bit protocol
//! 0x20000    command line                           both
//! 0xe0000    ACPI tables (reserved)                 both
//! 0xf0000    generation id (reserved)               ACPI
//! 0x100000   kernel, and the initrd at the end of low memory
//! ```

mod acpi;
mod cmdline;
mod e820;
mod entry;
mod error;
mod initrd;
mod kernel;
mod pvh;
mod zero_page;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vm_memory::GuestMemoryMmap;

pub(crate) use acpi::{
    GENERATION_ID_GPA, GENERATION_IRQ, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT, is_power_off,
};
pub(crate) use entry::Entry;
pub use error::{KernelError, LinuxError};

use crate::layout::MemoryRange;
use kernel::Kernel;

/// A Linux guest: the files and the words it boots with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinuxConfig {
    /// The kernel: an uncompressed ELF `vmlinux`, or a `bzImage` (what distributions call `vmlinuz`).
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Command line. For each device `virtio_mmio.device=...` is added: kernels without ACPI find it
    /// only so.
    pub cmdline: String,
}

/// The machine, as far as the guest must be told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Board {
    pub(crate) cpus: u8,
    pub(crate) devices: usize,
}

impl LinuxConfig {
    /// Writes kernel, initrd, command line and tables into memory; gives the boot CPU's first state.
    pub(crate) fn load(
        &self,
        memory: &GuestMemoryMmap,
        ranges: &[MemoryRange],
        board: Board,
    ) -> Result<Entry, LinuxError> {
        let low_end = ranges.first().map_or(0, |range| range.gpa_range().end);
        let mut file = open(&self.kernel)?;
        let kernel = Kernel::load(&mut file, memory, low_end)
            .map_err(|source| LinuxError::Kernel { path: self.kernel.clone(), source })?;
        let cmdline = cmdline::write(&self.cmdline, board, kernel.cmdline_max(), memory)?;
        let initrd = match &self.initrd {
            None => None,
            Some(path) => {
                let mut file = open(path)?;
                Some(initrd::load(&mut file, path, memory, kernel.end..kernel.initrd_end(low_end))?)
            }
        };
        let rsdp = acpi::write(memory, board)?;
        let loaded = Loaded { cmdline_gpa: cmdline, initrd, rsdp_gpa: rsdp };
        match kernel.pvh_entry {
            Some(entry) => pvh::write(memory, ranges, &loaded, entry),
            None => zero_page::write(memory, ranges, &loaded, &kernel),
        }
    }
}

fn open(path: &Path) -> Result<File, LinuxError> {
    let failed = |source| LinuxError::Open { path: path.to_owned(), source };
    // O_NONBLOCK: a pipe is refused below, and not waited for.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(failed)?;
    match file.metadata().map_err(failed)?.is_file() {
        true => Ok(file),
        false => Err(LinuxError::NotAFile { path: path.to_owned() }),
    }
}

/// Where the parts that the boot structures point to lie.
struct Loaded {
    cmdline_gpa: u64,
    /// Address and length.
    initrd: Option<(u64, u64)>,
    rsdp_gpa: u64,
}
