//! `snap checkpoint`: snapshots a running guest again and again.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde_json::json;
use snapfmt::Codec;

use crate::api::CheckpointFields;
use crate::api::client::{self, Fault};
use crate::checkpoints::{Folder, Merged, Merging, Name, merge_onto};
use crate::exit::{Interrupted, WrongOptions, describe};
use crate::keys::KeyArgs;
use crate::session::Session;
use crate::size;
use crate::stdout::print_line;
use crate::storage::Storage;
use crate::summary::Summary;
use crate::{bucket, foreign_text, input};

/// Snapshot a running guest again and again, each time only what has changed.
///
/// The guest runs with a control socket (`snap run --api`, `snap restore --api`), and is paused for about a millisecond
/// each time. `snap restore DIR` takes the newest checkpoint, and `snap restore DIR@K` the one of that number. Each is
/// whole whenever this command or the guest ends. Ctrl-C ends the command, and not the guest.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap checkpoint --vm vm.sock --every 1s --keep 10 -o checkpoints
  snap checkpoint --vm vm.sock --every 10s --keep 3 --if-changed -o checkpoints
  snap restore checkpoints
  snap restore checkpoints@42 --lazy")]
pub(crate) struct Args {
    /// The control socket of the guest.
    #[arg(long, value_name = "SOCKET")]
    vm: PathBuf,

    /// The time from the beginning of one checkpoint to that of the next one.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    every: Duration,

    /// How many checkpoints are kept. Older ones are removed, except for files that these need.
    #[arg(long, value_name = "N")]
    keep: NonZeroUsize,

    /// Make no checkpoint if no page of memory was written since the last one.
    #[arg(long)]
    if_changed: bool,

    /// End after this many checkpoints.
    #[arg(long, short = 'n', value_name = "N")]
    count: Option<NonZeroU64>,

    /// The folder of the checkpoints. It is created, and an existing one is continued.
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,

    /// How pages are stored: lz4, zstd or raw.
    #[arg(long, default_value = "lz4")]
    codec: Codec,

    /// Merge the layers of the chain when there are this many.
    #[arg(long, value_name = "N", default_value = "16", hide = true)]
    merge_at: NonZeroUsize,

    #[command(flatten)]
    keys: KeyArgs,

    /// Print each event as a line of JSON.
    #[arg(long)]
    json: bool,
}

/// The longest time between two checkpoints.
const MOST: Duration = Duration::from_secs(60 * 60);
/// After the time of three checkpoints and this, the guest's memory is not protected any more.
const PATIENCE: Duration = Duration::from_secs(10);
/// The interval of checks for an interrupt.
const LOOK: Duration = Duration::from_millis(20);

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    if args.every.is_zero() || args.every > MOST {
        return Err(WrongOptions("--every: more than 0, and at most 1h".into()).into());
    }
    let storage = Storage { codec: args.codec, ..Storage::default() };
    // Before the first checkpoint: layers are merged later.
    storage.options(&args.keys)?;
    // Before the folder is made: there is a guest.
    client::guest_files(&args.vm)?;
    let folder = Folder::open(&args.out, &args.keys)?;
    let mut run = Run {
        args,
        session,
        storage,
        folder,
        restored_from: None,
        last: None,
        parent: None,
        base_depth: 0,
        merging: None,
    };
    let mut made = 0;
    loop {
        if session.interrupt.requested() {
            return Err(Interrupted.into());
        }
        let started = Instant::now();
        made += u64::from(run.checkpoint(made == 0)?);
        if args.count.is_some_and(|count| made >= count.get()) {
            return run.end();
        }
        while started.elapsed() < args.every {
            if session.interrupt.requested() {
                return Err(Interrupted.into());
            }
            std::thread::sleep(LOOK.min(args.every.saturating_sub(started.elapsed())));
        }
    }
}

struct Run<'a> {
    args: &'a Args,
    session: &'a Session,
    storage: Storage,
    folder: Folder,
    /// The snapshot that the guest was restored from.
    restored_from: Option<PathBuf>,
    /// The last checkpoint, with its id.
    last: Option<(Name, String)>,
    /// The file with its content on which the next one is a layer.
    parent: Option<Name>,
    /// How many files the chain has below the layers that can be merged.
    base_depth: usize,
    merging: Option<Merging>,
}

/// What has happened, for a person or a program.
enum Event<'a> {
    Checkpoint { number: u64, depth: usize, summary: &'a Summary },
    Unchanged,
    Failed { error: &'a anyhow::Error },
    Merged { name: Name },
    Removed { files: &'a [String] },
}

impl Run<'_> {
    /// Makes a checkpoint. Returns whether there is one more.
    fn checkpoint(&mut self, is_first: bool) -> Result<bool> {
        self.take_merged(false)?;
        self.look_at_guest()?;
        let name = self.folder.next()?;
        let path = |name| absolute(&self.folder.at(name));
        let fields = CheckpointFields {
            parent: self.parent.map(path).transpose()?,
            if_changed: self.args.if_changed,
            track_ms: (3 * self.args.every + PATIENCE).as_millis() as u64,
        };
        let out = self.folder.at(name);
        let made = client::checkpoint(&self.args.vm, &out, fields, &self.storage, self.session);
        let summary = match made {
            Ok(Some(summary)) => summary,
            Ok(None) => {
                self.report(&Event::Unchanged)?;
                return Ok(false);
            }
            // The guest runs on, and the next one may be possible: there is room again, or another snapshot has ended.
            Err(error) if !is_first && error.is::<Fault>() => {
                self.report(&Event::Failed { error: &error })?;
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let parent_id = self.parent.and_then(|parent| self.folder.id(parent));
        let is_new_chain = parent_id.is_none() || summary.parent_id.as_deref() != parent_id;
        self.folder.add(name)?;
        let depth = self.folder.depth(name);
        if is_new_chain {
            self.base_depth = depth;
            self.folder.begin_chain(name);
            self.merging = None;
        }
        self.report(&Event::Checkpoint { number: name.number, depth, summary: &summary })?;
        self.last = Some((name, summary.id));
        self.parent = Some(name);
        self.prune()?;
        if self.merging.is_none() && depth - self.base_depth >= self.args.merge_at.get() {
            let merged = Name { is_merged: true, ..name };
            let options = self.storage.options(&self.args.keys)?.threads(NonZeroUsize::MIN);
            let interrupt = self.session.interrupt.clone();
            self.merging = Some(Merging::start(
                out,
                self.base_depth,
                merged,
                options,
                self.args.keys.clone(),
                interrupt,
            )?);
        }
        Ok(true)
    }

    /// Refuses a guest whose checkpoints could not be opened. Of another guest than the last time, a new chain begins.
    fn look_at_guest(&mut self) -> Result<()> {
        let files = client::guest_files(&self.args.vm)?;
        files.check_key(&self.args.vm, &self.args.keys)?;
        let restored_from = files.restored_from;
        if restored_from == self.restored_from {
            return Ok(());
        }
        if let Some(file) = &restored_from {
            let opened = if bucket::is_meant(file) {
                Err(anyhow!("it is in a bucket"))
            } else {
                input::open(file, &self.args.keys.clone().into()).map(drop)
            };
            opened.with_context(|| {
                format!(
                    "checkpoints of this guest could not be opened: they would be layers on {}; restore it from a file \
                     whose parents are found without options or by SNAP_PATH, which snap flatten writes",
                    file.display()
                )
            })?;
        }
        self.restored_from = restored_from;
        (self.parent, self.merging) = (None, None);
        Ok(())
    }

    /// If layers were merged, the next checkpoint is on the merged file.
    fn take_merged(&mut self, wait: bool) -> Result<()> {
        let Some(merging) = self.merging.take_if(|merging| wait || merging.is_finished()) else {
            return Ok(());
        };
        match merging.finish().and_then(|merged| self.use_merged(merged)) {
            Ok(()) => self.prune(),
            _ if self.session.interrupt.requested() => Err(Interrupted.into()),
            Err(error) => {
                self.report(&Event::Failed { error: &error.context("cannot merge layers") })
            }
        }
    }

    fn use_merged(&mut self, merged: Merged) -> Result<()> {
        self.folder.add(merged.name)?;
        self.report(&Event::Merged { name: merged.name })?;
        let Some((last, id)) = &self.last else { return Ok(()) };
        let mut parent = merged.name;
        if merged.of != *id {
            // There were checkpoints meanwhile.
            let name = Name { is_merged: true, ..*last };
            let top = self.folder.at(*last);
            let options = self.storage.options(&self.args.keys)?;
            parent = merge_onto(&top, &merged, name, &options, &self.args.keys)?.name;
            self.folder.add(parent)?;
        }
        self.parent = Some(parent);
        Ok(())
    }

    fn prune(&mut self) -> Result<()> {
        let merging = self.merging.is_some();
        // The thread that merges reads the files that are there now.
        let removed = match merging {
            true => Vec::new(),
            false => self.folder.prune(self.args.keep.get(), self.parent)?,
        };
        if !removed.is_empty() {
            self.report(&Event::Removed { files: &removed })?;
        }
        Ok(())
    }

    /// Waits for the thread that merges.
    fn end(&mut self) -> Result<()> {
        self.take_merged(true)
    }

    fn report(&self, event: &Event<'_>) -> Result<()> {
        if self.args.json {
            return print_line(foreign_text::json_line(&event.json())?);
        }
        match event {
            _ if self.session.quiet => Ok(()),
            Event::Checkpoint { number, summary, .. } => print_line(format_args!(
                "{}@{number}: {}, paused {:.1} ms, durable after {:.0} ms",
                self.args.out.display(),
                size::human(summary.file_bytes),
                summary.pause_ms,
                summary.total_ms,
            )),
            Event::Unchanged => print_line("unchanged"),
            Event::Failed { error } => print_line(format_args!("failed: {}", describe(error))),
            Event::Merged { name } => print_line(format_args!("merged: {}", name.file_name())),
            // It is what was asked for.
            Event::Removed { .. } => Ok(()),
        }
    }
}

impl Event<'_> {
    fn json(&self) -> serde_json::Value {
        match self {
            Event::Checkpoint { number, depth, summary } => {
                json!({ "event": "checkpoint", "number": number, "parents": depth, "summary": summary })
            }
            Event::Unchanged => json!({ "event": "unchanged" }),
            Event::Failed { error } => json!({ "event": "failed", "error": describe(error) }),
            Event::Merged { name } => json!({ "event": "merged", "file": name.file_name() }),
            Event::Removed { files } => json!({ "event": "removed", "files": files }),
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context("cannot find the working folder")
}
