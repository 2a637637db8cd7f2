//! `snap bench`: what the ways to restore a guest cost, side by side.

mod child;
mod cold;
mod figures;
mod hot;
mod html;
mod mode;
mod run;
mod subject;
mod sweep;
mod table;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use snapfmt::Snapshot;
use snapfmt::layout::PAGE_BYTES;

use self::child::Snap;
use self::figures::{Measured, Ratios};
use self::hot::Hot;
use self::mode::Mode;
use self::run::{Outcome, Plan};
use self::subject::Subject;
use super::Session;
use super::foreign::staging::{Shape, Staging};
use super::stdout::{print_line, print_text};
use crate::size;

/// The target that is no file.
const DEMO: &str = "demo";

/// Measure the ways to restore a guest, side by side.
///
/// Restores the guest in each mode in turn, each time in a new process, and lets it run until its work is done.
/// Tells the medians of the runs, and ratios of runs that were made one after the other. What each figure is, is
/// said in docs/benchmarks.md.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap bench demo                                  a guest with 512 MiB that touches 10 % of it
  snap bench demo --cold --runs 9 --memory 1G --touch 5
  snap bench demo --sweep --modes eager,mmap,lazy,lazy-off --html sweep.html
  snap bench linux.snap --until 'work is done' --modes lazy,mmap --json
  snap bench linux.snap --for 2s --dir /var/tmp --html linux.html")]
pub(crate) struct Args {
    /// The snapshot; `demo` makes one of the demo guest (a file of that name: ./demo).
    #[arg(value_name = "FILE|demo")]
    target: PathBuf,

    /// Of a layer: a file that may be its parent, or its parent's.
    #[arg(long = "parent", value_name = "FILE")]
    parents: Vec<PathBuf>,

    /// The modes to compare.
    #[arg(
        long,
        value_name = "MODES",
        value_delimiter = ',',
        default_value = "eager,mmap,lazy,lazy+hot"
    )]
    modes: Vec<Mode>,

    /// How often each mode is run and measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,

    /// Drop the files from the page cache before each run.
    #[arg(long)]
    cold: bool,

    /// The work is done when the guest has written this.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["run_for", "beats"],
          value_parser = clap::builder::NonEmptyStringValueParser::new())]
    until: Option<String>,

    /// The work is done after this long.
    #[arg(long = "for", id = "run_for", value_name = "TIME", conflicts_with = "beats",
          value_parser = humantime::parse_duration)]
    run_for: Option<Duration>,

    /// The work is done after this many beats; of the demo guest one, unless told.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    beats: Option<u64>,

    /// Of the demo guest: its memory; 512M unless told.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// Of the demo guest: how much of its memory a beat reads, in percent; 10 unless told.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    touch: Option<u8>,

    /// Of the demo guest: measure with guests that fill all of their memory, and touch these shares of that in percent; 1,
    /// 10, 50 and 100 unless told.
    #[arg(long, value_name = "PERCENTS", value_delimiter = ',', num_args = 0..=1, require_equals = true,
          default_missing_value = "1,10,50,100", conflicts_with = "touch",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    sweep: Vec<u8>,

    /// Where temporary files are made: the demo guest's snapshot, the raw image.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Give up when the work is not done after this long.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    timeout: Duration,

    /// Print everything as JSON: medians, every run, ratios, the course of one run.
    #[arg(long)]
    json: bool,

    /// Also write a page with tables and plots to this file: it needs no network and no scripts.
    #[arg(long, value_name = "OUT")]
    html: Option<PathBuf>,

    /// Replace OUT if it exists.
    #[arg(long, short, requires = "html")]
    force: bool,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    for (number, mode) in args.modes.iter().enumerate() {
        if args.modes[..number].contains(mode) {
            bail!("--modes: {mode} is there twice");
        }
    }
    // Before the runs: it may be refused.
    let page = args.html.as_deref().map(|out| Staging::new(out, Shape::File, args.force));
    let page = page.transpose()?;
    let snap = Snap::new(session)?;
    let steps = Steps::new(args, session.quiet);
    args.refuse_sweep_of_others()?;
    if !args.sweep.is_empty() {
        return sweep::run(args, &snap, page, steps);
    }
    let subject = Subject::prepare(args, None, &snap, &|what| steps.say(what))?;
    let plan = Plan {
        subject: &subject,
        snap: &snap,
        modes: &args.modes,
        rounds: args.runs,
        cold: args.cold,
        timeout: args.timeout,
    };
    let outcome = plan.run(&|what| steps.next(what))?;
    drop(steps);
    let ratios = Ratios::of(&outcome.all);
    if let Some(page) = page {
        let text = html(args, &subject, &outcome, &ratios);
        let written = page.file()?.write_all(text.as_bytes());
        written.context("cannot write the page")?;
        page.publish()?;
    }
    match args.json {
        true => {
            let all = to_json(args, &subject, &outcome, &ratios);
            print_line(serde_json::to_string_pretty(&all)?)
        }
        false => {
            let (head, foot) = (headline(args, &subject, &outcome), footer(&subject, &outcome));
            let name = args.target.display();
            print_text(format!("{name}: {head}\n\n{}{foot}", table::table(&outcome.all, &ratios)))
        }
    }
}

fn html(args: &Args, subject: &Subject, outcome: &Outcome, ratios: &Ratios) -> String {
    let words = html::Words {
        name: &args.target.display().to_string(),
        subject: &headline(args, subject, outcome),
        host: &host_line(),
        footer: &footer(subject, outcome),
    };
    html::page(&words, &outcome.all, ratios)
}

fn host_line() -> String {
    let host = Host::this();
    format!("{}, {} CPUs, Linux {}", host.cpu_name, host.cpus, host.kernel)
}

/// What was measured, in a line.
fn headline(args: &Args, subject: &Subject, outcome: &Outcome) -> String {
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

/// What else is worth a sentence.
fn footer(subject: &Subject, outcome: &Outcome) -> String {
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

fn page_cache(outcome: &Outcome) -> String {
    outcome.way.map_or("warm".into(), |way| format!("cold, by {}", way.name()))
}

fn to_json(args: &Args, subject: &Subject, outcome: &Outcome, ratios: &Ratios) -> Value {
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
            "name": args.target,
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

/// A file with hot pages in front, in JSON.
fn hot(hot: &Option<Hot>) -> Value {
    hot.as_ref().map_or(Value::Null, |hot| {
        json!({
            "working_set_bytes": hot.pages * PAGE_BYTES as u64,
            "file_bytes": file_bytes(&hot.snapshot),
        })
    })
}

/// Bytes of the file, of a layer its parents' too.
fn file_bytes(snapshot: &Snapshot) -> u64 {
    snapshot.headers().map(|header| header.file_bytes).sum()
}

/// Where it was measured.
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

/// What is being done, on stderr.
struct Steps(ProgressBar);

impl Steps {
    fn new(args: &Args, quiet: bool) -> Self {
        let target = match quiet {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr_with_hz(10),
        };
        let guests = args.sweep.len().max(1) as u64;
        let runs = guests * args.modes.len() as u64 * (u64::from(args.runs) + 1);
        let bar = ProgressBar::with_draw_target(Some(runs), target);
        // A constant; were it wrong, the bar would look plain.
        if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar)
    }

    fn say(&self, what: &str) {
        self.0.set_message(what.to_owned());
        self.0.tick();
    }

    /// The one before is over.
    fn next(&self, what: &str) {
        self.0.set_message(what.to_owned());
        self.0.inc(1);
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
