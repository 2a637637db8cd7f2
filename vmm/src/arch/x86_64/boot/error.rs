//! Why a kernel file cannot be booted.

use std::io;

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
        /// The contradiction.
        what: &'static str,
    },
    /// It needs addresses that this guest does not have.
    #[error(
        "needs memory up to {needed} bytes, and the guest has {found} (below 3 GiB): give it more memory"
    )]
    MemoryTooSmall {
        /// End of the memory that it needs.
        needed: u64,
        /// End of the guest's memory.
        found: u64,
    },
    /// It is loaded into the first megabyte, which belongs to the boot structures.
    #[error("loads at {gpa:#x}, expected at 1 MiB or above")]
    TooLow {
        /// Its load address.
        gpa: u64,
    },
    /// Reading failed.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// The loader refused.
    #[error("the loader refuses it")]
    Loader(#[source] linux_loader::loader::Error),
}
