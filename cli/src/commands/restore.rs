//! `snap restore`: restores a guest, with all its memory first or page by page.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use pager::shared::ANSWER_TIMEOUT;
use pager::{Placement, Populate};
use rustix::process::{Signal, set_parent_process_death_signal};
use snapfmt::WorkingSet;
use snapvm::{MemoryFrom, Pace};

use crate::api::ApiArgs;
use crate::devices::SavedDeviceArgs;
use crate::exit::Interrupted;
use crate::foreign_text;
use crate::guest_output::GuestOutput;
use crate::input::Input;
use crate::interrupt::Interrupt;
use crate::jailed::{GuestJailArgs, Needs};
use crate::live::EndArgs;
use crate::on_restore::OnRestore;
use crate::pager_args::{OnError, PrefetchArg};
use crate::restored_run::{EAGER, LAZY, Restore};
use crate::session::Session;
use crate::usage::Measure;
use crate::waits::{self, Wait};
use crate::working_set_file::Output;
use crate::{restoring, size, stderr};

/// Restore a guest and run it.
///
/// The guest's serial port is connected to stdin and stdout. Ctrl-C ends the run.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap restore demo.snap --beats 3            read all memory, then run for three beats
  snap restore --lazy demo.snap --for 2s      run immediately, load pages when they are touched
  snap restore --lazy demo.snap --until 'beat 7' --report json")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    #[command(flatten)]
    devices: SavedDeviceArgs,

    /// Run immediately; pages are loaded from the file when the guest touches them.
    #[arg(long)]
    lazy: bool,

    /// With --lazy: take the pages from the `snap serve` of the same snapshot at this socket, and share
    /// them with its other clones.
    #[arg(long, value_name = "SOCKET", requires = "lazy",
          conflicts_with_all = ["on_error", "populate", "placement", "prefetch", "record"])]
    share: Option<PathBuf>,

    #[command(flatten)]
    end: EndArgs,

    #[command(flatten)]
    api: ApiArgs,

    #[command(flatten)]
    pub(crate) jail: GuestJailArgs,

    /// With --api: do not run before a client resumes the guest. Background loading starts meanwhile.
    #[arg(long, requires = "api", conflicts_with = "record")]
    paused: bool,

    /// Fail unless the guest has exactly this much memory.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// With --lazy: what to do about a page that cannot be read or is damaged.
    #[arg(long, value_name = "POLICY", default_value = "poison", requires = "lazy")]
    on_error: OnError,

    /// With --lazy: load pages that the guest has not touched in the background. `auto`: while the guest waits for
    /// pages a good part of its time; `idle`: only while it has no faults; `full`: from the start to the end. Faults go
    /// first. RATE limits the bytes a second: `full,200M`.
    #[arg(
        long,
        value_name = "off|auto|idle|full[,RATE]",
        default_value = "auto",
        requires = "lazy"
    )]
    populate: Background,

    /// With --lazy: load pages ahead of the guest. `hot`: those of the file's working set (`snap train` records one);
    /// `all`: then all other pages.
    #[arg(
        long,
        value_name = "off|hot|all",
        default_value = "hot",
        requires = "lazy",
        hide_possible_values = true
    )]
    prefetch: PrefetchArg,

    /// With --lazy: record which pages the guest touches, and store them as the working set of a copy of the file. No
    /// page is loaded ahead.
    #[arg(long, requires_all = ["lazy", "out"], conflicts_with_all = ["prefetch", "populate"])]
    record: bool,

    /// With --record: the file to write. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap", requires = "record")]
    out: Option<PathBuf>,

    /// Replace the output of --record if it exists.
    #[arg(short, long, requires = "record")]
    force: bool,

    /// With --lazy: on which CPUs the threads that answer faults run.
    #[arg(long, value_name = "PLACE", default_value = "follow", requires = "lazy")]
    placement: Place,

    /// The guest's clocks.
    #[arg(long, value_name = "CLOCK", default_value = "advance")]
    clock: ClockArg,

    /// Restore even if this host's CPU lacks features of the guest's CPU.
    #[arg(long)]
    force_cpu: bool,

    /// When the guest runs, `sh` runs this command once, with $SNAP_ID, $SNAP_GENERATION_ID and $SNAP_API (the control
    /// socket). If it fails, the guest is stopped: exit code 1. See docs/uniqueness.md.
    #[arg(long, value_name = "CMD", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    on_restore: Option<String>,

    /// At the end, hash all of the guest's memory (a lazy restore loads it for that).
    #[arg(long)]
    hash: bool,

    /// Map this raw image of the memory privately, instead of reading the pages of the file. For `snap bench`.
    #[arg(long, value_name = "IMAGE", hide = true, conflicts_with = "lazy")]
    image: Option<PathBuf>,

    /// Also report the resources that the process has used, and end with the process that started this one. For `snap
    /// bench`.
    #[arg(long, value_name = "WHAT", hide = true)]
    measure: Option<Measure>,

    /// How to report on stderr at the end.
    #[arg(long, value_name = "FORM", default_value = "text")]
    report: ReportForm,

    /// Report as JSON, on stderr: the same as --report json.
    #[arg(long, conflicts_with = "report")]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Place {
    /// On the CPU of the vCPU that faults.
    Follow,
    /// Awake: they poll for faults as long as faults come.
    Spin,
    /// Where the scheduler puts them.
    None,
}

/// `off`, `auto`, `idle` or `full`, and the limit of bytes a second.
#[derive(Clone, Copy)]
struct Background(Populate, Option<NonZeroU64>);

impl FromStr for Background {
    type Err = String;

    fn from_str(text: &str) -> Result<Background, String> {
        let (mode, rate) = match text.split_once(',') {
            None => (text, None),
            Some((mode, rate)) => {
                let rate = size::parse(rate).map_err(|error| format!("{rate:?}: {error}"))?;
                (mode, Some(NonZeroU64::new(rate).ok_or("a rate of 0 loads nothing: use `off`")?))
            }
        };
        match (mode, rate) {
            ("off", None) => Ok(Background(Populate::Off, None)),
            ("auto", rate) => Ok(Background(Populate::Auto, rate)),
            ("idle", rate) => Ok(Background(Populate::Idle, rate)),
            ("full", rate) => Ok(Background(Populate::Full, rate)),
            _ => {
                Err("give `off`, `auto`, `idle` or `full`, the last three also with a rate".into())
            }
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum ClockArg {
    /// Continue as if the guest had slept since the snapshot.
    Advance,
    /// Continue as if no time had passed.
    Keep,
}

impl From<ClockArg> for vmm::Clock {
    fn from(arg: ClockArg) -> Self {
        match arg {
            ClockArg::Advance => Self::Advance,
            ClockArg::Keep => Self::Keep,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ReportForm {
    Text,
    Json,
    None,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let form = if args.json { ReportForm::Json } else { args.report };
    if form == ReportForm::Json {
        // Stderr is for the program that reads the report.
        waits::be_quiet();
    }
    if args.input.parents.trust.is_required() && (args.image.is_some() || args.share.is_some()) {
        bail!(
            "--expect-root and --require-signature check what is read from the snapshot; with --image and --share the \
             memory comes from elsewhere: give the option to the snap serve that shares it"
        );
    }
    if args.input.parents.keys.is_given() && args.image.is_some() {
        bail!("with a key, what is read must be sealed, and the memory in --image is not");
    }
    let (out, hold) = GuestOutput::new().context("cannot use stdout")?;
    let (memory, mode) = match (&args.image, &args.share) {
        (Some(image), _) => (MemoryFrom::Image(image.clone()), "mmap"),
        (None, Some(socket)) => {
            // At most as long as the guest is to run.
            let timeout = args.end.run_for.map_or(ANSWER_TIMEOUT, |time| time.min(ANSWER_TIMEOUT));
            (MemoryFrom::Shared { socket: socket.clone(), timeout }, "shared")
        }
        (None, None) if args.record => (MemoryFrom::Recorded, LAZY),
        (None, None) if args.lazy => (MemoryFrom::Lazy, LAZY),
        (None, None) => (MemoryFrom::Eager, EAGER),
    };
    let config = restoring::config(&args.input.file, &args.input.parents, args.memory, session)?
        .memory(memory)
        .on_error(args.on_error.into())
        .populate(args.populate.0, args.populate.1)
        .prefetch(args.prefetch.into())
        .placement(match args.placement {
            Place::Follow => Placement::Follow,
            Place::Spin => Placement::Spin,
            Place::None => Placement::None,
        })
        .clock(args.clock.into())
        .force_cpu(args.force_cpu)
        // Its control socket can reset it.
        .quick_resets(args.api.api.is_some())
        .devices(args.devices.connections());
    let keys = &args.input.parents.keys;
    let needs = Needs {
        snapshot: Some(config.snapshot()),
        out: args.out.as_deref(),
        api: args.api.api.is_some(),
        network: false,
        command: args.on_restore.is_some(),
    };
    let jail = args.jail.begin_restore(needs, keys, &session.interrupt)?;
    let restore = Restore {
        config,
        mode,
        pace: Pace::InPassing,
        until: args.end.until(),
        run_for: args.end.run_for,
        hold: Some(hold),
        hash: args.hash,
        keyboard: args.measure.is_none(),
        measure: args.measure,
        api: args.api.bind()?,
        paused: args.paused,
        jail,
        keys: args.input.parents.keys.clone(),
        names_files: args.jail.names_files(),
        on_restore: args.on_restore.clone().map(|command| {
            let api = args.api.api.clone();
            OnRestore { command, api }
        }),
    };
    let output = match &args.out {
        Some(path) => Some((Output { path, replace: args.force }, args.input.open()?)),
        None => None,
    };
    if let Some((output, snapshot)) = &output {
        output.check(snapshot)?;
    }
    if args.measure.is_some() {
        let with_parent = set_parent_process_death_signal(Some(Signal::KILL));
        with_parent.context("cannot be tied to the process that measures")?;
    }
    let (report, outcome) = restore.run(out, session, session.started)?;
    let text = match form {
        ReportForm::Json => foreign_text::json(&report)? + "\n",
        ReportForm::Text if !session.quiet => report.to_string(),
        ReportForm::Text | ReportForm::None => String::new(),
    };
    stderr::print(&text);
    let ended_well = outcome.as_ref().map_or_else(|error| error.is::<Interrupted>(), |()| true);
    if let (Some((output, snapshot)), Some(touched), true) = (&output, &report.touched, ended_well)
    {
        // An interrupt has ended the run, but does not cancel the recording's file.
        let session = Session { interrupt: Interrupt::default(), ..*session };
        let path = output.path.display().to_string();
        let recorded = move || format!("the recording to be written to {path}");
        let _waiting = Wait::new(recorded).outlasts().begin();
        output.write(snapshot, WorkingSet::join([&touched[..]]), &session)?;
    }
    outcome
}
