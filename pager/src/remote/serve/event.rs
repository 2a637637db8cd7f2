//! The events of a server.

use std::io;

use super::error::RefuseError;
use crate::failure::Failure;
use crate::remote::keep::KeepError;
use crate::stats::Stats;

/// What was done to a client that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Consequence {
    /// Its connection was closed. The client has not sent memory that needs pages, or it has got the error.
    Closed,
    /// As long as the process lives, each missing page is poisoned when it is touched: SIGBUS, in a system call
    /// `EFAULT`.
    Poisoned,
    /// Its process was killed by SIGKILL.
    Killed,
    /// Its process should have been killed, and this process may not do that: its threads may wait forever. It runs as
    /// another user, or in a PID namespace that is not below the one of this process.
    NotKilled,
}

/// An event of a server. A process in another PID namespace has the process id 0.
#[derive(Debug)]
#[non_exhaustive]
pub enum ServeEvent<'a> {
    /// The memory of a client is served from now on.
    Served {
        /// Its process id.
        pid: i32,
        /// The size of its memory in bytes.
        memory_bytes: u64,
    },
    /// A client of a dead server is served by this one from now on.
    TakenOver {
        /// Its process id.
        pid: i32,
        /// The size of its memory in bytes.
        memory_bytes: u64,
    },
    /// A client is served, but the keeper does not hold it: if this server dies, the client cannot continue.
    NotKept {
        /// Its process id.
        pid: i32,
        /// Why.
        error: &'a KeepError,
    },
    /// A client is not served.
    Refused {
        /// Its process id, if that is known.
        pid: Option<i32>,
        /// Why.
        error: &'a RefuseError,
        /// What was done to it.
        consequence: Consequence,
    },
    /// A page of a client could not be loaded.
    Failed {
        /// Its process id.
        pid: i32,
        /// What failed, and why.
        failure: &'a Failure,
    },
    /// A client has ended, and its resources are free.
    Ended {
        /// Its process id.
        pid: i32,
        /// Its final statistics.
        stats: &'a Stats,
    },
    /// Connections cannot be accepted at the moment. The server tries again.
    Accept {
        /// The error of accept(2).
        error: &'a io::Error,
    },
}

/// Called with each event, on the thread where it happens.
pub type OnEvent = Box<dyn Fn(ServeEvent<'_>) + Send + Sync>;
