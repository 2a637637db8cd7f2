//! Measures how long faults take: one set of histograms for each demand thread, joined when they are read.

use std::sync::{Mutex, PoisonError};

use hdrhistogram::Histogram;
use serde::Serialize;

/// A distribution of durations in nanoseconds, with a precision of 1 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// The number of values.
    pub count: u64,
    /// The median.
    pub p50_ns: u64,
    /// The 99th percentile.
    pub p99_ns: u64,
    /// The maximum.
    pub max_ns: u64,
    /// The mean.
    pub mean_ns: f64,
}

/// How long the parts of answering faults take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Times {
    /// From reading the message to the start of its answer. Messages are read in batches and answered one after the
    /// other. The time before the read is not known, because the messages of the kernel have no timestamp.
    pub queue: Latency,
    /// From reading the message until the faulting thread is woken and all loaded pages are installed.
    pub service: Latency,
    /// The part of `service` for reading from storage, if the source measures it.
    pub read: Latency,
    /// The part of `service` for verifying and decoding, if the source measures it.
    pub decode: Latency,
    /// The part of `service` for installing pages.
    pub install: Latency,
}

/// A step of a distribution. Two steps are a factor of 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LatencyStep {
    /// The upper bound of the values of this step. The lower bound is that of the step before.
    pub up_to_ns: u64,
    /// The number of values.
    pub count: u64,
}

/// The durations of one fault. Zero for what was not measured or did not happen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FaultTimes {
    pub(crate) queue_ns: u64,
    pub(crate) service_ns: u64,
    pub(crate) read_ns: u64,
    pub(crate) decode_ns: u64,
    pub(crate) install_ns: u64,
}

/// The histograms of one thread, separate for each region. Only a thread that reads statistics contends for the lock.
#[derive(Debug)]
pub(crate) struct Recorder(Mutex<Vec<Distributions>>);

#[derive(Clone, Debug)]
pub(crate) struct Distributions {
    queue: Histogram<u32>,
    service: Histogram<u32>,
    read: Histogram<u32>,
    decode: Histogram<u32>,
    install: Histogram<u32>,
}

impl Distributions {
    pub(crate) fn new() -> Distributions {
        // The resolution is 64 ns for short times, and 1 % above, up to a minute. That takes 14 KiB each.
        let histogram = || {
            Histogram::new_with_bounds(64, 60_000_000_000, 2).expect("these bounds are valid ones")
        };
        Distributions {
            queue: histogram(),
            service: histogram(),
            read: histogram(),
            decode: histogram(),
            install: histogram(),
        }
    }

    pub(crate) fn times(&self) -> Times {
        Times {
            queue: latency(&self.queue),
            service: latency(&self.service),
            read: latency(&self.read),
            decode: latency(&self.decode),
            install: latency(&self.install),
        }
    }

    pub(crate) fn service_steps(&self) -> Vec<LatencyStep> {
        steps(&self.service)
    }

    pub(crate) fn add(&mut self, other: &Distributions) {
        for (to, from) in [
            (&mut self.queue, &other.queue),
            (&mut self.service, &other.service),
            (&mut self.read, &other.read),
            (&mut self.decode, &other.decode),
            (&mut self.install, &other.install),
        ] {
            to.add(from).expect("all histograms have the same bounds");
        }
    }
}

/// Histograms take 14 KiB each: for more regions than this, they are not separate.
const SEPARATE_REGIONS: usize = 8;

impl Recorder {
    /// A recorder for memory in this number of regions.
    pub(crate) fn new(regions: usize) -> Recorder {
        let apart = if regions > SEPARATE_REGIONS { 1 } else { regions.max(1) };
        Recorder(Mutex::new(vec![Distributions::new(); apart]))
    }

    pub(crate) fn record(&self, region: usize, times: FaultTimes) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = if all.len() == 1 { 0 } else { region };
        let to = &mut all[at];
        to.queue.saturating_record(times.queue_ns);
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

    /// The histograms of each region in order, or one set for all regions.
    pub(crate) fn by_region(&self) -> Vec<Distributions> {
        // A copy, so that the demand thread does not wait while the histograms are processed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn latency(histogram: &Histogram<u32>) -> Latency {
    if histogram.is_empty() {
        return Latency::default();
    }
    // Quantiles are the ends of steps of the histogram, and the mean takes their middles: both may be above all values.
    let max_ns = histogram.max();
    let quantile = |of: f64| histogram.value_at_quantile(of).min(max_ns);
    Latency {
        count: histogram.len(),
        p50_ns: quantile(0.5),
        p99_ns: quantile(0.99),
        max_ns,
        mean_ns: histogram.mean().min(max_ns as f64),
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

    fn all(recorders: &[Recorder]) -> Distributions {
        let mut all = Distributions::new();
        recorders.iter().flat_map(Recorder::by_region).for_each(|region| all.add(&region));
        all
    }

    #[test]
    fn steps_hold_every_value_once() {
        let recorder = Recorder::new(1);
        for service_ns in [0, 900, 1500, 1_000_000, 1_000_100, 30_000_000_000] {
            recorder.record(0, FaultTimes { service_ns, ..FaultTimes::default() });
        }
        let steps = all(&[recorder]).service_steps();
        assert_eq!(steps.iter().map(|step| step.count).collect::<Vec<_>>(), [2, 1, 2, 1]);
        assert!(steps.is_sorted_by(|a, b| a.up_to_ns < b.up_to_ns), "{steps:?}");
        assert!(steps[2].up_to_ns > 1_000_000 && steps[2].up_to_ns < 1_500_000, "{steps:?}");
    }

    #[test]
    fn distributions_of_threads_are_joined() {
        let (slow, fast) = (Recorder::new(1), Recorder::new(1));
        for _ in 0..99 {
            let times =
                FaultTimes { service_ns: 10_000, install_ns: 5_000, ..FaultTimes::default() };
            fast.record(0, times);
        }
        slow.record(0, FaultTimes { service_ns: 120_000_000_000, ..FaultTimes::default() });
        let times = all(&[slow, fast]).times();
        let counts = [times.queue, times.service, times.install, times.read].map(|of| of.count);
        assert_eq!(counts, [100, 100, 99, 0]);
        assert!(times.service.p50_ns.abs_diff(10_000) <= 100, "{times:?}");
        assert!(times.service.max_ns >= 59_000_000_000, "{times:?}");
    }

    #[test]
    fn no_figure_is_above_the_maximum() {
        let recorder = Recorder::new(1);
        recorder.record(0, FaultTimes { queue_ns: 0, service_ns: 10, ..FaultTimes::default() });
        let times = all(&[recorder]).times();
        for of in [times.queue, times.service] {
            assert!(of.mean_ns <= of.max_ns as f64 && of.p99_ns <= of.max_ns, "{of:?}");
            assert!(of.p50_ns <= of.p99_ns, "{of:?}");
        }
    }

    #[test]
    fn regions_are_separate_unless_there_are_many() {
        for (regions, apart) in [(1, 1), (3, 3), (SEPARATE_REGIONS, 8), (SEPARATE_REGIONS + 1, 1)] {
            let recorder = Recorder::new(regions);
            (0..regions).for_each(|region| recorder.record(region, FaultTimes::default()));
            let counts =
                recorder.by_region().iter().map(|one| one.service.len()).collect::<Vec<_>>();
            assert_eq!(counts, vec![(regions / apart) as u64; apart]);
        }
    }
}
