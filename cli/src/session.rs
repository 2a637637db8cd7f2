//! The parameters of every command.

use std::time::Instant;

use crate::interrupt::Interrupt;

/// The parameters of every command.
pub(crate) struct Session {
    pub(crate) quiet: bool,
    /// When the command began.
    pub(crate) started: Instant,
    pub(crate) interrupt: Interrupt,
}
