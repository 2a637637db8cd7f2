//! Figures in the text format of Prometheus.

use std::fmt::Write;

use crate::stats::{Latency, Stats};

/// What was done for all guests, those that have ended too.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    faults: u64,
    bytes_read: u64,
    source_retries: u64,
    /// Demand, fault-around, zero, existing, file.
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

/// The text: totals, and each guest that is served now. `totals` are those of guests that have ended.
pub(crate) fn text(mut totals: Totals, guests: &[(i32, Stats)]) -> String {
    guests.iter().for_each(|(_, stats)| totals.add(stats));
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
    for (pid, stats) in guests {
        let pages = &stats.pages;
        for (state, value) in [
            ("missing", pages.missing),
            ("present", pages.present),
            ("removed", pages.removed),
            ("poisoned", pages.poisoned),
        ] {
            let _ = writeln!(out, "{name}{{pid=\"{pid}\",state=\"{state}\"}} {value}");
        }
    }
    let name = "snap_guest_fault_seconds";
    head(&mut out, name, "summary", "Time of a guest's faults: all of it, and the steps of it.");
    for (pid, stats) in guests {
        let steps: [(&str, &Latency); 4] = [
            ("service", &stats.service),
            ("read", &stats.read),
            ("decode", &stats.decode),
            ("install", &stats.install),
        ];
        for (step, latency) in steps {
            let labels = format!("pid=\"{pid}\",step=\"{step}\"");
            for (quantile, ns) in [("0.5", latency.p50_ns), ("0.99", latency.p99_ns)] {
                let seconds = ns as f64 / 1e9;
                let _ = writeln!(out, "{name}{{{labels},quantile=\"{quantile}\"}} {seconds}");
            }
            let sum = latency.mean_ns * latency.count as f64 / 1e9;
            let _ = writeln!(out, "{name}_sum{{{labels}}} {sum}");
            let _ = writeln!(out, "{name}_count{{{labels}}} {}", latency.count);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_that_have_ended_still_count() {
        let mut stats = Stats { faults: 5, bytes_read: 7, ..Stats::default() };
        stats.installed.zero = 3;
        stats.pages.missing = 9;
        stats.service =
            Latency { count: 2, p50_ns: 1000, p99_ns: 2000, max_ns: 2000, mean_ns: 1500.0 };
        let mut ended = Totals::default();
        ended.add(&stats);
        let text = text(ended, &[(42, stats)]);
        for line in [
            "snap_guests 1",
            "snap_guests_total 2",
            "snap_faults_total 10",
            "snap_read_bytes_total 14",
            "snap_pages_installed_total{origin=\"zero\"} 6",
            "snap_guest_pages{pid=\"42\",state=\"missing\"} 9",
            "snap_guest_fault_seconds{pid=\"42\",step=\"service\",quantile=\"0.99\"} 0.000002",
            "snap_guest_fault_seconds_sum{pid=\"42\",step=\"service\"} 0.000003",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
        // Each name is described once, before its values.
        assert_eq!(text.matches("# TYPE snap_guest_pages ").count(), 1);
    }
}
