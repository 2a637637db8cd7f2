//! What a client has sent before it was refused.

use std::os::fd::OwnedFd;

/// What a client has sent before it was refused.
#[derive(Debug, Default)]
pub(crate) struct Given {
    pub(crate) descriptors: Vec<OwnedFd>,
    /// A descriptor was sent and did not arrive.
    pub(crate) lost: bool,
    /// The client has started to describe its memory.
    pub(crate) names_memory: bool,
}

impl Given {
    /// Whether the client has memory that needs pages. Others, such as a program that only checks whether the server
    /// lives, need nothing.
    pub(crate) fn is_guest(&self) -> bool {
        self.names_memory || self.lost || !self.descriptors.is_empty()
    }
}
