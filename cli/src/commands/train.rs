//! `snap train`: records several restores, and stores which pages the guest touches.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use pager::Populate;
use serde::Serialize;
use snapfmt::{Phase, WorkingSet};
use snapvm::{MemoryFrom, Pace, Touched};

use crate::devices::SavedDeviceArgs;
use crate::input::Input;
use crate::jailed::Jail;
use crate::live::EndArgs;
use crate::millis::ms;
use crate::restored_run::{LAZY, Restore};
use crate::restoring;
use crate::session::Session;
use crate::stdout::{print_json, print_line};
use crate::working_set_file::Output;

/// Restore a guest several times, record which pages it touches, and store them as the working set of a copy of the
/// file.
///
/// A lazy restore of the copy loads these pages before they are touched; `snap optimize` puts them together. The file
/// itself is not changed. Each run writes to the guest's writable disks: give it copies of them.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap train demo.snap --beats 1 -o trained.snap
  snap train guest.snap --until 'server ready' --runs 5 -o trained.snap
  snap train guest.snap --for 2s -o trained.snap && snap optimize trained.snap -o fast.snap")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// The file to write. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap")]
    out: PathBuf,

    /// How often the guest is restored.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,

    #[command(flatten)]
    end: EndArgs,

    #[command(flatten)]
    devices: SavedDeviceArgs,

    /// Replace the output if it exists.
    #[arg(long, short)]
    force: bool,

    /// Restore even if this host's CPU lacks features of the guest's CPU.
    #[arg(long)]
    force_cpu: bool,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// The result of the recording.
#[derive(Serialize)]
struct Summary {
    #[serde(serialize_with = "crate::path_text::serialize")]
    file: PathBuf,
    id: String,
    runs: u16,
    /// Pages that each run touched.
    pages_of_runs: Vec<usize>,
    /// Pages of the joined set, and in each phase.
    pages: u64,
    pages_by_phase: [u64; 4],
    /// Pages that all runs touched.
    in_all_runs: u64,
    total_ms: f64,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    if args.end.beats.is_none() && args.end.until.is_none() && args.end.run_for.is_none() {
        bail!("give the end of a run: --until TEXT, --for TIME or, of the demo guest, --beats N");
    }
    let output = Output { path: &args.out, replace: args.force };
    let snapshot = args.input.open()?;
    output.check(&snapshot)?;
    let mut runs = Vec::new();
    for number in 1..=args.runs {
        let touched = touched(args, session).with_context(|| format!("run {number}"))?;
        if !session.quiet && !args.json {
            print_line(format_args!("run {number}: {} pages touched", touched.len()))?;
        }
        runs.push(touched);
    }
    let set = WorkingSet::join(runs.iter().map(Vec::as_slice));
    let in_all_runs = set.runs().iter().filter(|run| u16::from(run.seen) >= args.runs.min(255));
    let in_all_runs = in_all_runs.map(|run| u64::from(run.pages)).sum();
    let (pages, pages_by_phase) = (set.len(), set.pages_by_phase());
    let header = output.write(&snapshot, set, session)?;
    let summary = Summary {
        file: args.out.clone(),
        id: header.id.to_string(),
        runs: args.runs,
        pages_of_runs: runs.iter().map(Vec::len).collect(),
        pages,
        pages_by_phase,
        in_all_runs,
        total_ms: ms(session.started.elapsed()),
    };
    if args.json {
        return print_json(&summary);
    }
    if !session.quiet {
        let phases = Phase::ALL.iter().zip(pages_by_phase).filter(|(_, pages)| *pages > 0);
        let phases: Vec<_> =
            phases.map(|(phase, pages)| format!("{pages} {}", phase.name())).collect();
        print_line(format_args!(
            "{}: a working set of {pages} pages, {in_all_runs} of them in all runs: {}",
            summary.file.display(),
            phases.join(", "),
        ))?;
    }
    Ok(())
}

/// One run.
fn touched(args: &Args, session: &Session) -> Result<Touched> {
    let config = restoring::config(&args.input.file, &args.input.parents, None, session)?
        .memory(MemoryFrom::Recorded)
        .populate(Populate::Off, None)
        .force_cpu(args.force_cpu)
        .devices(args.devices.connections());
    let restore = Restore {
        config,
        mode: LAZY,
        pace: Pace::Closely,
        until: args.end.until(),
        run_for: args.end.run_for,
        hold: None,
        hash: false,
        keyboard: false,
        measure: None,
        api: None,
        paused: false,
        jail: Jail::Off,
        keys: args.input.parents.keys.clone(),
        names_files: true,
        on_restore: None,
    };
    let (report, outcome) = restore.run(std::io::sink(), session, Instant::now())?;
    outcome?;
    report.touched.context("nothing was recorded")
}
