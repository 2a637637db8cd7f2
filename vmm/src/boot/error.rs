//! Why a Linux guest cannot be booted. All of these errors are found before the guest runs.

use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use crate::arch::KernelError;

/// A Linux guest that cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinuxError {
    /// A file does not open.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The error of open(2).
        #[source]
        source: io::Error,
    },
    /// A folder, a device or a pipe. A pipe has no known length.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// The kernel cannot be loaded.
    #[error("kernel {}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Its error.
        #[source]
        source: KernelError,
    },
    /// The command line, with what is added to it, is longer than this kernel reads.
    #[error("command line of {found} bytes, this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Length in bytes, with what is added for devices.
        found: usize,
        /// Most bytes.
        max: usize,
    },
    /// A zero byte would end the command line early.
    #[error("command line with a zero byte at {at}")]
    CmdlineZero {
        /// Where.
        at: usize,
    },
    /// The initrd does not fit between the kernel and the end of memory (or of what the kernel reaches).
    #[error(
        "initrd {} of {found} bytes does not fit, room for {room} bytes: give the guest more memory",
        path.display()
    )]
    InitrdTooLong {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// Bytes of room.
        room: u64,
    },
    /// The initrd cannot be read.
    #[error("cannot read the initrd {}", path.display())]
    InitrdRead {
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: GuestMemoryError,
    },
    /// The ACPI tables do not fit where they belong.
    #[error("ACPI tables of {found} bytes, room for {max}")]
    Tables {
        /// Their length in bytes.
        found: u64,
        /// Bytes of room.
        max: u64,
    },
    /// Guest memory could not be written.
    #[error("cannot write guest memory")]
    Memory(#[from] GuestMemoryError),
}
