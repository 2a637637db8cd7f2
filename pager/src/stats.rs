//! Figures: counters per slice and latency histograms per thread, joined when they are asked for.

use std::ops::AddAssign;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::page_state::PageState;
use crate::populate::Population;
use crate::prefetch::Prefetch;

/// What a pager has done so far.
///
/// While it runs the numbers are read one by one, and a page is usable a moment before it is counted:
/// they may be behind by the faults in progress. What [`crate::Pager::stop`] answers is exact.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Bytes in a page.
    pub page_bytes: u64,
    /// All pages by what they are now.
    pub pages: PageCounts,
    /// Installed pages by why they were.
    pub installed: PagesByOrigin,
    /// How far the background population has come.
    pub population: Population,
    /// How far the prefetch has come.
    pub prefetch: Prefetch,
    /// Page-fault messages answered.
    pub faults: u64,
    /// Those among them whose page was there already: another fault had brought it.
    pub spurious_faults: u64,
    /// Bytes that the source has read from storage.
    pub bytes_read: u64,
    /// Loads that were tried again after a transient error.
    pub source_retries: u64,
    /// Message read until the faulting thread is woken, and all that came with its page is installed.
    pub service: Latency,
    /// The whole distribution of `service`: the steps that hold values, ascending.
    pub service_steps: Vec<LatencyStep>,
    /// Of that: reading from storage, as far as the source says.
    pub read: Latency,
    /// Of that: verifying and decoding, as far as the source says.
    pub decode: Latency,
    /// Of that: installing pages.
    pub install: Latency,
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
    /// Could not be had.
    pub poisoned: u64,
}

/// Pages by what brought them. Where no page was removed, the sum is the number of present pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PagesByOrigin {
    /// The faulting page, from the source.
    pub demand: u64,
    /// Others that came with it.
    pub fault_around: u64,
    /// Loaded in the background, before anybody asked.
    pub populated: u64,
    /// Loaded from a list of pages that will probably be asked for, zero pages included.
    pub prefetched: u64,
    /// Zero pages: zero in the source, or given back and touched again.
    pub zero: u64,
    /// Were in memory before the pager could install them.
    pub existing: u64,
    /// Faults answered by a file that other processes share. These pages count as missing.
    pub file: u64,
}

/// A distribution of durations, in nanoseconds, to 1 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Number of values.
    pub count: u64,
    /// Half of them are at most this.
    pub p50_ns: u64,
    /// 99 of 100 are at most this.
    pub p99_ns: u64,
    /// The largest.
    pub max_ns: u64,
    /// The mean.
    pub mean_ns: f64,
}

/// A step of a distribution: two make a doubling.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LatencyStep {
    /// Values of this step are at most this, and above the step before.
    pub up_to_ns: u64,
    /// How many there are.
    pub count: u64,
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

/// Why a page is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Demand,
    FaultAround,
    Zero,
    Existing,
    File,
    Populated,
    Prefetched,
}

/// The counters of a slice. Mostly written by its own thread; by others only when their chunks reach in.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) total_pages: u64,
    /// By `PageState`; those of `Missing` count what has left that state.
    by_state: [AtomicU64; 4],
    by_origin: [AtomicU64; 7],
    faults: AtomicU64,
    spurious_faults: AtomicU64,
    bytes_read: AtomicU64,
    source_retries: AtomicU64,
}

impl Counters {
    pub(crate) fn of(total_pages: u64) -> Counters {
        Counters { total_pages, ..Counters::default() }
    }

    pub(crate) fn moved(&self, from: PageState, to: PageState, pages: u64) {
        // Missing is never entered, so its counter is that of the pages that left it.
        let from_counter = &self.by_state[from as usize];
        match from {
            PageState::Missing => from_counter.fetch_add(pages, Ordering::Relaxed),
            _ => from_counter.fetch_sub(pages, Ordering::Relaxed),
        };
        self.by_state[to as usize].fetch_add(pages, Ordering::Relaxed);
    }

    pub(crate) fn installed(&self, origin: Origin, pages: u64) {
        self.by_origin[origin as usize].fetch_add(pages, Ordering::Relaxed);
    }

    pub(crate) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    pub(crate) fn poisoned(&self) -> u64 {
        self.by_state[PageState::Poisoned as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn spurious(&self) {
        self.spurious_faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn retried(&self) {
        self.source_retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_to(&self, stats: &mut Stats) {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let state = |state: PageState| of(&self.by_state[state as usize]);
        stats.pages += PageCounts {
            total: self.total_pages,
            missing: self.total_pages.saturating_sub(state(PageState::Missing)),
            present: state(PageState::Present),
            removed: state(PageState::Removed),
            poisoned: state(PageState::Poisoned),
        };
        stats.installed.demand += of(&self.by_origin[Origin::Demand as usize]);
        stats.installed.fault_around += of(&self.by_origin[Origin::FaultAround as usize]);
        stats.installed.zero += of(&self.by_origin[Origin::Zero as usize]);
        stats.installed.existing += of(&self.by_origin[Origin::Existing as usize]);
        stats.installed.file += of(&self.by_origin[Origin::File as usize]);
        stats.installed.prefetched += of(&self.by_origin[Origin::Prefetched as usize]);
        stats.installed.populated += of(&self.by_origin[Origin::Populated as usize]);
        stats.faults += of(&self.faults);
        stats.spurious_faults += of(&self.spurious_faults);
        stats.bytes_read += of(&self.bytes_read);
        stats.source_retries += of(&self.source_retries);
    }
}

/// Durations of one fault; zero for what was not measured or did not happen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FaultTimes {
    pub(crate) service_ns: u64,
    pub(crate) read_ns: u64,
    pub(crate) decode_ns: u64,
    pub(crate) install_ns: u64,
}

/// The histograms of one thread. The lock is its own: only a call of `stats()` ever contends for it.
#[derive(Debug)]
pub(crate) struct Recorder(Mutex<Distributions>);

#[derive(Clone, Debug)]
pub(crate) struct Distributions {
    service: Histogram<u32>,
    read: Histogram<u32>,
    decode: Histogram<u32>,
    install: Histogram<u32>,
}

impl Distributions {
    pub(crate) fn new() -> Distributions {
        // Steps of 64 ns at the low end, 1 % of the value above, up to a minute: 14 KiB each.
        let histogram = || {
            Histogram::new_with_bounds(64, 60_000_000_000, 2).expect("these bounds are valid ones")
        };
        Distributions {
            service: histogram(),
            read: histogram(),
            decode: histogram(),
            install: histogram(),
        }
    }

    pub(crate) fn add_to(&self, stats: &mut Stats) {
        stats.service = latency(&self.service);
        stats.service_steps = steps(&self.service);
        stats.read = latency(&self.read);
        stats.decode = latency(&self.decode);
        stats.install = latency(&self.install);
    }
}

impl Recorder {
    pub(crate) fn new() -> Recorder {
        Recorder(Mutex::new(Distributions::new()))
    }

    pub(crate) fn record(&self, times: FaultTimes) {
        let mut to = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        to.service.saturating_record(times.service_ns);
        if times.read_ns > 0 {
            to.read.saturating_record(times.read_ns);
        }
        if times.decode_ns > 0 {
            to.decode.saturating_record(times.decode_ns);
        }
        if times.install_ns > 0 {
            to.install.saturating_record(times.install_ns);
        }
    }

    pub(crate) fn merge_into(&self, all: &mut Distributions) {
        // A copy, so that the thread never waits for the merge. The bounds are the same, so adding fails never.
        let own = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (to, from) in [
            (&mut all.service, &own.service),
            (&mut all.read, &own.read),
            (&mut all.decode, &own.decode),
            (&mut all.install, &own.install),
        ] {
            to.add(from).expect("all histograms have the same bounds");
        }
    }
}

fn latency(histogram: &Histogram<u32>) -> Latency {
    if histogram.is_empty() {
        return Latency::default();
    }
    Latency {
        count: histogram.len(),
        p50_ns: histogram.value_at_quantile(0.5),
        p99_ns: histogram.value_at_quantile(0.99),
        max_ns: histogram.max(),
        mean_ns: histogram.mean(),
    }
}

/// The first of the steps that `steps` makes.
const FIRST_STEP_NS: u64 = 1024;

fn steps(histogram: &Histogram<u32>) -> Vec<LatencyStep> {
    let all = histogram.iter_log(FIRST_STEP_NS, std::f64::consts::SQRT_2);
    all.map(|step| LatencyStep {
        up_to_ns: step.value_iterated_to(),
        count: step.count_since_last_iteration(),
    })
    .filter(|step| step.count > 0)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_hold_every_value_once() {
        let recorder = Recorder::new();
        for service_ns in [0, 900, 1500, 1_000_000, 1_000_100, 30_000_000_000] {
            recorder.record(FaultTimes { service_ns, ..FaultTimes::default() });
        }
        let (mut all, mut stats) = (Distributions::new(), Stats::default());
        recorder.merge_into(&mut all);
        all.add_to(&mut stats);
        let steps = &stats.service_steps;
        assert_eq!(steps.iter().map(|step| step.count).collect::<Vec<_>>(), [2, 1, 2, 1]);
        assert!(steps.is_sorted_by(|a, b| a.up_to_ns < b.up_to_ns), "{steps:?}");
        assert!(steps[2].up_to_ns > 1_000_000 && steps[2].up_to_ns < 1_500_000, "{steps:?}");
    }

    #[test]
    fn states_always_sum_up_to_the_total() {
        let counters = Counters::of(100);
        counters.moved(PageState::Missing, PageState::Present, 10);
        counters.moved(PageState::Present, PageState::Removed, 4);
        counters.moved(PageState::Missing, PageState::Poisoned, 1);
        counters.moved(PageState::Removed, PageState::Present, 3);
        let mut stats = Stats::default();
        counters.add_to(&mut stats);
        let expected = PageCounts { total: 100, missing: 89, present: 9, removed: 1, poisoned: 1 };
        assert_eq!(stats.pages, expected);
    }

    #[test]
    fn distributions_of_threads_are_joined() {
        let (slow, fast) = (Recorder::new(), Recorder::new());
        for _ in 0..99 {
            fast.record(FaultTimes {
                service_ns: 10_000,
                install_ns: 5_000,
                ..FaultTimes::default()
            });
        }
        slow.record(FaultTimes { service_ns: 120_000_000_000, ..FaultTimes::default() });
        let mut all = Distributions::new();
        slow.merge_into(&mut all);
        fast.merge_into(&mut all);
        let mut stats = Stats::default();
        all.add_to(&mut stats);
        assert_eq!((stats.service.count, stats.install.count, stats.read.count), (100, 99, 0));
        assert!(stats.service.p50_ns.abs_diff(10_000) <= 100, "{:?}", stats.service);
        assert!(stats.service.max_ns >= 59_000_000_000, "{:?}", stats.service);
    }
}
