//! The faults of a device at work, and their consequences.

/// Why a device stopped in the middle of its work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    /// The driver violated the specification. The device needs a reset (virtio 1.2, 2.1.2); the guest continues.
    #[error("the driver gave {0}")]
    Driver(&'static str),
    /// A page of guest memory could not be read. The guest is stopped.
    #[error("a page of guest memory could not be read by a device{}", at(*gpa))]
    Unreadable {
        /// Guest physical address, where known.
        gpa: Option<u64>,
    },
}

fn at(gpa: Option<u64>) -> String {
    gpa.map_or_else(String::new, |gpa| format!(", gpa {gpa:#x}"))
}
