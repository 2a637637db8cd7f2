//! The cost of a restore from object storage, each figure beside the bound that is wanted for it.
//!
//!     cargo bench -p snapvm-cli --bench remote                 # all
//!     cargo bench -p snapvm-cli --bench remote -- opening      # or: faults, working-set, clones
//!
//! The server is in this process: HTTP with ranges, whose first byte comes after 20 ms, on a link of 1 Gbit/s that all
//! connections share. It records its requests. A request depends on another if it began after the other's answer had
//! ended. Connections to it cost nothing, and so does TLS. Figures of time depend on the machine; nothing is asserted.
#![allow(missing_docs, clippy::unwrap_used)]

mod clones;
#[path = "../../../objects/tests/support/fake.rs"]
#[allow(dead_code, reason = "shared with the tests of the library")]
mod fake;
mod faults;
mod opening;
mod snap;
mod working_set;

use std::time::Duration;

const LATENCY: Duration = Duration::from_millis(20);
/// Bytes a second: 1 Gbit/s.
const LINK: u64 = 125_000_000;

/// How much is measured.
#[derive(Clone, Copy)]
struct Amount {
    rounds: usize,
    faults: usize,
    clones: usize,
    large_guest: &'static str,
    hot_guest: [&'static str; 2],
}

/// Runs one part of the benchmark, and prints its figures.
type Part = fn(Amount);

fn main() {
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let args: Vec<String> = std::env::args().skip(1).collect();
    let full = args.iter().any(|arg| arg == "--bench");
    let amount = match full {
        true => Amount {
            rounds: 15,
            faults: 400,
            clones: 50,
            large_guest: "16G",
            hot_guest: ["1G", "512M"],
        },
        false => Amount {
            rounds: 1,
            faults: 4,
            clones: 3,
            large_guest: "128M",
            hot_guest: ["64M", "16M"],
        },
    };
    let wanted: Vec<_> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let parts: [(&str, Part); 4] = [
        ("opening", opening::measure),
        ("faults", faults::measure),
        ("working-set", working_set::measure),
        ("clones", clones::measure),
    ];
    println!("{:<62} {:>16} {:>16}", "", "measured", "wanted");
    for (name, measure) in parts {
        let needs_vm = name != "faults";
        match vmm::probe() {
            Err(error) if needs_vm => println!("SKIPPED {name}: {error}"),
            _ if wanted.is_empty() || wanted.iter().any(|wanted| *wanted == name) => {
                measure(amount)
            }
            _ => {}
        }
    }
}

/// A line of the table. A missed bound is marked.
fn line(what: &str, measured: f64, unit: &str, wanted: Option<Bound>) {
    let measured_text = format!("{measured:.1} {unit}");
    let (wanted, mark) = match wanted {
        None => (String::new(), ""),
        Some(Bound::AtMost(most)) => {
            (format!("<= {most:.1} {unit}"), if measured > most { "  MISSED" } else { "" })
        }
        Some(Bound::AtLeast(least)) => {
            (format!(">= {least:.1} {unit}"), if measured < least { "  MISSED" } else { "" })
        }
    };
    println!("{what:<62} {measured_text:>16} {wanted:>16}{mark}");
}

/// What is wanted of a figure.
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// The value that this share of the sorted values does not exceed.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * share).ceil() as usize).clamp(1, values.len()) - 1]
}
