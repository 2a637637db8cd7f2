//! Why a Linux guest cannot be booted. All of these errors are found before the guest runs.

use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

/// A Linux guest that cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinuxError {
    /// A file does not open.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What open(2) said.
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
        /// What is wrong with it.
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
        /// What went wrong.
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

/// A kernel file that cannot be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// Neither of the two formats.
    #[error("neither an ELF vmlinux nor a bzImage")]
    Format,
    /// ELF, but not of this machine: 32 bit, big-endian, or of another architecture.
    #[error("an ELF file, but not an executable for x86-64")]
    Machine,
    /// A bzImage without the 64-bit entry point (CONFIG_X86_64), or from before 2012.
    #[error("a bzImage of boot protocol {version:#06x} without a 64-bit entry point")]
    Protocol {
        /// Version of the protocol.
        version: u16,
    },
    /// The headers contradict the file or each other.
    #[error("damaged: {what}")]
    Damaged {
        /// What does not fit.
        what: &'static str,
    },
    /// It needs addresses that this guest does not have.
    #[error(
        "needs memory up to {needed} bytes, and the guest has {found} (below 3 GiB): give it more memory"
    )]
    MemoryTooSmall {
        /// End of the memory that it needs.
        needed: u64,
        /// End of the memory there is.
        found: u64,
    },
    /// It is loaded into the first megabyte, which belongs to the boot structures.
    #[error("loads at {gpa:#x}, expected at 1 MiB or above")]
    TooLow {
        /// Where it wants to be loaded.
        gpa: u64,
    },
    /// Reading failed.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// The loader refused.
    #[error("the loader refuses it")]
    Loader(#[source] linux_loader::loader::Error),
}
