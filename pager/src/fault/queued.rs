//! A fault between the reading of its message and its answer.

use std::time::Instant;

/// A thread waits for the page at `address`. `thread_id` is 0 if it is unknown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) address: u64,
    pub(crate) thread_id: u32,
    /// It waits to write to a protected page: see [`crate::window`].
    pub(crate) write_protected: bool,
    pub(crate) read_at: Instant,
    pub(crate) waited: Waited,
}

/// What has happened to a fault that has waited while other faults were answered: see [`super::waiting`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waited {
    /// The number of waits.
    pub(crate) count: u32,
    /// When the last one began, while it lasts.
    pub(crate) since: Option<Instant>,
    /// The last one, after its end; 0 before.
    pub(crate) ticket: Ticket,
    /// The sum of the waits.
    pub(crate) wait_ns: u64,
    /// The time before the first one.
    pub(crate) queue_ns: u64,
    pub(crate) failed_loads: u32,
}

/// The number of a wait, from 1.
pub(crate) type Ticket = u64;
