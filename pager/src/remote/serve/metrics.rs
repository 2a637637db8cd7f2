//! Statistics in the text format of Prometheus.

use std::fmt::Write;

use crate::fault::latency::{Latency, Times};
use crate::stats::{PageCounts, RegionStats, Stats};

/// The sums over all guests, including those that have ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    faults: u64,
    bytes_read: u64,
    source_retries: u64,
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
        let by = &stats.installed;
        let counts = [by.demand, by.fault_around, by.zero, by.existing, by.file];
        self.installed.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
        self.guests += 1;
    }
}

/// A guest that is served now.
#[derive(serde::Serialize)]
pub(super) struct Guest {
    pub(super) pid: i32,
    pub(super) stats: Stats,
    pub(super) regions: Vec<RegionStats>,
}

/// The text: totals, and the statistics of each guest that is served now. `totals` are those of guests that have ended.
pub(super) fn text(mut totals: Totals, guests: &[Guest]) -> String {
    guests.iter().for_each(|guest| totals.add(&guest.stats));
    let mut out = String::new();
    let head = |out: &mut String, name: &str, kind: &str, help: &str| {
        // Writing to a String does not fail.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    };
    for (name, kind, help, value) in [
        ("snap_guests", "gauge", "Guests served now.", guests.len() as u64),
        ("snap_guests_total", "counter", "Guests served so far.", totals.guests),
        ("snap_faults_total", "counter", "Page faults answered.", totals.faults),
        ("snap_read_bytes_total", "counter", "Bytes read from the snapshot.", totals.bytes_read),
        ("snap_source_retries_total", "counter", "Loads tried again.", totals.source_retries),
    ] {
        head(&mut out, name, kind, help);
        let _ = writeln!(out, "{name} {value}");
    }
    let name = "snap_pages_installed_total";
    head(&mut out, name, "counter", "Pages brought, by why.");
    for (origin, value) in ORIGINS.iter().zip(totals.installed) {
        let _ = writeln!(out, "{name}{{origin=\"{origin}\"}} {value}");
    }
    let name = "snap_guest_pages";
    head(&mut out, name, "gauge", "Pages of a guest, by what they are now.");
    for Guest { pid, stats, .. } in guests {
        pages(&mut out, name, &format!("pid=\"{pid}\""), &stats.pages);
    }
    let name = "snap_guest_fault_seconds";
    head(&mut out, name, "summary", "Time of a guest's faults: all of it, and the steps of it.");
    for Guest { pid, stats, .. } in guests {
        times(&mut out, name, &format!("pid=\"{pid}\""), &stats.times);
    }
    let name = "snap_guest_region_pages";
    head(&mut out, name, "gauge", "The same of a guest's regions, if it has several.");
    for (labels, region) in several(guests) {
        pages(&mut out, name, &labels, &region.pages);
    }
    let name = "snap_guest_region_fault_seconds";
    head(&mut out, name, "summary", "The same of a guest's regions, if it has several.");
    for (labels, region) in several(guests) {
        region.times.iter().for_each(|of_region| times(&mut out, name, &labels, of_region));
    }
    out
}

/// The regions of guests that have more than one, and not so many that their statistics are joined.
fn several(guests: &[Guest]) -> impl Iterator<Item = (String, &RegionStats)> {
    let guests = guests.iter().filter(|guest| guest.regions.len() > 1);
    let all = guests.flat_map(|guest| {
        guest.regions.iter().map(|region| {
            let offset = region.source_offset;
            (format!("pid=\"{}\",source_offset=\"{offset:#x}\"", guest.pid), region)
        })
    });
    all.filter(|(_, region)| region.times.is_some())
}

fn pages(out: &mut String, name: &str, labels: &str, pages: &PageCounts) {
    for (state, value) in [
        ("missing", pages.missing),
        ("present", pages.present),
        ("removed", pages.removed),
        ("poisoned", pages.poisoned),
    ] {
        let _ = writeln!(out, "{name}{{{labels},state=\"{state}\"}} {value}");
    }
}

fn times(out: &mut String, name: &str, labels: &str, times: &Times) {
    let steps: [(&str, &Latency); 5] = [
        ("service", &times.service),
        ("queue", &times.queue),
        ("read", &times.read),
        ("decode", &times.decode),
        ("install", &times.install),
    ];
    for (step, latency) in steps {
        let labels = format!("{labels},step=\"{step}\"");
        for (quantile, ns) in [("0.5", latency.p50_ns), ("0.99", latency.p99_ns)] {
            let seconds = ns as f64 / 1e9;
            let _ = writeln!(out, "{name}{{{labels},quantile=\"{quantile}\"}} {seconds}");
        }
        let sum = latency.mean_ns * latency.count as f64 / 1e9;
        let _ = writeln!(out, "{name}_sum{{{labels}}} {sum}");
        let _ = writeln!(out, "{name}_count{{{labels}}} {}", latency.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_that_have_ended_still_count() {
        let mut stats = Stats { faults: 5, bytes_read: 7, ..Stats::default() };
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
        let text = text(ended, &[Guest { pid: 42, stats, regions }]);
        for line in [
            "snap_guests 1",
            "snap_guests_total 2",
            "snap_faults_total 10",
            "snap_read_bytes_total 14",
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
