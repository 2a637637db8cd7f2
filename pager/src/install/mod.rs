//! Where pages are installed in memory.
//!
//! | module | content |
//! |---|---|
//! | `kernel` | fills pages by ioctls, and handles every errno |
//! | `slices` | installs pages in slices, and keeps their states |
//! | `slice_lock` | the lock under which this happens |
//! | `reason` | why pages are installed, and how their states change |
//! | `page_state`, `page_bytes` | the state of each page |
//! | `runs` | joins pages that one ioctl can install |
//! | `register` | registers memory with its userfaultfd |
//! | `counters` | counts installed pages |
//! | `records` | states that another process can take over |
//! | `filled_file` | a file in memory, filled page by page |
//! | `model` | a model checker for all of this (tests only) |

pub(crate) mod counters;
pub(crate) mod filled_file;
pub(crate) mod kernel;
#[cfg(test)]
mod model;
pub(crate) mod page_bytes;
pub(crate) mod page_state;
pub(crate) mod reason;
pub(crate) mod records;
pub(crate) mod register;
pub(crate) mod runs;
pub(crate) mod slice_lock;
pub(crate) mod slices;
