//! What a lazy restore loads in front of the guest: the pages of the file's working set.

use std::ops::Range;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::ValueEnum;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{HotRun, ReadError, SectionKind, Snapshot};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrefetchArg {
    /// Nothing.
    Off,
    /// The pages of the file's working set, if it has one.
    #[default]
    Hot,
    /// These, and then everything else: as with `--populate full`.
    All,
}

/// Why a working set could not be used, once that is known.
pub(crate) type SetDamage = Arc<OnceLock<String>>;

pub(crate) fn has_set(snapshot: &Snapshot) -> bool {
    snapshot.sections().iter().any(|section| section.kind == SectionKind::WORKING_SET)
}

/// Lets the prefetch install pages when it is dropped: once the guest is about to run. Before that it would be in the way of
/// those who build the machine, for the lock of the address space. What it can do without, it does meanwhile.
pub(crate) type Start = Sender<()>;

/// Longer than building a machine takes.
const START_AT_THE_LATEST: Duration = Duration::from_secs(1);

/// A start, and what waits for it.
pub(crate) fn start() -> (Start, impl FnOnce() + Send + 'static) {
    let (start, started) = channel();
    let wait = move || {
        let _dropped_or_late = started.recv_timeout(START_AT_THE_LATEST);
    };
    (start, wait)
}

/// Reads the working set when it is asked for its pages, on the thread that loads them: the guest does not wait for it.
/// The set is a hint: one that is damaged is told, and the guest runs without.
pub(crate) fn list(
    snapshot: Arc<Snapshot>,
    damage: SetDamage,
) -> impl FnOnce() -> Vec<Range<u64>> + Send + 'static {
    move || {
        pages(&snapshot).unwrap_or_else(|error| {
            damage.get_or_init(|| error.to_string());
            Vec::new()
        })
    }
}

/// The pages of the working set, if there is one, as ranges of offsets in memory, in the order in which they were touched.
pub(crate) fn pages(snapshot: &Snapshot) -> Result<Vec<Range<u64>>, ReadError> {
    let set = snapshot.working_set()?;
    let runs = set.iter().flat_map(|set| set.runs());
    let range = |run: &HotRun| {
        let start = run.first.source_offset();
        start..start + u64::from(run.pages) * PAGE_BYTES as u64
    };
    Ok(runs.map(range).collect())
}
