//! Records which pages a guest touches, in which order and phase: the working set of later restores.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use pager::Recording;
use snapfmt::{PageIndex, Phase};

/// Pages in the order of touching, each with the phase it was first touched in.
pub type Touched = Vec<(PageIndex, Phase)>;

/// How often a run is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// For a run that serves only to record: the order of touching is as exact as possible.
    Closely,
    /// For a run with another purpose: recording takes at most 2 % of its time.
    InPassing,
}

impl Pace {
    /// The time until the next mark, after so much of the run, when the last mark took `cost`.
    fn pause(self, elapsed: Duration, cost: Duration) -> Duration {
        match self {
            Pace::Closely => (elapsed / 256).max(cost * 3).max(Duration::from_millis(1)),
            Pace::InPassing => (elapsed / 32).max(cost * 50).max(Duration::from_millis(10)),
        }
    }
}

/// The moment of a guest's first output. The console notes it.
#[derive(Clone, Debug, Default)]
pub struct FirstOutput(Arc<FirstOutputInner>);

#[derive(Debug, Default)]
struct FirstOutputInner {
    at: OnceLock<Instant>,
    listener: Mutex<Weak<Sender<()>>>,
}

impl FirstOutput {
    /// Notes that there is output, the first time it is called.
    pub fn note(&self) {
        if self.0.at.set(Instant::now()).is_ok() {
            self.tell();
        }
    }

    /// When it was, if it was.
    #[must_use]
    pub fn at(&self) -> Option<Instant> {
        self.0.at.get().copied()
    }

    /// Sends a message at the first output, or now if there was one, while `to` exists.
    fn listen(&self, to: Weak<Sender<()>>) {
        *self.listener() = to;
        if self.at().is_some() {
            self.tell();
        }
    }

    fn tell(&self) {
        if let Some(to) = self.listener().upgrade() {
            // A receiver that is gone has no use for it.
            let _ = to.send(());
        }
    }

    fn listener(&self) -> MutexGuard<'_, Weak<Sender<()>>> {
        self.0.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A run whose touched pages are not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// As pthread_create(3).
    #[error("there is no thread to record with")]
    Thread(#[source] std::io::Error),
    /// A bug of this crate.
    #[error("the thread that records has panicked")]
    Panicked,
    /// As pread(2) of /proc/self/pagemap.
    #[error("cannot read which pages are touched")]
    Read(#[source] std::io::Error),
}

/// Calls `run`, which runs the guest to its end, and marks the ends of its phases meanwhile, on another thread.
pub fn record<T>(
    recording: &Recording,
    pace: Pace,
    first_output: &FirstOutput,
    run: impl FnOnce() -> T,
) -> (T, Result<Touched, RecordError>) {
    let (sender, told) = channel::<()>();
    // The only strong reference: the channel is disconnected when the run is over.
    let run_is_on = Arc::new(sender);
    first_output.listen(Arc::downgrade(&run_is_on));
    let (ran, marked) = std::thread::scope(|scope| {
        let mark = move || mark_phases(recording, pace, first_output, &told);
        let marker = std::thread::Builder::new().name("recorder".into()).spawn_scoped(scope, mark);
        let ran = run();
        drop(run_is_on);
        (ran, marker.map(|marker| marker.join()))
    });
    let touched = || -> Result<Touched, RecordError> {
        let marked = marked.map_err(RecordError::Thread)?;
        let phases = marked.map_err(|_| RecordError::Panicked)?.map_err(RecordError::Read)?;
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

/// Marks what was touched, again and again until the run is over, and returns the phase of each mark. It wakes only for marks,
/// the first output and the ends of phases: each wake-up takes time from the guest.
fn mark_phases(
    recording: &Recording,
    pace: Pace,
    first_output: &FirstOutput,
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
        let now = phase_at(began.elapsed(), first_output.at().is_some());
        let marking = Instant::now();
        if over || now != phase || marking >= next {
            recording.mark()?;
            phases.push(phase);
            phase = now;
            next = Instant::now() + pace.pause(began.elapsed(), marking.elapsed());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_output_is_told_once_to_each_listener() {
        let (sender, told) = channel();
        let sender = Arc::new(sender);
        let output = FirstOutput::default();
        output.listen(Arc::downgrade(&sender));
        assert!(told.try_recv().is_err());
        output.note();
        output.note();
        assert_eq!(told.try_iter().count(), 1);
        output.listen(Arc::downgrade(&sender));
        assert_eq!(told.try_iter().count(), 1);
        drop(sender);
        assert_eq!(told.recv(), Err(std::sync::mpsc::RecvError), "no other sender is left");
    }
}
