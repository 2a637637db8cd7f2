//! A keeper: a process that holds what a page server needs to go on, so that a server that dies is followed by
//! another one and its guests never notice.
//!
//! For each guest the server gives away duplicates of four descriptors: the guest's userfaultfd, its connection, its
//! process (a pidfd), and the ledger, a memfd with the regions, the states of all pages, and the messages
//! that were read and not yet applied. The keeper looks into none of them while a server lives. When its
//! connection closes, the next server of the same snapshot gets them; if none comes, the keeper answers the
//! guests' faults itself, by the policy for pages that cannot be had.
//!
//! How it is used, and what happens when: `docs/serving.md`. Why no page can be wrong: `docs/pager.md`.

mod guest;
mod keeper;
mod ledger;
mod link;
mod wire;

pub use keeper::{KeepEvent, KeepOptions, Keeper};
pub(crate) use ledger::{Ledger, Record};
pub use link::PATIENCE;
pub(crate) use link::{Kept, Link};
pub use wire::KeepError;
