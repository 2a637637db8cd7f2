//! Why a pager does not start.

use std::io;

use crate::source::error::SourceError;
use crate::uffd::{Errno, OpenError};

/// Why a pager does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No region was given.
    #[error("no region was given")]
    NoRegion,
    /// Regions have different page sizes.
    #[error("regions have pages of {one} and of {other} bytes; one pager serves one page size")]
    PageSizes {
        /// The page size of the first region, in bytes.
        one: usize,
        /// The page size of another region, in bytes.
        other: usize,
    },
    /// Two regions overlap.
    #[error("two regions overlap in {space} at {at:#x}")]
    Overlap {
        /// `memory` or `the source`.
        space: &'static str,
        /// Where the second region begins.
        at: u64,
    },
    /// A region ends beyond the end of the source.
    #[error(
        "a region ends at source offset {end:#x}, the source at {source_bytes:#x}: is this the source of another guest?"
    )]
    BeyondSource {
        /// The source offset of the end of the region, in bytes.
        end: u64,
        /// The length of the source in bytes.
        source_bytes: u64,
    },
    /// No userfaultfd could be opened, or the kernel is too old.
    #[error(transparent)]
    Open(OpenError),
    /// Regions of another process need its userfaultfd, and the reverse.
    #[error(
        "regions of another process need its userfaultfd, and a userfaultfd needs such regions"
    )]
    Foreign,
    /// Memory that is backed by a file is populated by filling the file.
    #[error("memory that is a mapping of a file is not populated page by page")]
    PopulateBacked,
    /// The policy is to poison pages, and the kernel does not support that.
    #[error(
        "this kernel cannot poison pages (UFFD_FEATURE_POISON, Linux 6.6 or later): choose FailurePolicy::Kill to run without"
    )]
    PoisonUnavailable,
    /// The kernel refuses to register the memory.
    #[error("UFFDIO_REGISTER of {len_bytes:#x} bytes at {host_addr:#x}")]
    Register {
        /// The address of the first byte.
        host_addr: u64,
        /// The length in bytes.
        len_bytes: u64,
        /// The error of the system call.
        #[source]
        errno: Errno,
    },
    /// The kept page states belong to other memory.
    #[error("states of {found} pages are kept, the memory has {pages}")]
    Records {
        /// The number of pages of the regions.
        pages: usize,
        /// The number of pages of the states.
        found: usize,
    },
    /// The source returns no reader.
    #[error("the source cannot be read")]
    Source(#[source] SourceError),
    /// Another system call failed.
    #[error("cannot have {what}")]
    System {
        /// What was requested.
        what: &'static str,
        /// The error of the system call.
        #[source]
        error: io::Error,
    },
}
