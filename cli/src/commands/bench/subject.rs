//! The guest that is restored repeatedly: a snapshot, its raw image, and the end of its work.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use snapfmt::Snapshot;
use snapfmt::layout::PAGE_BYTES;
use tempfile::TempDir;
use vmm::demo::WORK_ALIGN_BYTES;

use super::args::{Args, DEMO};
use super::child::Snap;
use super::hot_file::Hot;
use super::mode::Mode;
use crate::exit::WrongOptions;
use crate::input::{self, ParentArgs};
use crate::size;

/// A guest to restore. Dropping it removes its temporary files.
pub(super) struct Subject {
    pub(super) file: PathBuf,
    pub(super) parents: ParentArgs,
    /// The raw image of its memory, where a mode needs it.
    pub(super) image: Option<PathBuf>,
    /// The same guest with its working set at the front, and with other pages there.
    pub(super) hot: Option<Hot>,
    pub(super) other: Option<Hot>,
    /// Open files, so that the page cache of exactly these is dropped.
    pub(super) snapshot: Snapshot,
    pub(super) work: Work,
    /// Whether memory must be the same after the work in all modes.
    pub(super) is_deterministic: bool,
    folder: TempDir,
}

/// When a guest's work is done.
#[derive(Clone, Debug)]
pub(super) enum Work {
    Beats(u64),
    Until(String),
    For(Duration),
}

impl Subject {
    /// Creates the missing files: the demo guest's snapshot, the image.
    ///
    /// `swept`: the demo guest fills all of its memory, and a beat reads this percentage of it.
    pub(super) fn new(
        args: &Args,
        swept: Option<u8>,
        snap: &Snap<'_>,
        say: &dyn Fn(&str),
    ) -> Result<Self> {
        args.keys.check_children_can_read()?;
        let folder = temporary_folder(args.dir.as_deref())?;
        let file = match args.is_demo() {
            true => {
                say("creating the demo guest");
                let file = folder.path().join("demo.snap");
                let mut command = demo_command(args, swept, &file)?;
                command.extend(args.keys.options());
                snap.run(command).context("cannot create the demo guest")?;
                file
            }
            false => args.target.clone(),
        };
        let parents =
            ParentArgs { files: args.parents.clone(), ..ParentArgs::from(args.keys.clone()) };
        let snapshot = input::open(&file, &parents)?;
        if snapshot.keys().is_some() && args.modes.contains(&Mode::Mmap) {
            bail!(
                "the raw image for the mode mmap would not be encrypted: give other modes, as --modes eager,lazy"
            );
        }
        let guest = snapshot.metadata()?.other.remove("guest").unwrap_or_default();
        let is_demo = guest.get("kind").and_then(Value::as_str) == Some("demo");
        let work = args.work(is_demo)?;
        let mut subject = Self {
            is_deterministic: is_demo && matches!(work, Work::Beats(_)),
            file,
            parents,
            image: None,
            hot: None,
            other: None,
            snapshot,
            work,
            folder,
        };
        if args.modes.contains(&Mode::Mmap) {
            say("writing the raw image of its memory");
            let image = subject.path("memory.raw");
            let mut command: Vec<OsString> = vec!["--quiet".into(), "export".into()];
            command.extend(subject.input());
            command.extend(["--format".into(), "raw".into(), "-o".into(), image.clone().into()]);
            snap.run(command).context("cannot write the raw image")?;
            subject.image = Some(image);
        }
        Ok(subject)
    }

    /// The arguments that name the snapshot.
    pub(super) fn input(&self) -> impl Iterator<Item = OsString> + '_ {
        std::iter::once(self.file.clone().into()).chain(self.parents())
    }

    /// The arguments that name files that may be parents, and the keys.
    pub(super) fn parents(&self) -> impl Iterator<Item = OsString> + '_ {
        let files = self.parents.files.iter().flat_map(|path| ["--parent".into(), path.into()]);
        files.chain(self.parents.keys.options())
    }

    /// The file with hot pages that a mode restores.
    pub(super) fn hot(&self, mode: Mode) -> Option<&Hot> {
        match mode {
            Mode::LazyHot => self.hot.as_ref(),
            Mode::LazyOther => self.other.as_ref(),
            Mode::Eager | Mode::Mmap | Mode::Lazy | Mode::LazyOff | Mode::Shared => None,
        }
    }

    /// All snapshots that some mode restores.
    pub(super) fn snapshots(&self) -> impl Iterator<Item = &Snapshot> {
        let hot = self.hot.iter().chain(&self.other).map(|hot| &hot.snapshot);
        std::iter::once(&self.snapshot).chain(hot)
    }

    /// A path in the temporary folder.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        self.snapshot.header().memory_bytes
    }
}

impl Work {
    /// The options of `snap restore` that end it there, or after `timeout` in any case.
    pub(super) fn options(&self, timeout: Duration) -> Vec<OsString> {
        let time = |time: &Duration| humantime::format_duration(*time).to_string();
        let (option, value, limit) = match self {
            Self::Beats(beats) => ("--beats", beats.to_string(), Some(timeout)),
            Self::Until(text) => ("--until", text.clone(), Some(timeout)),
            Self::For(run) => ("--for", time(run), None),
        };
        let limit = limit.map(|limit| format!("--for={}", time(&limit)));
        // As one argument, because a text may begin with a dash.
        std::iter::once(format!("{option}={value}")).chain(limit).map(OsString::from).collect()
    }

    /// Whether `snap restore` has ended there, by the reason in its report.
    pub(super) fn is_done(&self, stop: &str) -> bool {
        match self {
            Self::Beats(_) | Self::Until(_) => stop == "done",
            Self::For(_) => stop == "time is up",
        }
    }

    pub(super) fn describe(&self) -> String {
        match self {
            Self::Beats(1) => "one beat of the demo guest".into(),
            Self::Beats(beats) => format!("{beats} beats of the demo guest"),
            Self::Until(text) => format!("until it writes {text:?}"),
            Self::For(time) => humantime::format_duration(*time).to_string(),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Beats(beats) => json!({ "beats": beats }),
            Self::Until(text) => json!({ "until": text }),
            Self::For(time) => json!({ "for_ms": time.as_millis() as u64 }),
        }
    }
}

fn temporary_folder(parent: Option<&Path>) -> Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("snap-bench-");
    let made = match parent {
        Some(parent) => builder.tempdir_in(parent),
        None => builder.tempdir(),
    };
    let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
    made.with_context(|| format!("cannot create a temporary folder in {}", parent.display()))
}

/// The default, in percent.
const READ_OF_WHAT_IS_NOT_ZERO: u8 = 25;
/// The share of all pages of the demo guest's working area that a beat then reads.
const READ_BY_A_BEAT: (u64, u64) = (7, 32);

fn demo_command(args: &Args, swept: Option<u8>, file: &Path) -> Result<Vec<OsString>> {
    let memory = args.memory_bytes();
    let ranges = vmm::memory_layout(memory).context("--memory")?;
    let command = |work: u64, walk: u8| {
        let numbers = [memory, work, walk.into()].map(|number| number.to_string());
        let mut command: Vec<OsString> = vec!["--quiet".into(), "create".into(), file.into()];
        for (option, number) in ["--memory", "--work", "--walk"].into_iter().zip(numbers) {
            command.extend([option.into(), number.into()]);
        }
        command
    };
    if let Some(walk) = swept {
        return Ok(command(vmm::demo::max_work_bytes(&ranges), walk));
    }
    let touch = u64::from(args.touch_percent());
    let (share, of) = READ_BY_A_BEAT;
    let most = vmm::demo::max_work_bytes(&ranges);
    let work = (memory / PAGE_BYTES as u64 * touch / 100 * of / share * PAGE_BYTES as u64)
        .next_multiple_of(WORK_ALIGN_BYTES);
    ensure!(
        work <= most,
        "--touch {touch}: a beat of the demo guest reads at most {} % of a memory of {}; --sweep has other guests",
        most * share / of * 100 / memory,
        size::human(memory)
    );
    Ok(command(work, READ_OF_WHAT_IS_NOT_ZERO))
}

impl Args {
    fn is_demo(&self) -> bool {
        self.target == Path::new(DEMO)
    }

    fn memory_bytes(&self) -> u64 {
        self.memory.unwrap_or(512 << 20)
    }

    fn touch_percent(&self) -> u8 {
        self.touch.unwrap_or(10)
    }

    /// Called before any step that takes time.
    pub(super) fn refuse_sweep_of_others(&self) -> Result<()> {
        if !self.is_demo() && !self.sweep.is_empty() {
            let wrong = format!(
                "--sweep is only for `snap bench {DEMO}`: the share of other guests cannot be set"
            );
            return Err(WrongOptions(wrong).into());
        }
        Ok(())
    }

    fn work(&self, is_demo: bool) -> Result<Work> {
        if !self.is_demo() && (self.memory.is_some() || self.touch.is_some()) {
            bail!("--memory and --touch are only for `snap bench {DEMO}`: a snapshot has its own");
        }
        Ok(match (&self.until, self.run_for, self.beats) {
            (Some(text), _, _) => Work::Until(text.clone()),
            (None, Some(time), _) => Work::For(time),
            (None, None, Some(beats)) => Work::Beats(beats),
            (None, None, None) if is_demo => Work::Beats(1),
            (None, None, None) => bail!(
                "give the end of the guest's work: --until TEXT, which it then writes, or --for TIME"
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_reads_the_given_share() {
        let (share, of) = READ_BY_A_BEAT;
        let pages = 1 << 16;
        let read = (0..pages)
            .filter(|&page| vmm::demo::in_working_set(page, vmm::demo::WALKED_OF_256))
            .count() as u64;
        assert!(read.abs_diff(pages * share / of) < pages / 100, "{read} of {pages}");
    }
}
