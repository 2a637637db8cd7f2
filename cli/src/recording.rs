//! The run of a guest whose touched pages are recorded, and the file that keeps them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pager::Recording;
use serde_json::json;
use snapfmt::{Changes, Existing, Header, PageIndex, Phase, Snapshot, WorkingSet, copy_snapshot};

use crate::commands::{Session, path_of_parent, refuse_as_output, refuse_existing};
use crate::guest_console::Seen;
use crate::progress::Bar;

/// Pages in the order of touching, each with the phase it was first touched in.
pub(crate) type Touched = Vec<(PageIndex, Phase)>;

/// How a run is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// A run for that alone: the order of touching is known as well as it can be.
    Closely,
    /// A run that is used for something else, and hardly slowed by it.
    InPassing,
}

impl Record {
    /// Between marks, which tell the order of touching, when the run has taken so long and the last one has cost so much.
    fn pause(self, elapsed: Duration, cost: Duration) -> Duration {
        match self {
            Record::Closely => (elapsed / 256).max(cost * 3).max(Duration::from_millis(1)),
            Record::InPassing => (elapsed / 32).max(cost * 50).max(Duration::from_millis(10)),
        }
    }
}

/// Does `run`, which runs the guest, and marks the ends of the phases meanwhile, on a thread of its own.
pub(crate) fn recorded<T>(
    recording: &Recording,
    how: Record,
    seen: &Seen,
    run: impl FnOnce() -> T,
) -> (T, Result<Touched>) {
    let (sender, told) = channel::<()>();
    // The only one that keeps it: when it is gone, so is the run.
    let run_is_on = Arc::new(sender);
    seen.tell_first_output(Arc::downgrade(&run_is_on));
    let (ran, marked) = std::thread::scope(|scope| {
        let mark = move || mark_phases(recording, how, seen, &told);
        let marker = std::thread::Builder::new().name("recorder".into()).spawn_scoped(scope, mark);
        let ran = run();
        drop(run_is_on);
        (ran, marker.map(|marker| marker.join()))
    });
    let touched = || -> Result<Touched> {
        let marked = marked.context("there is no thread to record with")?;
        let Ok(marked) = marked else { bail!("the thread that records has panicked") };
        let phases = marked.context("cannot read which pages are touched")?;
        let of_mark = |mark: u32| phases.get(mark as usize).copied().unwrap_or(Phase::Later);
        let touched = recording
            .touched()
            .into_iter()
            .filter_map(|(offset, mark)| Some((PageIndex::containing(offset)?, of_mark(mark))))
            .collect();
        Ok(touched)
    };
    (ran, touched())
}

/// Marks again and again what was touched, until the run is over; answers the phase of each mark. It is told of the first output, and
/// wakes for nothing but that, its marks and the ends of phases: each waking disturbs who runs.
fn mark_phases(
    recording: &Recording,
    how: Record,
    seen: &Seen,
    told: &Receiver<()>,
) -> std::io::Result<Vec<Phase>> {
    let began = Instant::now();
    let (mut phase, mut phases) = (Phase::FirstOutput, Vec::new());
    let mut next = began;
    loop {
        let to_mark = next.saturating_duration_since(Instant::now());
        let to_phase = end_of(phase).map(|end| end.saturating_sub(began.elapsed()));
        let wait = to_phase.map_or(to_mark, |to_phase| to_phase.min(to_mark));
        let over = told.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected);
        let now = phase_at(began.elapsed(), seen.first_output().is_some());
        let marking = Instant::now();
        if over || now != phase || marking >= next {
            recording.mark()?;
            phases.push(phase);
            phase = now;
            next = Instant::now() + how.pause(began.elapsed(), marking.elapsed());
        }
        if over {
            return Ok(phases);
        }
    }
}

const FIRST_100_MS: Duration = Duration::from_millis(100);
const FIRST_SECOND: Duration = Duration::from_secs(1);

/// What comes before the first output is one phase, however long that takes.
fn phase_at(after: Duration, output: bool) -> Phase {
    match after {
        _ if !output => Phase::FirstOutput,
        after if after < FIRST_100_MS => Phase::First100Ms,
        after if after < FIRST_SECOND => Phase::FirstSecond,
        _ => Phase::Later,
    }
}

/// Since the beginning, of a phase that ends by time.
fn end_of(phase: Phase) -> Option<Duration> {
    match phase {
        Phase::First100Ms => Some(FIRST_100_MS),
        Phase::FirstSecond => Some(FIRST_SECOND),
        _ => None,
    }
}

/// Where a recorded working set goes.
pub(crate) struct Output<'a> {
    pub(crate) path: &'a Path,
    pub(crate) replace: bool,
}

impl Output<'_> {
    /// Refuses, before any work, what could not be written after it.
    pub(crate) fn check(&self, snapshot: &Snapshot) -> Result<()> {
        refuse_as_output(self.path, [snapshot])?;
        refuse_existing(self.path, self.replace)
    }

    /// Writes the snapshot with another working set.
    pub(crate) fn write(
        &self,
        snapshot: &Snapshot,
        set: WorkingSet,
        session: &Session,
    ) -> Result<Header> {
        let mut metadata = snapshot.metadata()?;
        metadata.other.insert("rewritten_from".into(), json!([snapshot.header().id.to_string()]));
        let parent = snapshot.paths().nth(1).flatten();
        let parent_path: Option<PathBuf> =
            parent.map(|parent| path_of_parent(parent, self.path)).transpose()?;
        let existing = if self.replace { Existing::Replace } else { Existing::Keep };
        let changes = Changes::new(set, metadata).parent_path(parent_path).existing(existing);
        let bar = Bar::new("writing", session.quiet, &session.interrupt);
        Ok(copy_snapshot(self.path, snapshot, &changes, &|p| bar.update(p))?)
    }
}
