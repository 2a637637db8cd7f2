//! Why a pager does not start.

use std::io;

use crate::source::error::SourceError;
use crate::uffd::{Errno, OpenError};

/// Why a pager does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is nothing to page.
    #[error("no region was given")]
    NoRegion,
    /// Regions have different page sizes.
    #[error("regions have pages of {one} and of {other} bytes; one pager serves one page size")]
    PageSizes {
        /// That of the first region.
        one: usize,
        /// That of another.
        other: usize,
    },
    /// Two regions overlap.
    #[error("two regions overlap in {space} at {at:#x}")]
    Overlap {
        /// `memory` or `the source`.
        space: &'static str,
        /// Where the second one begins.
        at: u64,
    },
    /// A region wants more than the source has.
    #[error(
        "a region ends at source offset {end:#x}, the source at {source_bytes:#x}: is the source of another guest?"
    )]
    BeyondSource {
        /// Where the region ends.
        end: u64,
        /// Length of the source.
        source_bytes: u64,
    },
    /// No userfaultfd, or a kernel too old.
    #[error(transparent)]
    Open(OpenError),
    /// Regions of another process and its userfaultfd go together.
    #[error("regions of another process need its userfaultfd, and no others go with it")]
    Foreign,
    /// Memory that is backed by a file is populated by filling the file.
    #[error("memory that is a mapping of a file is not populated page by page")]
    PopulateBacked,
    /// The policy is to poison, and the kernel can't.
    #[error(
        "this kernel cannot poison pages (UFFD_FEATURE_POISON, Linux 6.6 or later): choose FailurePolicy::Kill to run without"
    )]
    PoisonUnavailable,
    /// The kernel does not take the memory.
    #[error("UFFDIO_REGISTER of {len_bytes:#x} bytes at {host_addr:#x}")]
    Register {
        /// First byte.
        host_addr: u64,
        /// Length.
        len_bytes: u64,
        /// The answer.
        #[source]
        errno: Errno,
    },
    /// The kept page states are of other memory.
    #[error("states of {found} pages are kept, the memory has {pages}")]
    Records {
        /// Pages of the regions.
        pages: usize,
        /// Pages of the states.
        found: usize,
    },
    /// The source gives no reader.
    #[error("the source cannot be read")]
    Source(#[source] SourceError),
    /// Something else that the system refused.
    #[error("cannot have {what}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The answer.
        #[source]
        error: io::Error,
    },
}
