//! The text around the figures: what was measured, where, and how; the same in JSON.

use serde_json::{Value, json};
use snapfmt::Snapshot;
use snapfmt::layout::PAGE_BYTES;

use super::args::Args;
use super::figures::{Measured, Ratios};
use super::hot_file::Hot;
use super::run::Outcome;
use super::subject::Subject;
use crate::size;

pub(super) fn host_line() -> String {
    let host = Host::this();
    format!("{}, {} CPUs, Linux {}", host.cpu_name, host.cpus, host.kernel)
}

/// What was measured, in a line.
pub(super) fn headline(args: &Args, subject: &Subject, outcome: &Outcome) -> String {
    format!(
        "{} of memory in a file of {}; work: {}; page cache {}; medians of {}",
        size::human(subject.memory_bytes()),
        size::human(file_bytes(&subject.snapshot)),
        subject.work.describe(),
        page_cache(outcome),
        match args.runs {
            1 => "one run".into(),
            runs => format!("{runs} runs"),
        }
    )
}

/// The sentences below the table.
pub(super) fn footer(subject: &Subject, outcome: &Outcome) -> String {
    let mut text = String::new();
    for (name, hot) in [("lazy+hot", &subject.hot), ("lazy+other", &subject.other)] {
        if let Some(Hot { snapshot, pages, .. }) = hot {
            let bytes = file_bytes(snapshot);
            text += &format!(
                "\n{name}: a working set of {}, in a file of {} ({:.2} x).",
                size::human(pages * PAGE_BYTES as u64),
                size::human(bytes),
                bytes as f64 / file_bytes(&subject.snapshot) as f64
            );
        }
    }
    if outcome.memory_sha256.is_some() {
        text += "\nAfter the work, the guest's memory is the same in all modes.";
    }
    if text.is_empty() { text } else { text + "\n" }
}

pub(super) fn page_cache(outcome: &Outcome) -> String {
    outcome.way.map_or("warm".into(), |way| format!("cold, by {}", way.name()))
}

pub(super) fn to_json(args: &Args, subject: &Subject, outcome: &Outcome, ratios: &Ratios) -> Value {
    let host = Host::this();
    json!({
        "tool_version": env!("CARGO_PKG_VERSION"),
        "host": {
            "cpu": host.cpu_name,
            "cpus": host.cpus,
            "kernel": host.kernel,
        },
        "hot": hot(&subject.hot),
        "other": hot(&subject.other),
        "snapshot": {
            "name": crate::path_text::of(&args.target),
            "memory_bytes": subject.memory_bytes(),
            "file_bytes": file_bytes(&subject.snapshot),
        },
        "work": subject.work.to_json(),
        "page_cache": page_cache(outcome),
        "runs": args.runs,
        "modes": outcome.all.iter().map(Measured::to_json).collect::<Vec<_>>(),
        "ratios": ratios,
        "memory_sha256": outcome.memory_sha256,
    })
}

/// A file with its working set at the front, in JSON.
fn hot(hot: &Option<Hot>) -> Value {
    hot.as_ref().map_or(Value::Null, |hot| {
        json!({
            "working_set_bytes": hot.pages * PAGE_BYTES as u64,
            "file_bytes": file_bytes(&hot.snapshot),
        })
    })
}

/// Bytes of the file, including the parents of a layer.
fn file_bytes(snapshot: &Snapshot) -> u64 {
    snapshot.headers().map(|header| header.file_bytes).sum()
}

/// The host of the measurement.
struct Host {
    cpu_name: String,
    cpus: usize,
    kernel: String,
}

impl Host {
    fn this() -> Self {
        // Nothing else is measured without /proc.
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpus = read("/proc/cpuinfo");
        let name = cpus.lines().find(|line| line.starts_with("model name"));
        let name = name.and_then(|line| line.split_once(": ")).map(|(_, name)| name.trim());
        Self {
            cpu_name: name.unwrap_or("unknown CPU").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }
}
