//! Where pages come from.
//!
//! | module | content |
//! |---|---|
//! | `page_source` | the trait [`PageSource`](crate::PageSource) |
//! | `load` | the trait [`PageReader`](crate::PageReader), and what it returns |
//! | `error`, `retry` | why a load fails, and when it is retried |
//! | `sequence` | loading pages that are known in advance |
//! | `vec_source` | a source in a `Vec<u8>` |
//! | `snapshot_*`, `shared_pages`, `large_pages` | a `.snap` file as a source |

pub(crate) mod error;
#[cfg(feature = "snapfmt")]
mod large_pages;
pub(crate) mod load;
pub(crate) mod page_source;
pub(crate) mod panicked;
pub(crate) mod retry;
pub(crate) mod sequence;
#[cfg(feature = "snapfmt")]
mod shared_pages;
#[cfg(feature = "snapfmt")]
mod snapshot_page;
#[cfg(feature = "snapfmt")]
mod snapshot_sequence;
#[cfg(feature = "snapfmt")]
pub(crate) mod snapshot_source;
pub(crate) mod vec_source;
