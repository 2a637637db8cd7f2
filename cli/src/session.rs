//! What every command is given.

use std::time::Instant;

use crate::interrupt::Interrupt;

/// What every command is given.
pub(crate) struct Session {
    pub(crate) quiet: bool,
    /// When the command began.
    pub(crate) started: Instant,
    pub(crate) interrupt: Interrupt,
}
