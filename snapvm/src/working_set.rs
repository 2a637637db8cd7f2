//! The pages that a lazy restore loads ahead of the guest: the file's working set.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{HotRun, ReadError, SectionKind, Snapshot};

use crate::memory::SetDamage;

/// What a lazy restore loads before the guest touches it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefetch {
    /// Nothing.
    Off,
    /// The pages of the file's working set, if it has one.
    #[default]
    Hot,
    /// The pages of the working set, and then all other pages.
    All,
}

pub(crate) fn has_set(snapshot: &Snapshot) -> bool {
    snapshot.sections().iter().any(|section| section.kind == SectionKind::WORKING_SET)
}

/// Dropping this lets the prefetch install pages, just before the guest runs. Until then the prefetch only reads the
/// file: it would contend with the building of the machine for the lock of the address space.
pub(crate) type Start = Sender<()>;

/// The prefetch installs pages after this time at the latest. Building a machine takes less.
const START_AT_THE_LATEST: Duration = Duration::from_secs(1);

/// A start, and the function that waits for it.
pub(crate) fn start() -> (Start, impl FnOnce() + Send + 'static) {
    let (start, started) = channel();
    let wait = move || {
        let _dropped_or_late = started.recv_timeout(START_AT_THE_LATEST);
    };
    (start, wait)
}

/// Reads the working set on the thread that loads it, so that the guest does not wait for that. The set is a hint:
/// damage is noted, and the guest runs without the set.
pub(crate) fn list(
    snapshot: Arc<Snapshot>,
    damage: SetDamage,
) -> impl FnOnce() -> Vec<Range<u64>> + Send + 'static {
    move || {
        working_set_pages(&snapshot).unwrap_or_else(|error| {
            damage.get_or_init(|| error.to_string());
            Vec::new()
        })
    }
}

/// The pages of the working set as ranges of source offsets, in the order in which they were touched. Empty without a
/// set.
///
/// # Errors
/// [`ReadError`]: the set is damaged.
pub fn working_set_pages(snapshot: &Snapshot) -> Result<Vec<Range<u64>>, ReadError> {
    let set = snapshot.working_set()?;
    let runs = set.iter().flat_map(|set| set.runs());
    let range = |run: &HotRun| {
        let start = run.first.source_offset();
        start..start + u64::from(run.pages) * PAGE_BYTES as u64
    };
    Ok(runs.map(range).collect())
}
