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
        /// The name of the socket.
        path: PathBuf,
    },
    /// The name belongs to a file that is not a socket.
    #[error("{}: exists and is not a socket", .path.display())]
    NoSocket {
        /// The name of the socket.
        path: PathBuf,
    },
    /// The name is not valid for a socket.
    #[error("{}: a socket's name has at most 107 bytes and no NUL", .path.display())]
    Name {
        /// The name of the socket.
        path: PathBuf,
    },
    /// A socket that was passed has no name in the file system, or another file has it by now.
    #[error("the socket has no name in the file system")]
    Unnamed,
    /// Another process holds the lock of the folder of the socket.
    #[error(
        "the socket's folder has been locked by another process for {after:?}; choose another folder, or see lslocks(8)"
    )]
    Locked {
        /// How long this process has waited.
        after: Duration,
    },
    /// The keeper cannot be used.
    #[error("the keeper")]
    Keep(#[source] KeepError),
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// The operation.
        what: &'static str,
        /// The error of the system call.
        #[source]
        error: io::Error,
    },
}

/// Why a client is not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RefuseError {
    /// The client runs as another user.
    #[error("the client runs as user {uid}, which is not allowed")]
    User {
        /// The id of that user.
        uid: u32,
    },
    /// Its process has ended.
    #[error("the client's process {pid} cannot be found")]
    Process {
        /// The process id; 0 if it is in another PID namespace.
        pid: i32,
        /// The error of the system call.
        #[source]
        error: io::Error,
    },
    /// Its process is in another PID namespace, so that it has no process id here, and the kernel has no other
    /// name for it (`SO_PEERPIDFD`, Linux 6.5).
    #[error(
        "the client's process is in another PID namespace, where this kernel does not identify it: that takes Linux \
         6.5. Run server and client in the same PID namespace, or the server in one above the client's"
    )]
    PidNamespace,
    /// The policy is to kill clients, and this process may not kill this one.
    #[error(
        "the policy is to kill a client whose pages cannot be loaded, and this server may not signal process {pid}: it \
         runs as another user, which takes CAP_KILL, or in a PID namespace that is not below the server's. Use the \
         policy `poison`"
    )]
    Unkillable {
        /// The process id; 0 if it is in another PID namespace.
        pid: i32,
        /// The error of pidfd_send_signal(2).
        #[source]
        error: io::Error,
    },
    /// The limit of clients is reached.
    #[error("{limit} clients are served already")]
    Full {
        /// The limit.
        limit: usize,
    },
    /// The client has not completed its handshake in time.
    #[error("no complete message within {after:?} ({bytes} bytes, {descriptors} descriptors)")]
    TimedOut {
        /// How long this process has waited.
        after: Duration,
        /// The number of received bytes.
        bytes: usize,
        /// The number of received descriptors.
        descriptors: usize,
    },
    /// The server ends, and the client has not completed its handshake.
    #[error("the server is ending")]
    Ending,
    /// The client has closed the connection during the handshake.
    #[error(
        "the client has closed the connection after {bytes} bytes and {descriptors} descriptors"
    )]
    Left {
        /// The number of received bytes.
        bytes: usize,
        /// The number of received descriptors.
        descriptors: usize,
    },
    /// The message is too long.
    #[error("the message is longer than {limit_bytes} bytes")]
    TooLong {
        /// The limit.
        limit_bytes: usize,
    },
    /// A descriptor was sent and did not arrive.
    #[error(
        "its descriptor could not be received: this process may have {} open files (`ulimit -n`, in systemd LimitNOFILE=), \
         or a security module forbids it", limit_text(.limit)
    )]
    DescriptorLost {
        /// The limit of open files of this process, if there is one.
        limit: Option<u64>,
    },
    /// No descriptors are left for another client.
    #[error(
        "this process has no descriptor left for another client: raise its limit of open files (`ulimit -n`, in systemd \
         LimitNOFILE=)"
    )]
    Shortage(#[source] io::Error),
    /// The client is refused, and its threads wait for pages that cannot be poisoned.
    #[error("the pages that it touches cannot be poisoned")]
    Poison(#[source] io::Error),
    /// The message has the wrong number of descriptors.
    #[error("a message with {found} descriptors; {expected} expected")]
    Descriptors {
        /// The number of received descriptors, at least.
        found: usize,
        /// The expected number.
        expected: usize,
    },
    /// The message cannot be parsed.
    #[error("the message cannot be parsed")]
    Message(#[source] serde_json::Error),
    /// The message has no region.
    #[error("the message has no region")]
    NoRegion,
    /// A region has neither `page_size` nor `page_size_kib`, or the two differ.
    #[error("the page size of region {region} is missing, or given twice and differently")]
    PageSize {
        /// The index of the region.
        region: usize,
    },
    /// A region is not valid.
    #[error("region {region}")]
    Region {
        /// The index of the region.
        region: usize,
        /// The reason.
        #[source]
        error: RegionError,
    },
    /// The descriptor is not a userfaultfd that can be served.
    #[error("the received descriptor cannot be served")]
    Userfaultfd(#[source] ForeignUffdError),
    /// The userfaultfd sends events that a server cannot handle, or does not send removals.
    #[error("the userfaultfd has features {features:#x}: {why}")]
    Features {
        /// All features of the userfaultfd.
        features: u64,
        /// The problem with them.
        why: &'static str,
    },
    /// The client requests another snapshot than the served one.
    #[error("the client requests snapshot {wanted}, this server has {served}")]
    Snapshot {
        /// The requested snapshot: ids of the layers, newest first, and the size of memory.
        wanted: String,
        /// The served snapshot.
        served: String,
    },
    /// This server cannot share memory with the client.
    #[error("memory cannot be shared here: {why}")]
    NotShared {
        /// The reason.
        why: &'static str,
    },
    /// The handover state of the client cannot be used.
    #[error("it cannot be taken over")]
    Kept(#[source] KeepError),
    /// The pager does not start.
    #[error("the pager does not start")]
    Start(#[source] StartError),
    /// The keeper cannot be used.
    #[error("the keeper")]
    Keep(#[source] KeepError),
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// The operation.
        what: &'static str,
        /// The error of the system call.
        #[source]
        error: io::Error,
    },
}
