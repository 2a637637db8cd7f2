//! A small, typed binding of Linux userfaultfd, with what a pager needs.
//!
//! [`Uffd::register`] is unsafe, because it makes memory subject to this userfaultfd. The ioctls that fill pages are
//! unsafe, because the kernel also fills pages that are registered with *another* userfaultfd of the process.
//!
//! Sources: `userfaultfd(2)`, `ioctl_userfaultfd(2)`, the kernel's
//! `Documentation/admin-guide/mm/userfaultfd.rst` and `mm/userfaultfd.c`.
#![allow(unsafe_code)]

mod abi;
mod batch;
mod descriptor;
mod errno;
mod features;
mod foreign;
mod journal;
mod message;
mod open;
mod protect;
#[cfg(feature = "userfaultfd")]
mod userfaultfd;

pub use batch::MessageBatch;
pub use descriptor::{Registered, Uffd, Wait};
pub use errno::Errno;
pub use features::Features;
pub use foreign::{ForeignUffd, ForeignUffdError};
pub(crate) use journal::Journal;
pub use message::{FaultKind, Message};
pub use open::{OpenError, keep_device_open};
