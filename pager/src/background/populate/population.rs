//! When pages are loaded in the background, and how far that is.

use serde::Serialize;

/// When pages that no thread has touched are loaded in the background.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Populate {
    /// Never.
    Off,
    /// While threads wait for pages a good part of the time (an eighth or more). Then loaders work at full speed, on
    /// CPUs without a demand thread. They stop when the waiting has ended, and start again when it comes back. If the
    /// guest touches little memory, its resident size stays small. If it touches much, the memory is complete about as
    /// soon as if it had been loaded first. On a single CPU, only the rest is loaded: see
    /// [`crate::PagerBuilder::populate_threads`].
    #[default]
    Auto,
    /// While no thread has faulted for 5 ms: in bursts, which get longer while no faults come.
    Idle,
    /// From the start to the end, at full speed.
    Full,
}

/// The progress of the background loading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Population {
    /// No population was requested.
    #[default]
    Off,
    /// [`Populate::Auto`]: nothing is loaded now, because threads do not wait for pages.
    Quiet,
    /// In progress, or the pager was stopped before its end.
    Running,
    /// All pages are loaded and the memory is unregistered: neither the pager nor the source is needed any more. Pages
    /// that still count as missing are zero in the source, and read as zero in memory.
    Complete,
    /// All pages were loaded, and some were given back by [`Pager::reset`](crate::Pager::reset). All missing pages are left
    /// to faults, as without population.
    Reset,
    /// Some pages could not be loaded. All missing pages are left to faults, as without population.
    Incomplete {
        /// The number of these pages.
        pages: u64,
    },
}

impl Population {
    pub(crate) fn has_ended(self) -> bool {
        !matches!(self, Population::Quiet | Population::Running)
    }
}
