//! Records which pages a guest touches, in which order and phase: the working set of later restores.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use pager::Recording;
use snapfmt::{PageIndex, Phase};

/// Pages in the order in which they were touched, each with the phase of its first touch.
pub type Touched = Vec<(PageIndex, Phase)>;

/// How often the touched pages of a run are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// For a run that serves only the recording: the order of the pages is as exact as possible.
    Closely,
    /// For a run with another purpose: recording takes at most 2 % of its time.
    InPassing,
}

impl Pace {
    /// The time until the next mark, if the run has taken `elapsed` so far and the last mark took `cost`.
    fn pause(self, elapsed: Duration, cost: Duration) -> Duration {
        match self {
            Pace::Closely => (elapsed / 256).max(cost * 3).max(Duration::from_millis(1)),
            Pace::InPassing => (elapsed / 32).max(cost * 50).max(Duration::from_millis(10)),
        }
    }
}

/// The time of a guest's first output. The console notes it.
#[derive(Clone, Debug, Default)]
pub struct FirstOutput(Arc<FirstOutputInner>);

#[derive(Debug, Default)]
struct FirstOutputInner {
    at: OnceLock<Instant>,
    listener: Mutex<Weak<Sender<()>>>,
}

impl FirstOutput {
    /// Notes the time of the first call. Later calls do nothing.
    pub fn note(&self) {
        if self.0.at.set(Instant::now()).is_ok() {
            self.notify();
        }
    }

    /// The time of the first output, if there was one.
    #[must_use]
    pub fn at(&self) -> Option<Instant> {
        self.0.at.get().copied()
    }

    /// Sends a message at the first output, or now if there was one, unless `to` was dropped.
    fn listen(&self, to: Weak<Sender<()>>) {
        *self.listener() = to;
        if self.at().is_some() {
            self.notify();
        }
    }

    fn notify(&self) {
        if let Some(to) = self.listener().upgrade() {
            // A dropped receiver does not need the message.
            let _ = to.send(());
        }
    }

    fn listener(&self) -> MutexGuard<'_, Weak<Sender<()>>> {
        self.0.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The touched pages of a run could not be recorded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// pthread_create(3) failed.
    #[error("cannot start the recording thread")]
    Thread(#[source] std::io::Error),
    /// The recording thread has panicked, which is a bug of this crate.
    #[error("the recording thread has panicked")]
    Panicked,
    /// pread(2) of `/proc/self/pagemap` failed.
    #[error("cannot read which pages are touched")]
    Read(#[source] std::io::Error),
}

/// Calls `run`, which runs the guest to its end. Meanwhile another thread marks the ends of the guest's phases.
pub fn record<T>(
    recording: &Recording,
    pace: Pace,
    first_output: &FirstOutput,
    run: impl FnOnce() -> T,
) -> (T, Result<Touched, RecordError>) {
    let (sender, messages) = channel::<()>();
    // This is the only strong reference, so the channel is disconnected when the run is over.
    let run_is_on = Arc::new(sender);
    first_output.listen(Arc::downgrade(&run_is_on));
    let (ran, marked) = std::thread::scope(|scope| {
        let mark = move || mark_phases(recording, pace, first_output, &messages);
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

/// Marks the touched pages repeatedly until the run is over, and returns the phase of each mark. The thread wakes only
/// for marks, the first output and the ends of phases, because each wake-up takes time from the guest.
fn mark_phases(
    recording: &Recording,
    pace: Pace,
    first_output: &FirstOutput,
    messages: &Receiver<()>,
) -> std::io::Result<Vec<Phase>> {
    let began = Instant::now();
    let (mut phase, mut phases) = (Phase::FirstOutput, Vec::new());
    let mut next = began;
    loop {
        let to_mark = next.saturating_duration_since(Instant::now());
        let to_phase = end_of(phase).map(|end| end.saturating_sub(began.elapsed()));
        let wait = to_phase.map_or(to_mark, |to_phase| to_phase.min(to_mark));
        let over = messages.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected);
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

/// The phase at this time. The time before the first output is one phase, however long it is.
fn phase_at(after: Duration, output: bool) -> Phase {
    match after {
        _ if !output => Phase::FirstOutput,
        after if after < FIRST_100_MS => Phase::First100Ms,
        after if after < FIRST_SECOND => Phase::FirstSecond,
        _ => Phase::Later,
    }
}

/// The end of a phase that has a fixed one, since the beginning of the run.
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
    fn each_listener_gets_one_message_for_the_first_output() {
        let (sender, messages) = channel();
        let sender = Arc::new(sender);
        let output = FirstOutput::default();
        output.listen(Arc::downgrade(&sender));
        assert!(messages.try_recv().is_err());
        output.note();
        output.note();
        assert_eq!(messages.try_iter().count(), 1);
        output.listen(Arc::downgrade(&sender));
        assert_eq!(messages.try_iter().count(), 1);
        drop(sender);
        assert_eq!(messages.recv(), Err(std::sync::mpsc::RecvError), "no other sender is left");
    }
}
