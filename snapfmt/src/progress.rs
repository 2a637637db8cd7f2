//! The progress of a long operation, which may be cancelled.

use std::ops::ControlFlow;

/// The progress of a long operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes done.
    pub done_bytes: u64,
    /// All bytes.
    pub total_bytes: u64,
}

impl Progress {
    /// Bytes done, of all bytes.
    #[must_use]
    pub fn new(done_bytes: u64, total_bytes: u64) -> Self {
        Self { done_bytes, total_bytes }
    }
}

/// Called repeatedly during a long operation, from any of its threads. `Break` cancels the operation.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) -> ControlFlow<()> + Sync);
