//! Statistics in the text format of Prometheus, by the encoder of the crate `prometheus`.
//!
//! The values are made for each answer: the pager keeps its own statistics, so nothing is registered. The crate
//! `prometheus-client` has no summaries.

use prometheus::TextEncoder;
use prometheus::proto::MetricType::{COUNTER, GAUGE, SUMMARY};
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, Quantile, Summary};

use crate::fault::latency::{Latency, Times};
use crate::stats::{PageCounts, RegionStats, Stats};

/// The `Content-Type` of [`ServerHandle::metrics`](super::ServerHandle::metrics): the text format 0.0.4.
pub const METRICS_CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// The sums over all guests, including those that have ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    faults: u64,
    bytes_read: u64,
    source_retries: u64,
    stalls: u64,
    /// In the order of `ORIGINS`.
    installed: [u64; 5],
    guests: u64,
}

const ORIGINS: [&str; 5] = ["demand", "fault_around", "zero", "existing", "file"];

impl Totals {
    pub(crate) fn add(&mut self, stats: &Stats) {
        self.faults += stats.faults;
        self.bytes_read += stats.bytes_read;
        self.source_retries += stats.source_retries;
        self.stalls += stats.stalls;
        let by = &stats.installed;
        let counts = [by.demand, by.fault_around, by.zero, by.existing, by.file];
        self.installed.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
        self.guests += 1;
    }
}

/// A guest that is served now.
#[derive(serde::Serialize)]
pub(super) struct Guest {
    /// Its number in this server.
    #[serde(skip)]
    pub(super) id: u64,
    pub(super) pid: i32,
    pub(super) stats: Stats,
    pub(super) regions: Vec<RegionStats>,
}

/// The text: totals, and the statistics of each guest that is served now. `totals` are those of guests that have ended.
/// A name without values is left out.
pub(super) fn text(mut totals: Totals, guests: &[Guest]) -> String {
    guests.iter().for_each(|guest| totals.add(&guest.stats));
    let mut families = Vec::new();
    let mut add = |name: &str, kind, help: &str, metrics: Vec<Metric>| {
        let mut family = MetricFamily::default();
        family.set_name(name.into());
        family.set_field_type(kind);
        family.set_help(help.into());
        family.set_metric(metrics);
        families.push(family);
    };
    add("snap_guests", GAUGE, "Guests served now.", vec![gauge(&[], guests.len() as u64)]);
    for (name, help, value) in [
        ("snap_guests_total", "Guests served so far.", totals.guests),
        ("snap_faults_total", "Page faults answered.", totals.faults),
        ("snap_read_bytes_total", "Bytes read from the snapshot.", totals.bytes_read),
        ("snap_source_retries_total", "Loads tried again.", totals.source_retries),
        ("snap_stalls_total", "Faults that have waited for more than a second.", totals.stalls),
    ] {
        add(name, COUNTER, help, vec![counter(&[], value)]);
    }
    let installed = ORIGINS.iter().zip(totals.installed);
    let installed = installed.map(|(origin, count)| counter(&[label("origin", origin)], count));
    add("snap_pages_installed_total", COUNTER, "Pages installed, by origin.", installed.collect());

    let of_guests: Vec<_> = guests.iter().map(|guest| ([pid(guest)], &guest.stats)).collect();
    let metrics = of_guests.iter().flat_map(|(labels, stats)| pages(labels, &stats.pages));
    let help = "Pages of a guest, by what they are now.";
    add("snap_guest_pages", GAUGE, help, metrics.collect());
    let metrics = of_guests.iter().map(|(labels, stats)| gauge(labels, stats.stalled));
    let help = "Faults of a guest that have waited for more than a second, and still wait.";
    add("snap_guest_stalled_faults", GAUGE, help, metrics.collect());
    let metrics = of_guests.iter().flat_map(|(labels, stats)| times(labels, &stats.times));
    let help = "Time of a guest's faults: all of it, and the steps of it.";
    add("snap_guest_fault_seconds", SUMMARY, help, metrics.collect());

    let of_regions: Vec<_> = several(guests).collect();
    let help = "The same of a guest's regions, if it has several.";
    let metrics = of_regions.iter().flat_map(|(labels, region, _)| pages(labels, &region.pages));
    add("snap_guest_region_pages", GAUGE, help, metrics.collect());
    let metrics =
        of_regions.iter().flat_map(|(labels, _, region_times)| times(labels, region_times));
    add("snap_guest_region_fault_seconds", SUMMARY, help, metrics.collect());

    families.retain(|family| !family.get_metric().is_empty());
    TextEncoder::new().encode_to_string(&families).expect("each family has a name and values")
}

/// The regions of guests that have more than one, and not so many that their statistics are joined.
fn several(guests: &[Guest]) -> impl Iterator<Item = ([LabelPair; 2], &RegionStats, &Times)> {
    let guests = guests.iter().filter(|guest| guest.regions.len() > 1);
    guests.flat_map(|guest| {
        guest.regions.iter().filter_map(|region| {
            let offset = label("source_offset", &format!("{:#x}", region.source_offset));
            Some(([pid(guest), offset], region, region.times.as_ref()?))
        })
    })
}

fn pages(labels: &[LabelPair], pages: &PageCounts) -> [Metric; 4] {
    let states = [
        ("missing", pages.missing),
        ("present", pages.present),
        ("removed", pages.removed),
        ("poisoned", pages.poisoned),
    ];
    states.map(|(state, count)| gauge(&[labels, &[label("state", state)]].concat(), count))
}

fn times(labels: &[LabelPair], times: &Times) -> [Metric; 5] {
    let steps = [
        ("service", &times.service),
        ("queue", &times.queue),
        ("read", &times.read),
        ("decode", &times.decode),
        ("install", &times.install),
    ];
    steps.map(|(step, latency)| summary(&[labels, &[label("step", step)]].concat(), latency))
}

/// The process id. Several guests in other PID namespaces have process id 0: their numbers make the labels differ.
fn pid(guest: &Guest) -> LabelPair {
    match guest.pid {
        0 => label("pid", &format!("0/{}", guest.id)),
        pid => label("pid", &pid.to_string()),
    }
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut label = LabelPair::default();
    label.set_name(name.into());
    label.set_value(value.into());
    label
}

fn gauge(labels: &[LabelPair], value: u64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value as f64);
    let mut metric = Metric::from_label(labels.into());
    metric.set_gauge(gauge);
    metric
}

fn counter(labels: &[LabelPair], value: u64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value as f64);
    let mut metric = Metric::from_label(labels.into());
    metric.set_counter(counter);
    metric
}

fn summary(labels: &[LabelPair], latency: &Latency) -> Metric {
    let quantiles = [(0.5, latency.p50_ns), (0.99, latency.p99_ns)].map(|(of, ns)| {
        let mut quantile = Quantile::default();
        quantile.set_quantile(of);
        quantile.set_value(ns as f64 / 1e9);
        quantile
    });
    let mut summary = Summary::default();
    summary.set_quantile(quantiles.into());
    summary.set_sample_sum(latency.mean_ns * latency.count as f64 / 1e9);
    summary.set_sample_count(latency.count);
    let mut metric = Metric::from_label(labels.into());
    metric.set_summary(summary);
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_that_have_ended_still_count() {
        let (stalled, stalls) = (1, 3);
        let mut stats = Stats { faults: 5, bytes_read: 7, stalled, stalls, ..Stats::default() };
        stats.installed.zero = 3;
        stats.pages.missing = 9;
        stats.times.service =
            Latency { count: 2, p50_ns: 1000, p99_ns: 2000, max_ns: 2000, mean_ns: 1500.0 };
        let mut ended = Totals::default();
        ended.add(&stats);
        let region = |source_offset| {
            let pages = PageCounts { present: 4, ..PageCounts::default() };
            let times = Some(stats.times);
            RegionStats { source_offset, pages, times, ..RegionStats::default() }
        };
        let regions = vec![region(0), region(0x5000)];
        let text = text(ended, &[Guest { id: 3, pid: 42, stats, regions }]);
        for line in [
            "snap_guests 1",
            "snap_guests_total 2",
            "snap_faults_total 10",
            "snap_read_bytes_total 14",
            "snap_stalls_total 6",
            "snap_guest_stalled_faults{pid=\"42\"} 1",
            "snap_pages_installed_total{origin=\"zero\"} 6",
            "snap_guest_pages{pid=\"42\",state=\"missing\"} 9",
            "snap_guest_fault_seconds{pid=\"42\",step=\"service\",quantile=\"0.99\"} 0.000002",
            "snap_guest_fault_seconds_sum{pid=\"42\",step=\"service\"} 0.000003",
            "snap_guest_fault_seconds_count{pid=\"42\",step=\"queue\"} 0",
            "snap_guest_region_pages{pid=\"42\",source_offset=\"0x5000\",state=\"present\"} 4",
            "snap_guest_region_fault_seconds_count{pid=\"42\",source_offset=\"0x0\",step=\"service\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
        // Each name is described once, before its values.
        assert_eq!(text.matches("# TYPE snap_guest_pages ").count(), 1);
    }
}
