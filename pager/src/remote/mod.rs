//! Serves the memory of other processes.
//!
//! | module | content |
//! |---|---|
//! | `serve` | a server for virtual machines that send their userfaultfd |
//! | `keep` | a process that lets another server take over when one dies |
//! | `shared` | memory that clones of one snapshot share |

pub mod keep;
mod limit_text;
pub mod serve;
pub mod shared;
