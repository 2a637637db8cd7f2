//! The population: pages that no thread has touched yet are loaded by background threads.
//!
//! | module | content |
//! |---|---|
//! | `population` | when pages are loaded ([`Populate`](crate::Populate)), and how far that is |
//! | `demand` | measures how much threads wait for pages, and so whether loading ahead pays |
//! | `plan` | which 2 MiB of the source are loaded next |
//! | `pace` | when a loader pauses, and how much it installs in one step |
//! | `loader` | the thread: it loads a part, installs it, and ends the population |
//! | `start` | starts these threads |
//! | `progress` | the state that they share |
//!
//! A loader decodes without any lock, and installs 64 KiB in one step while it holds the slice lock, which demand
//! threads get first. When no page is left, the memory is unregistered: from then on neither the pager nor the source
//! is needed. Zero pages are not filled in, because the kernel's own zeros are right for them.

pub(crate) mod demand;
mod loader;
mod pace;
pub(crate) mod plan;
pub(crate) mod population;
pub(crate) mod progress;
pub(crate) mod start;
