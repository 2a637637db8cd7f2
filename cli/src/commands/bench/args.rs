//! The arguments of `snap bench`.

use std::path::PathBuf;
use std::time::Duration;

use super::mode::Mode;
use crate::keys::KeyArgs;
use crate::size;

/// The target that is not a file.
pub(super) const DEMO: &str = "demo";

/// Measure the ways to restore a guest, side by side.
///
/// Restores the guest in each mode in turn, each time in a new process, and lets it run until its work is done. Prints
/// the medians of the runs, and ratios of runs that were made one after the other. docs/benchmarks.md defines each
/// figure.
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
    pub(super) target: PathBuf,

    /// For a layer: a file that may be its parent, or its parent's parent.
    #[arg(long = "parent", value_name = "FILE")]
    pub(super) parents: Vec<PathBuf>,

    #[command(flatten)]
    pub(super) keys: KeyArgs,

    /// The modes to compare.
    #[arg(
        long,
        value_name = "MODES",
        value_delimiter = ',',
        default_value = "eager,mmap,lazy,lazy+hot"
    )]
    pub(super) modes: Vec<Mode>,

    /// How often each mode is run and measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) runs: u32,

    /// Drop the files from the page cache before each run.
    #[arg(long)]
    pub(super) cold: bool,

    /// The work is done when the guest has written this.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["run_for", "beats"],
          value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(super) until: Option<String>,

    /// The work is done after this long.
    #[arg(long = "for", id = "run_for", value_name = "TIME", conflicts_with = "beats",
          value_parser = humantime::parse_duration)]
    pub(super) run_for: Option<Duration>,

    /// The work is done after this many beats; for the demo guest the default is one.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) beats: Option<u64>,

    /// For the demo guest: its memory; 512M by default.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub(super) memory: Option<u64>,

    /// For the demo guest: how much of its memory a beat reads, in percent; 10 by default.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(super) touch: Option<u8>,

    /// For the demo guest: measure with guests that fill all of their memory, and touch these shares of it in percent;
    /// 1, 10, 50 and 100 by default.
    #[arg(long, value_name = "PERCENTS", value_delimiter = ',', num_args = 0..=1, require_equals = true,
          default_missing_value = "1,10,50,100", conflicts_with = "touch",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(super) sweep: Vec<u8>,

    /// Where temporary files are created: the demo guest's snapshot, the raw image.
    #[arg(long, value_name = "DIR")]
    pub(super) dir: Option<PathBuf>,

    /// Give up when the work is not done after this long.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    pub(super) timeout: Duration,

    /// Print everything as JSON: medians, every run, ratios, the timeline of one run.
    #[arg(long)]
    pub(super) json: bool,

    /// Also write a page with tables and plots to this file, without network access and scripts.
    #[arg(long, value_name = "OUT")]
    pub(super) html: Option<PathBuf>,

    /// Replace OUT if it exists.
    #[arg(long, short, requires = "html")]
    pub(super) force: bool,
}
