//! Why a server does not start, and why a client is refused.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::StartError;
use crate::region::RegionError;
use crate::remote::keep::KeepError;
use crate::remote::limit_text::limit_text;
use crate::uffd::ForeignUffdError;

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another server listens there.
    #[error("{}: a server is listening there", .path.display())]
    Live {
        /// The socket's name.
        path: PathBuf,
    },
    /// The name is taken by something that is no socket.
    #[error("{}: exists and is no socket", .path.display())]
    NoSocket {
        /// The socket's name.
        path: PathBuf,
    },
    /// A socket cannot have that name.
    #[error("{}: a socket's name has at most 107 bytes and no NUL", .path.display())]
    Name {
        /// The socket's name.
        path: PathBuf,
    },
    /// Another process has the lock of the socket's folder, and keeps it.
    #[error(
        "the socket's folder has been locked by another process for {after:?}; choose another folder, or see lslocks(8)"
    )]
    Locked {
        /// Time given.
        after: Duration,
    },
    /// The keeper does not keep.
    #[error("the keeper")]
    Keep(#[source] KeepError),
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// Which.
        what: &'static str,
        /// The answer.
        #[source]
        error: io::Error,
    },
}

/// Why a client is not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RefuseError {
    /// It belongs to another user.
    #[error("the client runs as user {uid}; only the server's own user and root are served")]
    User {
        /// Whose it is.
        uid: u32,
    },
    /// Its process is gone, or not visible here (another process namespace).
    #[error("the client's process {pid} cannot be found")]
    Process {
        /// Its number.
        pid: i32,
        /// The answer.
        #[source]
        error: io::Error,
    },
    /// There are enough.
    #[error("{limit} clients are served already")]
    Full {
        /// That many.
        limit: usize,
    },
    /// It has not said what it wants.
    #[error("nothing usable came within {after:?} ({bytes} bytes, {descriptors} descriptors)")]
    TimedOut {
        /// Time given.
        after: Duration,
        /// What came.
        bytes: usize,
        /// What came.
        descriptors: usize,
    },
    /// It has gone in the middle.
    #[error("the other side has left after {bytes} bytes and {descriptors} descriptors")]
    Left {
        /// What came.
        bytes: usize,
        /// What came.
        descriptors: usize,
    },
    /// It says too much.
    #[error("the message is longer than {limit_bytes} bytes")]
    TooLong {
        /// The limit.
        limit_bytes: usize,
    },
    /// The descriptor that it sent did not arrive.
    #[error(
        "its descriptor could not be received: this process may have {} open files (`ulimit -n`, in systemd LimitNOFILE=), \
         or a security module forbids it", limit_text(.limit)
    )]
    DescriptorLost {
        /// How many files this process may have open, if there is a limit.
        limit: Option<u64>,
    },
    /// There are no descriptors left for another client.
    #[error(
        "this process has no descriptor left for another client: raise its limit of open files (`ulimit -n`, in systemd \
         LimitNOFILE=)"
    )]
    Shortage(#[source] io::Error),
    /// It is refused, and threads of it wait for pages that cannot be poisoned.
    #[error("the pages that it touches cannot be poisoned")]
    Poison(#[source] io::Error),
    /// It sent more than one descriptor, or one where none belongs.
    #[error("a message with {found} descriptors; {expected} expected")]
    Descriptors {
        /// What came, at least.
        found: usize,
        /// What belongs there.
        expected: usize,
    },
    /// It does not speak the language.
    #[error("the message is not understood")]
    Message(#[source] serde_json::Error),
    /// It names no region.
    #[error("no region is named")]
    NoRegion,
    /// A region names its page size neither as `page_size` nor as `page_size_kib`, or the two differ.
    #[error("the page size of region {region} is missing, or named twice and differently")]
    PageSize {
        /// The region's number.
        region: usize,
    },
    /// A region cannot be one.
    #[error("region {region}")]
    Region {
        /// The region's number.
        region: usize,
        /// Why.
        #[source]
        error: RegionError,
    },
    /// What it sent is no userfaultfd that can be served.
    #[error("the received descriptor cannot be served")]
    Userfaultfd(#[source] ForeignUffdError),
    /// The userfaultfd tells of things that a server cannot answer, or keeps quiet about removals.
    #[error("the userfaultfd has features {features:#x}: {why}")]
    Features {
        /// All that it has.
        features: u64,
        /// What is wrong with them.
        why: &'static str,
    },
    /// It wants another snapshot than is served.
    #[error("the client wants snapshot {wanted}, here is {served}")]
    Snapshot {
        /// What it wants: ids of the layers, newest first, and the size of memory.
        wanted: String,
        /// What is here.
        served: String,
    },
    /// There is nothing to be shared here.
    #[error("memory cannot be shared here: {why}")]
    NotShared {
        /// Why.
        why: &'static str,
    },
    /// What was kept of it cannot be used.
    #[error("it cannot be taken over")]
    Kept(#[source] KeepError),
    /// The pager does not start.
    #[error("the pager does not start")]
    Start(#[source] StartError),
    /// The keeper does not keep.
    #[error("the keeper")]
    Keep(#[source] KeepError),
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// Which.
        what: &'static str,
        /// The answer.
        #[source]
        error: io::Error,
    },
}

/// The error with all its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
