//! Booting a Linux kernel: the part that is the same on every architecture.
//!
//! It opens the files, completes the command line, loads the initrd, and leaves the kernel file, the boot
//! protocol and the tables to the architecture.

mod cmdline;
mod error;
mod initrd;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vm_memory::GuestMemoryMmap;

pub use error::LinuxError;

pub use crate::arch::KernelError;

use crate::arch::{Entry, Kernel};
use crate::layout::MemoryRange;

/// A Linux guest: the files and the command line that it boots with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinuxConfig {
    /// The kernel: an uncompressed ELF `vmlinux`, or a `bzImage` (what distributions call `vmlinuz`).
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Command line. For each device `virtio_mmio.device=...` is added: without it, kernels without ACPI do not
    /// find the device.
    pub cmdline: String,
}

/// The parts of the machine that the tables and the command line describe.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Board {
    pub(crate) cpus: u8,
    pub(crate) devices: usize,
}

impl LinuxConfig {
    /// A kernel without an initrd and with an empty command line.
    #[must_use]
    pub fn new(kernel: impl Into<PathBuf>) -> LinuxConfig {
        LinuxConfig { kernel: kernel.into(), ..LinuxConfig::default() }
    }

    /// Sets [`LinuxConfig::initrd`].
    #[must_use]
    pub fn initrd(mut self, initrd: impl Into<Option<PathBuf>>) -> LinuxConfig {
        self.initrd = initrd.into();
        self
    }

    /// Sets [`LinuxConfig::cmdline`].
    #[must_use]
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> LinuxConfig {
        self.cmdline = cmdline.into();
        self
    }

    /// Writes kernel, initrd, command line and tables into memory. Returns the first state of the boot CPU.
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
        let cmdline_gpa = cmdline::write(&self.cmdline, board, kernel.cmdline_max(), memory)?;
        let initrd = match &self.initrd {
            None => None,
            Some(path) => {
                let mut file = open(path)?;
                Some(initrd::load(&mut file, path, memory, kernel.initrd_room(low_end))?)
            }
        };
        kernel.write_boot_data(memory, ranges, board, &Loaded { cmdline_gpa, initrd })
    }
}

fn open(path: &Path) -> Result<File, LinuxError> {
    let failed = |source| LinuxError::Open { path: path.to_owned(), source };
    // O_NONBLOCK: a pipe is refused below, and open(2) does not wait for its writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(failed)?;
    match file.metadata().map_err(failed)?.is_file() {
        true => Ok(file),
        false => Err(LinuxError::NotAFile { path: path.to_owned() }),
    }
}

/// The addresses of what the boot protocol's structures point to.
pub(crate) struct Loaded {
    pub(crate) cmdline_gpa: u64,
    /// Address and length.
    pub(crate) initrd: Option<(u64, u64)>,
}
