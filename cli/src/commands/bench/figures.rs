//! The figures of a run, each defined in one place; medians and ratios over runs.
//!
//! docs/benchmarks.md defines them for users, under the same names.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use snapfmt::layout::PAGE_BYTES;

use super::mode::Mode;
use crate::size;
use crate::usage::{Sample, Usage};

/// The parts of the report of `snap restore --report json --measure` that are used here.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Run {
    memory_bytes: u64,
    first_instruction_ms: Option<f64>,
    first_output_ms: Option<f64>,
    end_ms: f64,
    pub(super) stop: String,
    bytes_read: u64,
    pub(super) memory_sha256: Option<String>,
    pager: Option<Paging>,
    process: Usage,
}

#[derive(Clone, Debug, Deserialize)]
struct Paging {
    faults: u64,
    pages: Pages,
    installed: Installed,
    service: Latency,
    service_steps: Vec<Step>,
    read: Latency,
    decode: Latency,
    install: Latency,
}

#[derive(Clone, Debug, Deserialize)]
struct Pages {
    missing: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Installed {
    prefetched: u64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Latency {
    p50_ns: u64,
    p99_ns: u64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Step {
    up_to_ns: u64,
    count: u64,
}

impl Run {
    pub(super) fn timeline(&self) -> &[Sample] {
        &self.process.timeline
    }

    /// Bytes that storage had to deliver.
    pub(super) fn storage_bytes(&self) -> u64 {
        self.process.storage_bytes
    }
}

/// How a figure is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Ms,
    Us,
    Count,
    Bytes,
}

impl Unit {
    pub(super) fn show(self, value: f64) -> String {
        match self {
            Self::Ms if value < 100.0 => format!("{value:.2} ms"),
            Self::Ms => format!("{value:.0} ms"),
            Self::Us if value < 100.0 => format!("{value:.1} us"),
            Self::Us => format!("{value:.0} us"),
            Self::Count => format!("{value:.0}"),
            Self::Bytes => size::human(value as u64),
        }
    }
}

/// One figure: its name in JSON, its label, and how it is taken from a run.
pub(super) struct Figure {
    pub(super) key: &'static str,
    pub(super) label: &'static str,
    pub(super) unit: Unit,
    of: fn(Mode, &Run) -> Option<f64>,
}

/// A percentile of the faults that the pager has served, or of a part of them.
macro_rules! latency {
    ($key:literal, $label:literal, $part:ident, $percentile:ident) => {
        Figure {
            key: $key,
            label: $label,
            unit: Unit::Us,
            of: |_, run| {
                let pager = run.pager.as_ref().filter(|pager| pager.faults > 0)?;
                Some(pager.$part.$percentile as f64 / 1e3)
            },
        }
    };
}

/// All figures, in the order in which they are shown.
pub(super) const FIGURES: &[Figure] = &[
    Figure {
        key: "first_instruction_ms",
        label: "first instruction",
        unit: Unit::Ms,
        of: |_, run| run.first_instruction_ms,
    },
    Figure {
        key: "first_output_ms",
        label: "first output",
        unit: Unit::Ms,
        of: |_, run| run.first_output_ms,
    },
    Figure {
        key: "done_ms",
        label: "workload done",
        unit: Unit::Ms,
        of: |_, run| Some(run.end_ms),
    },
    Figure {
        key: "run_ms",
        label: "run (first instruction to done)",
        unit: Unit::Ms,
        of: |_, run| Some(run.end_ms - run.first_instruction_ms?),
    },
    Figure {
        key: "served_faults",
        label: "faults served by the pager",
        unit: Unit::Count,
        of: |_, run| run.pager.as_ref().map(|pager| pager.faults as f64),
    },
    Figure {
        key: "kernel_minor_faults",
        label: "faults in the kernel, minor",
        unit: Unit::Count,
        of: |_, run| Some(run.process.minor_faults as f64),
    },
    Figure {
        key: "kernel_major_faults",
        label: "faults in the kernel, major",
        unit: Unit::Count,
        of: |_, run| Some(run.process.major_faults as f64),
    },
    Figure {
        key: "file_bytes_read",
        label: "read from the snapshot",
        unit: Unit::Bytes,
        // The kernel reads the image, and a server reads for its clones.
        of: |mode, run| match mode {
            Mode::Mmap | Mode::Shared => None,
            Mode::Eager | Mode::Lazy | Mode::LazyOff | Mode::LazyHot | Mode::LazyOther => {
                Some(run.bytes_read as f64)
            }
        },
    },
    Figure {
        key: "storage_bytes_read",
        label: "read from storage",
        unit: Unit::Bytes,
        of: |_, run| Some(run.process.storage_bytes as f64),
    },
    Figure {
        key: "prefetched_bytes",
        label: "loaded ahead of the guest",
        unit: Unit::Bytes,
        of: |mode, run| {
            let pager = run.pager.as_ref().filter(|_| mode.prefetches())?;
            Some((pager.installed.prefetched * PAGE_BYTES as u64) as f64)
        },
    },
    latency!("fault_p50_us", "fault p50", service, p50_ns),
    latency!("fault_p99_us", "fault p99", service, p99_ns),
    latency!("fault_read_p50_us", "  read p50", read, p50_ns),
    latency!("fault_read_p99_us", "  read p99", read, p99_ns),
    latency!("fault_decode_p50_us", "  decode p50", decode, p50_ns),
    latency!("fault_decode_p99_us", "  decode p99", decode, p99_ns),
    latency!("fault_install_p50_us", "  install p50", install, p50_ns),
    latency!("fault_install_p99_us", "  install p99", install, p99_ns),
    Figure {
        key: "rss_bytes",
        label: "memory, RSS",
        unit: Unit::Bytes,
        of: |_, run| Some(run.process.rss_bytes as f64),
    },
    Figure {
        key: "pss_bytes",
        label: "memory, PSS",
        unit: Unit::Bytes,
        of: |_, run| Some(run.process.pss_bytes as f64),
    },
    Figure {
        key: "unloaded_bytes",
        label: "not loaded at the end",
        unit: Unit::Bytes,
        of: |mode, run| {
            Some(match (mode, &run.pager) {
                (Mode::Eager, _) => 0.0,
                (_, Some(pager)) => (pager.pages.missing * PAGE_BYTES as u64) as f64,
                (_, None) => {
                    run.memory_bytes.saturating_sub(run.process.guest_resident_bytes) as f64
                }
            })
        },
    },
];

/// The runs of one mode.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) mode: Mode,
    pub(super) runs: Vec<Run>,
    /// From a run that is not among the measured ones.
    pub(super) timeline: Vec<Sample>,
}

impl Measured {
    /// The median over the runs, of a figure that this mode has.
    pub(super) fn median(&self, figure: &Figure) -> Option<f64> {
        median(self.values(figure).flatten().collect())
    }

    /// One for each run.
    fn values(&self, figure: &Figure) -> impl Iterator<Item = Option<f64>> {
        self.runs.iter().map(|run| (figure.of)(self.mode, run))
    }

    /// The minimum and the maximum of the runs.
    pub(super) fn spread(&self, figure: &Figure) -> Option<Range<f64>> {
        let least = self.values(figure).flatten().min_by(f64::total_cmp)?;
        let most = self.values(figure).flatten().max_by(f64::total_cmp)?;
        Some(least..most)
    }

    /// The durations of the served faults of all runs: the upper bound of each step in us, and the share of the faults
    /// in it.
    pub(super) fn fault_shares(&self) -> Vec<(f64, f64)> {
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
        for step in self.runs.iter().flat_map(|run| &run.pager).flat_map(|p| &p.service_steps) {
            *counts.entry(step.up_to_ns).or_default() += step.count;
        }
        let all = counts.values().sum::<u64>() as f64;
        counts.into_iter().map(|(ns, count)| (ns as f64 / 1e3, count as f64 / all)).collect()
    }

    pub(super) fn to_json(&self) -> Value {
        let object = |value: &dyn Fn(&Figure) -> Option<f64>| -> Value {
            FIGURES
                .iter()
                .map(|figure| (figure.key.to_owned(), number(figure.unit, value(figure))))
                .collect::<Map<_, _>>()
                .into()
        };
        let runs: Vec<_> =
            self.runs.iter().map(|run| object(&|figure| (figure.of)(self.mode, run))).collect();
        let shares: Vec<_> = self
            .fault_shares()
            .into_iter()
            .map(|(up_to_us, share)| serde_json::json!({ "up_to_us": up_to_us, "share": share }))
            .collect();
        serde_json::json!({
            "mode": self.mode,
            "median": object(&|figure| self.median(figure)),
            "runs": runs,
            "timeline": self.timeline,
            "fault_shares": shares,
        })
    }
}

/// Counts are whole numbers in JSON, too.
fn number(unit: Unit, value: Option<f64>) -> Value {
    match (unit, value) {
        (_, None) => Value::Null,
        (Unit::Count | Unit::Bytes, Some(value)) => (value as u64).into(),
        (Unit::Ms | Unit::Us, Some(value)) => ((value * 1e3).round() / 1e3).into(),
    }
}

/// The figures of which ratios are printed.
const COMPARED: [&str; 5] =
    ["first_instruction_ms", "done_ms", "run_ms", "served_faults", "storage_bytes_read"];

/// The ratio of a figure to that of another mode: figure, mode, other mode. The median of the ratios of the runs of
/// each round, which were made one after the other.
#[derive(Debug, Serialize)]
pub(super) struct Ratios(pub(super) BTreeMap<&'static str, BTreeMap<Mode, BTreeMap<Mode, f64>>>);

impl Ratios {
    pub(super) fn of(all: &[Measured]) -> Self {
        let mut ratios: BTreeMap<_, BTreeMap<_, BTreeMap<_, _>>> = BTreeMap::new();
        for figure in FIGURES.iter().filter(|figure| COMPARED.contains(&figure.key)) {
            for one in all {
                for other in all.iter().filter(|other| other.mode != one.mode) {
                    let rounds = one.values(figure).zip(other.values(figure));
                    let of_rounds = rounds.filter_map(|(a, b)| Some(a? / b?));
                    if let Some(ratio) = median(of_rounds.filter(|x| x.is_finite()).collect()) {
                        let of_mode = ratios.entry(figure.key).or_default();
                        let rounded = (ratio * 1e4).round() / 1e4;
                        of_mode.entry(one.mode).or_default().insert(other.mode, rounded);
                    }
                }
            }
        }
        Self(ratios)
    }

    pub(super) fn get(&self, key: &str, one: Mode, other: Mode) -> Option<f64> {
        self.0.get(key)?.get(&one)?.get(&other).copied()
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len().is_multiple_of(2)) {
        (Some(upper), true) => Some((values[middle - 1] + upper) / 2.0),
        (middle, _) => middle.copied(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_defined_in_the_documentation() {
        let text = include_str!("../../../../docs/benchmarks.md");
        for Figure { key, label, .. } in FIGURES {
            let row = format!("| `{key}` | {} |", label.trim_start());
            assert!(text.contains(&row), "{row}");
        }
    }

    #[test]
    fn medians_of_odd_even_and_no_runs() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
    }
}
