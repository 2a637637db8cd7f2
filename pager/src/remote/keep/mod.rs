//! A keeper: a process that holds what a page server needs, so that another server can take over its guests when it
//! dies. The guests do not notice.
//!
//! For each guest the server sends duplicates of four descriptors: the userfaultfd of the guest, its connection, its
//! process (a pidfd), and the handover state: a memfd with the regions, the states of all pages, and the messages that
//! were read and not yet applied. While the server lives, the keeper uses none of them. When the connection of the
//! server closes, the next server of the same snapshot gets them.
//!
//! The keeper also has a duplicate of the listening socket. It accepts the connections, passes them to the server, and
//! holds each until the server has sent the descriptors above. The server does not take the first message out of the
//! connection before that, so that the next server finds it there. If no server comes within the takeover timeout, the
//! keeper answers the faults of the guests itself, by the policy for pages that cannot be loaded.
//!
//! How to use it, and what happens when: `docs/serving.md`. Why no page can be wrong: `docs/pager.md`.

mod error;
mod front;
mod guest;
mod handover_state;
mod keeper;
mod link;
mod unserved;
mod wire;

pub use error::KeepError;
pub(crate) use handover_state::{HandoverState, Record};
pub use keeper::{KeepEvent, KeepOptions, Keeper};
pub use link::ANSWER_TIMEOUT;
pub(crate) use link::{Door, Kept, Link};
pub(crate) use wire::Orphan;
