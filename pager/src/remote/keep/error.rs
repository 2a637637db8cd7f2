//! Why a keeper and a server do not work together.

use std::io;
use std::time::Duration;

use crate::remote::limit_text::limit_text;

/// Why a keeper and a server do not work together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeepError {
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// The operation.
        what: &'static str,
        /// The error of the system call.
        #[source]
        error: io::Error,
    },
    /// The other side runs as another user.
    #[error("the other side runs as user {uid}: only this user and root are trusted")]
    User {
        /// The id of that user.
        uid: u32,
    },
    /// The other side has sent an unexpected message.
    #[error("unexpected message: {why}")]
    Message {
        /// The error in the message.
        why: String,
    },
    /// A descriptor was sent and did not arrive.
    #[error(
        "a guest's descriptor could not be received: this process may have {} open files (`ulimit -n`, in systemd \
         LimitNOFILE=), or a security module forbids it", limit_text(.limit)
    )]
    DescriptorLost {
        /// The limit of open files of this process, if there is one.
        limit: Option<u64>,
    },
    /// The keeper is another version of this program.
    #[error("the keeper has version {found}, this server {wanted}")]
    Version {
        /// The version of the keeper.
        found: u32,
        /// The version of the server.
        wanted: u32,
    },
    /// The other side has closed the connection.
    #[error("the keeper has closed the connection")]
    Gone,
    /// The queue of the other side is full.
    #[error("the other side's queue is full")]
    Full,
    /// The keeper does not answer.
    #[error(
        "it has not answered within {after:?}; it may be stopped, or the socket is another program's"
    )]
    Silent {
        /// The time that the server has waited.
        after: Duration,
    },
    /// The handover state of a guest cannot be used.
    #[error("the handover state is unusable: {why}")]
    HandoverState {
        /// The error in it.
        why: &'static str,
    },
}
