//! What answers a fault.
//!
//! | module | content |
//! |---|---|
//! | `handler` | the demand thread of a slice: reads messages, answers faults |
//! | `inbox` | the messages that it has read |
//! | `queued` | a fault that was read |
//! | `resolver` | prepares the answer: loaded pages, zeros or poison |
//! | `waiting` | the faults whose pages come from another host |
//! | `slice` | a part of the memory with its own userfaultfd and demand thread |
//! | `latency` | measures how long faults take |
//!
//! The pages themselves are installed by `install`.

pub(crate) mod handler;
pub(crate) mod inbox;
pub(crate) mod latency;
pub(crate) mod queued;
pub(crate) mod resolver;
pub(crate) mod slice;
pub(crate) mod waiting;
