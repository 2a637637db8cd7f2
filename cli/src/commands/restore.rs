//! `snap restore`: bring a guest back, with all its memory at once or page by page.

use std::io::Write;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use pager::shared::{ANSWER_TIMEOUT, SharedClone};
use pager::{FailurePolicy, Placement, Populate};
use rustix::process::{Signal, set_parent_process_death_signal};
use snapfmt::WorkingSet;

use super::{Input, Session};
use crate::api::{Api, ApiArgs, Facts, PagerFigures};
use crate::devices::SavedDeviceArgs;
use crate::exit::Interrupted;
use crate::guest_console::{GuestConsole, Until};
use crate::guest_output::{GuestOutput, Hold};
use crate::interrupt::Interrupt;
use crate::live::{self, EndArgs, Ended, Live};
use crate::prefetch::PrefetchArg;
use crate::recording::{Output, Record, recorded};
use crate::report::{RestoreReport, ms, ms_since};
use crate::restored::{Origin, Restored, Share, damaged, stopped};
use crate::stored::{Filled, Kept, Origins};
use crate::terminal::Keyboard;
use crate::usage::{Counters, Faults, Measure, Usage};
use crate::waits::Wait;
use crate::{memory_hash, size, usage};

/// Bring a guest back and run it.
///
/// The guest's serial port is connected to stdin and stdout. Ctrl-C ends the run.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap restore demo.snap --beats 3            read all memory, then run for three beats
  snap restore --lazy demo.snap --for 2s      run at once, pages come when they are touched
  snap restore --lazy demo.snap --until 'beat 7' --report json")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    #[command(flatten)]
    devices: SavedDeviceArgs,

    /// Run at once; pages come from the file when the guest touches them.
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

    /// With --api: do not run before a client resumes the guest. What is loaded in the background is loaded meanwhile.
    #[arg(long, requires = "api", conflicts_with = "record")]
    paused: bool,

    /// Fail unless the guest has exactly this much memory.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// With --lazy: what to do with a page that cannot be read or is damaged.
    #[arg(long, value_name = "POLICY", default_value = "poison", requires = "lazy")]
    on_error: OnError,

    /// With --lazy: load what the guest has not touched in the background. `auto`: while the guest waits for pages a good
    /// part of its time; `idle`: only while it asks for none; `full`: from the start to the end. Pages that are asked for
    /// go first. RATE bounds the bytes a second: `full,200M`.
    #[arg(
        long,
        value_name = "off|auto|idle|full[,RATE]",
        default_value = "auto",
        requires = "lazy"
    )]
    populate: Background,

    /// With --lazy: load pages in front of the guest. `hot`: those of the file's working set (`snap train` makes one);
    /// `all`: then everything else.
    #[arg(
        long,
        value_name = "off|hot|all",
        default_value = "hot",
        requires = "lazy",
        hide_possible_values = true
    )]
    prefetch: PrefetchArg,

    /// With --lazy: record which pages the guest touches, and store them as the working set of a copy of the file. Nothing is
    /// loaded that is not asked for.
    #[arg(long, requires_all = ["lazy", "out"], conflicts_with_all = ["prefetch", "populate"])]
    record: bool,

    /// With --record: the file to write. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap", requires = "record")]
    out: Option<PathBuf>,

    /// Replace the output of --record if it exists.
    #[arg(short, long, requires = "record")]
    force: bool,

    /// With --lazy: where the threads run that answer faults.
    #[arg(long, value_name = "PLACE", default_value = "follow", requires = "lazy")]
    placement: Place,

    /// The guest's clocks.
    #[arg(long, value_name = "CLOCK", default_value = "advance")]
    clock: ClockArg,

    /// Restore although this host's CPU lacks features that the guest was given.
    #[arg(long)]
    force_cpu: bool,

    /// At the end, hash all of the guest's memory (a lazy restore loads it for that).
    #[arg(long)]
    hash: bool,

    /// Map this raw image of the memory privately, instead of reading the pages of the file. For `snap bench`.
    #[arg(long, value_name = "IMAGE", hide = true, conflicts_with = "lazy")]
    image: Option<PathBuf>,

    /// Report also what the process has used, and end with the process that started this one. For `snap bench`.
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
pub(super) enum OnError {
    /// Poison the page: the guest stops when it touches it, with a message.
    Poison,
    /// Kill the process whose memory it is at once.
    Kill,
}

impl From<OnError> for FailurePolicy {
    fn from(policy: OnError) -> FailurePolicy {
        match policy {
            OnError::Poison => FailurePolicy::Poison,
            OnError::Kill => FailurePolicy::Kill,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Place {
    /// On the CPU of the vCPU that asks.
    Follow,
    /// Not asleep: they look for faults all the time, for as long as faults come.
    Spin,
    /// Wherever the scheduler puts them.
    None,
}

/// `off`, `auto`, `idle` or `full`, and how many bytes a second at most.
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
    /// Go on as if the guest had slept while it was stored.
    Advance,
    /// Go on as if no time had passed.
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

#[derive(Clone, Copy, ValueEnum)]
enum ReportForm {
    Text,
    Json,
    None,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let (out, hold) = GuestOutput::new().context("cannot use stdout")?;
    let restore = Restore {
        origin: Origin {
            file: &args.input.file,
            parents: &args.input.parents,
            lazy: args.lazy,
            share: args.share.as_deref().map(|socket| Share {
                socket,
                // Not longer than the guest is to run.
                patience: args.end.run_for.map_or(ANSWER_TIMEOUT, |time| time.min(ANSWER_TIMEOUT)),
            }),
            image: args.image.as_deref(),
            on_error: args.on_error.into(),
            memory_bytes: args.memory,
            populate: args.populate.0,
            populate_rate: args.populate.1,
            prefetch: if args.record { PrefetchArg::Off } else { args.prefetch },
            record: args.record.then_some(Record::InPassing),
            placement: match args.placement {
                Place::Follow => Placement::Follow,
                Place::Spin => Placement::Spin,
                Place::None => Placement::None,
            },
            clock: args.clock.into(),
            force: args.force_cpu,
            heed_requests: false,
            devices: &args.devices,
        },
        until: args.end.until(),
        run_for: args.end.run_for,
        hold: Some(hold),
        hash: args.hash,
        keyboard: args.measure.is_none(),
        measure: args.measure,
        api: args.api.bind()?,
        paused: args.paused,
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
    let form = if args.json { ReportForm::Json } else { args.report };
    let told = match form {
        ReportForm::Json => serde_json::to_string_pretty(&report)? + "\n",
        ReportForm::Text if !session.quiet => report.to_string(),
        ReportForm::Text | ReportForm::None => String::new(),
    };
    // A closed stderr is nobody to complain to.
    let _ = std::io::stderr().write_all(told.as_bytes());
    let ended_well = outcome.as_ref().map_or_else(|error| error.is::<Interrupted>(), |()| true);
    if let (Some((output, snapshot)), Some(touched), true) = (&output, &report.touched, ended_well)
    {
        // An interrupt has ended the run, and does not cancel what is written of it.
        let session = Session { interrupt: Interrupt::default(), ..*session };
        let path = output.path.display().to_string();
        let recorded = move || format!("what was recorded to be written to {path}");
        let _waiting = Wait::new(recorded).outlasts().begin();
        output.write(snapshot, WorkingSet::join([&touched[..]]), &session)?;
    }
    outcome
}

/// One restore, from the file to the end of the run.
pub(crate) struct Restore<'a> {
    pub(crate) origin: Origin<'a>,
    pub(crate) until: Until,
    pub(crate) run_for: Option<Duration>,
    /// Of its output: see [`Live::hold`].
    pub(crate) hold: Option<Hold>,
    pub(crate) hash: bool,
    /// Whether stdin is the guest's.
    pub(crate) keyboard: bool,
    /// What of the process is looked at, if anything.
    pub(crate) measure: Option<Measure>,
    /// Where it can be controlled.
    pub(crate) api: Option<Api>,
    /// Whether it is to wait there for its resuming.
    pub(crate) paused: bool,
}

impl Restore<'_> {
    /// Restores and runs; gives the report also for a guest that stopped by itself, whose error
    /// is then the second value.
    pub(crate) fn run(
        self,
        out: impl Write + Send + 'static,
        session: &Session,
        started: Instant,
    ) -> Result<(RestoreReport, Result<()>)> {
        let (console, seen) = GuestConsole::new(out, self.until.clone());
        let restore = || self.origin.restore(console, session);
        let (restored, mut timeline) =
            usage::sampled(self.measure, started, Faults::None, restore)?;
        let restored = restored?;
        // In this order, so that whatever goes wrong the vCPUs are gone before the pager.
        let Restored { snapshot, memory, pager, recording, clone, vm, .. } = restored;
        let Restored { opened, memory_ready, loaded_bytes, set_damage, image, .. } = restored;
        // Shared with the control socket, which is gone before this function is.
        let pager = pager.map(Arc::new);
        let keyboard = match self.keyboard {
            true => Some(Keyboard::connect(vm.handle()).context("cannot use the keyboard")?),
            false => None,
        };

        let (remote, events) = live::remote();
        let kept = Kept::Restored(Origins {
            file: self.origin.file,
            snapshot: &snapshot,
            memory: &memory,
            from: match (&pager, &clone) {
                // What is recorded is a mapping of a file, too.
                (Some(_), _) if recording.is_some() => Filled::Shared,
                (Some(pager), _) => Filled::By(pager),
                (None, Some(_)) => Filled::Shared,
                (None, None) => Filled::AtOnce,
            },
        });
        let facts = Facts {
            memory_bytes: snapshot.header().memory_bytes,
            vcpus: vm.vcpu_count(),
            restored_from: Some(self.origin.file.to_owned()),
            started,
            pager: {
                let pager = pager.as_ref().map(Arc::downgrade);
                Box::new(move || pager.as_ref()?.upgrade().map(|pager| PagerFigures::of(&pager)))
            },
        };
        let serving = self.api.map(|api| api.serve(remote, facts)).transpose()?;
        let hold = self.hold.as_ref();
        let (run_for, begins_paused) = (self.run_for, self.paused);
        let live = Live { session, seen: &seen, hold, run_for, begins_paused, events, kept };
        let before = self.measure.map(|_| Counters::now()).transpose()?;
        let faults = pager.as_deref().map_or(Faults::Kernel, Faults::Served);
        let mut touched = None;
        let live = || {
            let live = || live.run(vm);
            let (Some(recording), Some(how)) = (&recording, self.origin.record) else {
                return live();
            };
            let (ended, pages) = recorded(recording, how, &seen, live);
            touched = Some(pages);
            ended
        };
        let (ended, of_run) = usage::sampled(self.measure, started, faults, live)?;
        timeline.extend(of_run);
        let ended = ended?;
        let process = before.map(|before| Usage::since(&before, &memory, timeline)).transpose()?;
        // The figures are those of the run: what comes after it, a hash say, is not the guest's.
        let stats = pager.as_ref().map(|pager| pager.stats());
        drop((keyboard, serving));
        let mut outcome = ended.outcome(&seen, session);
        let mut memory_sha256 = None;
        if self.hash && outcome.is_ok() {
            match memory_hash::sha256(&memory, snapshot.regions()) {
                Ok(hash) => memory_sha256 = Some(hash),
                Err(error) => outcome = Err(error),
            }
        }
        // The kernel has read it, and tells nothing.
        if let (Some(Err(error)), Some(path)) =
            (image.map(|image| image.unchanged()), self.origin.image)
        {
            let named = format!("the guest may have run from two images: {}", path.display());
            outcome = Err(error).context(named);
        }
        // What the pager could not do is the cause of whatever else went wrong.
        if let Some(failure) = pager.as_ref().and_then(|pager| pager.failure()) {
            outcome = Err(damaged(self.origin.file, failure));
        }
        // The vCPUs are gone before the pager: from here on nobody touches a missing page.
        let stop = ended.describe(&seen, session);
        let Ended { at: end, first_entry, first_exit, paused, .. } = ended;
        let ending = live::ending("the service of the guest's pages to end");
        drop(paused);
        drop(pager);
        if let Some(reason) = clone.and_then(SharedClone::stop) {
            outcome = Err(stopped(self.origin.file, &reason));
        }
        drop(ending);

        let report = RestoreReport {
            mode: match (self.origin.lazy, self.origin.share, self.origin.image) {
                (_, Some(_), _) => "shared",
                (_, None, Some(_)) => "mmap",
                (true, None, None) => "lazy",
                (false, None, None) => "eager",
            },
            memory_bytes: snapshot.header().memory_bytes,
            opened_ms: ms(opened - started),
            memory_ready_ms: ms(memory_ready - started),
            first_instruction_ms: ms_since(started, first_entry),
            first_exit_ms: ms_since(started, first_exit),
            first_output_ms: ms_since(started, seen.first_output()),
            end_ms: ms(end - started),
            stop,
            beats: seen.beats().0,
            bad_beats: seen.beats().1,
            bytes_read: match &stats {
                Some(stats) => stats.bytes_read,
                // In a clone, the server has read for all of them.
                None => loaded_bytes,
            },
            memory_sha256,
            pager: stats,
            working_set_damage: set_damage.get().cloned(),
            process,
            touched: touched.transpose()?,
        };
        Ok((report, outcome))
    }
}
