//! Why there is no window.

use std::io;

use crate::uffd::{Errno, OpenError};

/// Why there is no window.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// No userfaultfd with write protection: it needs Linux 6.4, and the permission to use userfaultfd.
    #[error("no write protection by userfaultfd, which needs Linux 6.4 or later")]
    Open(#[source] OpenError),
    /// The kernel refuses to register the memory for write protection.
    #[error("cannot register the memory at {host_addr:#x} for write protection")]
    Register {
        /// The address of the first byte.
        host_addr: u64,
        /// The error of the system call.
        #[source]
        errno: Errno,
    },
    /// The kernel refuses to protect the memory.
    #[error("cannot protect the memory at {host_addr:#x} from writes")]
    Protect {
        /// The address of the first byte.
        host_addr: u64,
        /// The error of the system call.
        #[source]
        errno: Errno,
    },
    /// The pages are not of 4096 bytes, or the memory belongs to another process or to a file.
    #[error("only memory of this process, in pages of 4096 bytes, can be protected")]
    Unsupported,
    /// There is a window already.
    #[error("another window of this memory is open")]
    Busy,
    /// The pager has loaded all pages and has let the memory go: [`Protection`](super::Protection) is for it now.
    #[error("the pager does not serve the memory any more")]
    Released,
    /// The window has ended, or the threads that answer its write faults have.
    #[error("the window has ended: {reason}")]
    Ended {
        /// Why.
        reason: String,
    },
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

impl WindowError {
    pub(super) fn ended(reason: &str) -> WindowError {
        WindowError::Ended { reason: reason.to_owned() }
    }
}
