//! `snap create`: boots a guest, waits until it is ready, and snapshots it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use pager::Populate;
use snapfmt::Header;
use snapvm::{MemoryFrom, Prefetch, Vm};
use vmm::{SNAPSHOT_TRIGGER_PORT, Stop};

use crate::activity::Activity;
use crate::api::client::{self, Kind};
use crate::bucket;
use crate::config::ConfigArgs;
use crate::exit::{GuestStopped, Interrupted, WrongOptions};
use crate::guest::{self, GuestArgs};
use crate::guest_console::{GuestConsole, READY, Seen, Until};
use crate::input::{ParentArgs, refuse_existing};
use crate::jailed::{GuestJailArgs, Needs};
use crate::keys::KeyArgs;
use crate::live;
use crate::progress::Bar;
use crate::restoring::{self, snapshot_error};
use crate::session::Session;
use crate::size;
use crate::stderr::say;
use crate::stdout::{print_json, print_line};
use crate::storage::Storage;
use crate::summary::Summary;
use crate::trust::TrustArgs;

/// Boot a guest, wait until it is ready, and snapshot it into one file.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap create demo.snap                       the built-in demo guest, 128 MiB
  snap create big.snap --memory 16G --work 64M
  snap create fast.snap --codec lz4 --force
  snap create later.snap --when output:'beat 100'
  snap create linux.snap --kernel vmlinuz --initrd initrd.img --memory 512M --cpus 2 \
      --cmdline 'console=ttyS0 quiet' --when output:'login:'
  snap create layer.snap --from demo.snap --when output:'beat 5'
  snap create now.snap --vm vm.sock           a guest that runs with --api vm.sock
  snap create now.snap --vm vm.sock --live    the same, and it runs on meanwhile
  snap create s3://bucket/team/guest          into a bucket (see snap push)")]
pub(crate) struct Args {
    /// The file to write, or the address of a name in a bucket. It appears when it is complete.
    #[arg(value_name = "OUT.snap", required_unless_present = "out", conflicts_with = "out")]
    pub(crate) file: Option<PathBuf>,

    /// The same, as in other commands.
    #[arg(short, long, value_name = "OUT.snap")]
    pub(crate) out: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    #[command(flatten)]
    pub(crate) config: ConfigArgs,

    /// Restore this snapshot, run it until --when, and store only the pages that have changed.
    #[arg(long = "from", alias = "parent", value_name = "BASE.snap", conflicts_with_all = guest::WORDS)]
    pub(crate) parent: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) trust: TrustArgs,

    #[command(flatten)]
    pub(crate) keys: KeyArgs,

    /// Snapshot the guest that runs with this control socket (`snap run --api`, `snap restore --api`). It is paused
    /// meanwhile, and then continues.
    #[arg(long, value_name = "SOCKET", conflicts_with_all = guest::WORDS,
          conflicts_with_all = ["parent", "when", "timeout"])]
    pub(crate) vm: Option<PathBuf>,

    /// With --vm: store only the pages that have changed since the snapshot that the guest was restored from.
    #[arg(long, requires = "vm")]
    pub(crate) diff: bool,

    /// With --vm: let the guest run while the file is written. It is paused for milliseconds.
    #[arg(long, requires = "vm", conflicts_with = "stop")]
    pub(crate) live: bool,

    /// With --vm: end the guest after the snapshot.
    #[arg(long, requires = "vm")]
    pub(crate) stop: bool,

    #[command(flatten)]
    pub(crate) storage: Storage,

    #[command(flatten)]
    pub(crate) jail: GuestJailArgs,

    /// When to snapshot the guest: ready (the demo guest's default), output:TEXT (at the last byte of this text),
    /// after:TIME (since its boot; with --from, since its restore), or request (a Linux guest's default: it writes any
    /// byte to I/O port 0x680).
    #[arg(long, value_name = "TRIGGER")]
    pub(crate) when: Option<Trigger>,

    /// Give up when the guest is not ready after this long.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,

    /// Print the summary as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The moment at which a guest is snapshotted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// The demo guest has written its line `ready ...`.
    Ready,
    /// The guest has written this.
    Output(String),
    /// This long after its boot.
    After(Duration),
    /// The guest has requested it.
    Request,
}

impl FromStr for Trigger {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            None if text == "ready" => Ok(Self::Ready),
            None if text == "request" => Ok(Self::Request),
            Some(("output", pattern)) if !pattern.is_empty() => Ok(Self::Output(pattern.into())),
            Some(("after", time)) => Ok(Self::After(humantime::parse_duration(time)?)),
            _ => bail!("expected ready, output:TEXT, after:TIME or request"),
        }
    }
}

/// The awaited event.
impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => write!(f, "the guest's line {READY:?}"),
            Self::Output(text) => write!(f, "the guest's output {text:?}"),
            Self::After(time) => write!(f, "{} to pass", humantime::format_duration(*time)),
            Self::Request => write!(f, "the guest's write to I/O port {SNAPSHOT_TRIGGER_PORT:#x}"),
        }
    }
}

impl Trigger {
    fn until(&self) -> Until {
        match self {
            Self::Ready => Until::lines(READY, 1),
            Self::Output(text) => Until { lines: None, pattern: Some(text.clone().into_bytes()) },
            Self::After(_) | Self::Request => Until::default(),
        }
    }
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    if args.trust.is_required() && args.parent.is_none() {
        bail!("--expect-root and --require-signature are for the snapshot that --from restores");
    }
    if args.vm.is_some() && args.jail.is_special() {
        let message = "with --vm, another process runs the guest: give --jail, --chroot, --uid and --gid to its snap run \
                       or snap restore";
        return Err(WrongOptions(message.into()).into());
    }
    if args.vm.is_some() && args.keys.is_given() && !bucket::is_meant(args.out()) {
        bail!(
            "with --vm, the process of the guest writes the file: give the key to its snap run or snap restore, and what it \
             writes is sealed"
        );
    }
    let summary = create(args, session)?;
    if args.json {
        print_json(&summary)?;
    } else if !session.quiet {
        print_line(format_args!(
            "{}: memory {}, non-zero {}, file {} (ratio {:.2}), {:.0} ms, paused {:.0} ms",
            summary.file.display(),
            size::human(summary.memory_bytes),
            size::human(summary.nonzero_bytes),
            size::human(summary.file_bytes),
            summary.ratio,
            summary.total_ms,
            summary.pause_ms,
        ))?;
    }
    Ok(())
}

impl Args {
    /// The file to write: one of the two is given.
    fn out(&self) -> &Path {
        self.file.as_deref().or(self.out.as_deref()).unwrap_or(Path::new(""))
    }
}

/// Writes the snapshot. No file or name is at the output path if this fails.
pub(crate) fn create(args: &Args, session: &Session) -> Result<Summary> {
    // Before the guest's boot, which would be useless.
    match &args.vm {
        None => drop(args.storage.options(&args.keys)?),
        // Its process writes the file. The key is for sending it.
        Some(socket) => {
            args.storage.options(&KeyArgs::default())?;
            if args.keys.is_given() {
                args.keys.provider()?;
                client::guest_files(socket)?.check_key(socket, &args.keys)?;
            }
        }
    }
    if bucket::is_meant(args.out()) {
        #[cfg(not(feature = "objects"))]
        return Err(bucket::missing());
        #[cfg(feature = "objects")]
        {
            let plan = super::create_in_bucket::Plan {
                address: args.out(),
                base: args.parent.as_deref(),
                force: args.storage.force,
                stop: args.stop,
                keys: &args.keys,
            };
            let create = |file: &Path| create_file(args, file, session);
            return super::create_in_bucket::create(&plan, session, create);
        }
    }
    refuse_existing(args.out(), args.storage.force)?;
    create_file(args, args.out(), session)
}

fn create_file(args: &Args, out: &Path, session: &Session) -> Result<Summary> {
    let started = Instant::now();
    if let Some(socket) = &args.vm {
        let kind = Kind { diff: args.diff, live: args.live, stop: args.stop };
        return client::create(socket, out, kind, &args.storage, session);
    }
    let (header, ready_at, paused_at) = match &args.parent {
        None => create_whole(args, out, session)?,
        Some(base) => create_layer(args, base, out, session)?,
    };
    Ok(Summary::new(out, &header, started, ready_at, paused_at))
}

/// Boots a guest and snapshots all of it. Also returns when it ran and when it was paused.
fn create_whole(args: &Args, out: &Path, session: &Session) -> Result<(Header, Instant, Instant)> {
    let when = match &args.when {
        Some(Trigger::Ready) if args.guest.is_linux() => bail!(
            "--when ready is only for the demo guest: give --when output:TEXT, after:TIME or request"
        ),
        Some(when) => when.clone(),
        None if args.guest.is_linux() => Trigger::Request,
        None => Trigger::Ready,
    };
    let (console, seen) = GuestConsole::new(std::io::sink(), when.until());
    let needs = Needs {
        network: bucket::is_meant(args.out()) || args.keys.run_commands(),
        out: Some(out),
        ..Needs::default()
    };
    // It looks at files of the host.
    let options = args.storage.options(&args.keys)?;
    let jail = args.jail.begin(&needs, &session.interrupt)?;
    let vm = guest::boot(&args.guest, console, when == Trigger::Request, session)?;
    jail.close()?;
    let (mut guest, paused_at) = run_until_ready(vm, args, &when, &seen, session)?;
    let bar = Bar::new("storing", session.quiet, &session.interrupt);
    let written = guest.snapshot(out, &options, &|p| bar.update(p));
    let header = written.map_err(snapshot_error)?;
    Ok((header, paused_at, paused_at))
}

/// Restores a guest, lets it run, and stores what has changed. Pages that it never touched are not read: they are
/// unchanged from the parent.
fn create_layer(
    args: &Args,
    base: &Path,
    out: &Path,
    session: &Session,
) -> Result<(Header, Instant, Instant)> {
    let Some(when) = args.when.clone().filter(|when| *when != Trigger::Ready) else {
        bail!(
            "a restored guest was ready before, so --when is needed: give --when output:TEXT, \
             after:TIME or request"
        );
    };
    let (console, seen) = GuestConsole::new(std::io::sink(), when.until());
    let parents = ParentArgs { trust: args.trust.clone(), ..args.keys.clone().into() };
    let config = restoring::config(base, &parents, None, session)?
        .memory(MemoryFrom::Lazy)
        .populate(Populate::Off, None)
        .prefetch(Prefetch::Off)
        .guest_trigger(when == Trigger::Request);
    let needs = Needs {
        snapshot: Some(config.snapshot()),
        network: bucket::is_meant(args.out()),
        out: Some(out),
        ..Needs::default()
    };
    // It looks at files of the host.
    let options = args.storage.options(&args.keys)?;
    let jail = args.jail.begin_restore(needs, &args.keys, &session.interrupt)?;
    let restored = restoring::restore(&config, console, session)?;
    jail.close()?;
    let memory_ready_at = restored.memory_ready_at;
    let memory = Arc::clone(restored.vm.memory());
    let ran = run_until_ready(restored.vm, args, &when, &seen, session);
    // A failure of the pager is the cause of any other error.
    restoring::check_memory(&memory)?;
    let (mut guest, paused_at) = ran?;
    let bar = Bar::new("storing", session.quiet, &session.interrupt);
    let written = guest.snapshot_layer(out, &options, &|p| bar.update(p));
    let header = written.map_err(snapshot_error)?;
    let _ending = live::ending("the threads that serve the guest's pages to end", &memory);
    drop((guest, memory));
    Ok((header, memory_ready_at, paused_at))
}

/// When it is first reported that the guest is not ready yet, and how often after that.
const FIRST_REPORT: Duration = Duration::from_secs(1);
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// Runs a guest until it is to be snapshotted. Returns it, and when it stopped.
fn run_until_ready(
    guest: Vm,
    args: &Args,
    when: &Trigger,
    seen: &Seen,
    session: &Session,
) -> Result<(Vm, Instant)> {
    let memory = Arc::clone(guest.memory());
    let touched_bytes = || memory.touched_bytes();
    let running = guest.resume()?;
    // Again: resuming has cleared a pause that was requested before.
    session.interrupt.pauses(running.handle());
    let (limit, on_time) = match when {
        Trigger::After(time) => (*time, true),
        Trigger::Ready | Trigger::Output(_) | Trigger::Request => (args.timeout, false),
    };
    let started = Instant::now();
    let mut activity = Activity::new(running.handle(), &touched_bytes);
    let mut report_after = FIRST_REPORT;
    let stop = loop {
        let rest = limit.saturating_sub(started.elapsed());
        let stop = running.wait(Some(rest.min(report_after)));
        if stop.is_some() || rest <= report_after {
            break stop;
        }
        report_after = REPORT_EVERY;
        if !session.quiet {
            let (waited, most) = (started.elapsed().as_secs(), humantime::format_duration(limit));
            say(&format!(
                "snap create: {waited} s, waiting for {when}, at most {most}; {}; {}\n",
                seen.last_line(),
                activity.describe()
            ));
        }
    };
    match stop {
        Some(Stop::ConsolePause | Stop::SnapshotTrigger) => {}
        None if on_time => {}
        _ if session.interrupt.requested() => return Err(Interrupted.into()),
        Some(stop) => {
            let message = format!("before {when}, {stop}\n{}", seen.tail());
            return Err(GuestStopped(message).into());
        }
        None => bail!(
            "the guest is not ready after {}: waited for {when}; at the end {}; give more time with --timeout, or \
             another --when\n{}",
            humantime::format_duration(args.timeout),
            activity.describe(),
            seen.tail()
        ),
    }
    let paused_at = Instant::now();
    Ok((live::pause(running)?, paused_at))
}
