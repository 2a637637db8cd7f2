//! The public statistics of a pager.

use std::ops::AddAssign;

use serde::Serialize;

use crate::background::populate::population::Population;
use crate::background::prefetch_progress::Prefetch;
use crate::fault::latency::{LatencyStep, Times};

/// What a pager has done so far.
///
/// While the pager runs, the numbers are read one by one, and a page is usable a moment before it is counted: the
/// faults in progress may be missing. The result of [`crate::Pager::stop`] is exact.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Bytes in a page.
    pub page_bytes: u64,
    /// All pages by their present state.
    pub pages: PageCounts,
    /// Installed pages by the reason for that.
    pub installed: PagesByOrigin,
    /// The progress of the background population.
    pub population: Population,
    /// The progress of the prefetch.
    pub prefetch: Prefetch,
    /// Page-fault messages answered.
    pub faults: u64,
    /// Those among them whose page was already in memory, because of another fault.
    pub spurious_faults: u64,
    /// Bytes that the source has read from storage.
    pub bytes_read: u64,
    /// Loads that were retried after a transient error.
    pub source_retries: u64,
    /// Faults that have waited for longer than a second, and still wait. Usually for storage that does not answer.
    pub stalled: u64,
    /// All faults that have waited for longer than a second, also those that were answered.
    pub stalls: u64,
    /// How long faults took, in nanoseconds.
    #[serde(flatten)]
    pub times: Times,
    /// The whole distribution of `times.service`: the steps that have values, in ascending order.
    pub service_steps: Vec<LatencyStep>,
}

/// The statistics of one region.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RegionStats {
    /// Where the region begins in memory.
    pub host_addr: u64,
    /// Where the region begins in the source, in bytes.
    pub source_offset: u64,
    /// Its pages by their present state.
    pub pages: PageCounts,
    /// How long its faults took. `None` if the memory has more than eight regions.
    pub times: Option<Times>,
}

/// Pages by their state. `total` is the sum of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageCounts {
    /// All pages of all regions.
    pub total: u64,
    /// Never loaded.
    pub missing: u64,
    /// In memory.
    pub present: u64,
    /// Given back by the guest and not touched since.
    pub removed: u64,
    /// Could not be loaded: accesses raise SIGBUS.
    pub poisoned: u64,
}

/// Installed pages by the reason. If no page was removed, their sum is the number of present pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PagesByOrigin {
    /// The faulting page, from the source.
    pub demand: u64,
    /// Other pages that were loaded with it.
    pub fault_around: u64,
    /// Loaded by the background population.
    pub populated: u64,
    /// Loaded by the prefetch, including zero pages.
    pub prefetched: u64,
    /// Zero pages: zero in the source, or given back and touched again.
    pub zero: u64,
    /// Found in memory when the pager was about to install them.
    pub existing: u64,
    /// Faults answered by a file that the memory maps. These pages still count as missing.
    pub file: u64,
}

impl AddAssign for PageCounts {
    fn add_assign(&mut self, other: PageCounts) {
        self.total += other.total;
        self.missing += other.missing;
        self.present += other.present;
        self.removed += other.removed;
        self.poisoned += other.poisoned;
    }
}
