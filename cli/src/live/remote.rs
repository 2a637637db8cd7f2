//! The other end of a guest that runs: what threads that serve its users may ask for.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use snapfmt::{Progress, WriteOptions};

use crate::summary::Summary;

/// What wakes the thread that has the guest.
pub(super) enum Event {
    /// The guest has stopped, or is told to.
    Stopped,
    Command(Command, Sender<Answer>),
}

/// What the guest can be asked for.
#[derive(Debug)]
pub(crate) enum Command {
    Pause,
    Resume,
    Store(StoreRequest),
}

/// To be stored, whatever it does at the moment.
#[derive(Debug)]
pub(crate) struct StoreRequest {
    pub(crate) out: PathBuf,
    /// Only what differs from the snapshot that the guest was brought back from.
    pub(crate) changes_only: bool,
    /// End the guest after it; otherwise it does what it did before.
    pub(crate) stop: bool,
    pub(crate) options: WriteOptions,
    /// Set when the client is gone.
    pub(crate) cancelled: Arc<AtomicBool>,
}

/// What came of a command.
pub(crate) type Answer = Result<Option<Summary>, Refused>;

/// A command that was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("the guest is being stored")]
    Busy,
    #[error("the guest has ended")]
    Ended,
    /// With all causes.
    #[error("{0}")]
    Failed(String),
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum State {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
    Ended,
}

/// How far the storing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Storing {
    pub(crate) done_bytes: u64,
    pub(crate) total_bytes: u64,
}

/// What the guest does, for all who ask.
pub(super) struct Status {
    state: Mutex<State>,
    storing: AtomicBool,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl Status {
    pub(super) fn set(&self, state: State) {
        *self.lock() = state;
    }

    pub(super) fn storing(&self, on: bool) {
        self.progress(Progress::new(0, 0));
        self.storing.store(on, Ordering::SeqCst);
    }

    pub(super) fn progress(&self, progress: Progress) {
        self.done_bytes.store(progress.done_bytes, Ordering::SeqCst);
        self.total_bytes.store(progress.total_bytes, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks the guest for things, from any thread. It outlives the guest, and then says so.
#[derive(Clone)]
pub(crate) struct Remote {
    events: Sender<Event>,
    status: Arc<Status>,
}

/// What comes from all [`Remote`]s, and from the guest itself.
pub(crate) struct Events {
    pub(super) received: Receiver<Event>,
    pub(super) sender: Sender<Event>,
    pub(super) status: Arc<Status>,
}

/// The two ends of a guest that does not run yet.
pub(crate) fn remote() -> (Remote, Events) {
    let (sender, received) = channel();
    let status = Arc::new(Status {
        state: Mutex::new(State::NotStarted),
        storing: AtomicBool::new(false),
        done_bytes: AtomicU64::new(0),
        total_bytes: AtomicU64::new(0),
    });
    let remote = Remote { events: sender.clone(), status: Arc::clone(&status) };
    (remote, Events { received, sender, status })
}

impl Remote {
    pub(crate) fn state(&self) -> State {
        *self.status.lock()
    }

    /// How far it is, while the guest is being stored.
    pub(crate) fn storing(&self) -> Option<Storing> {
        let status = &self.status;
        status.storing.load(Ordering::SeqCst).then(|| Storing {
            done_bytes: status.done_bytes.load(Ordering::SeqCst),
            total_bytes: status.total_bytes.load(Ordering::SeqCst),
        })
    }

    /// Hands a command over. Its answer comes when it is done; a closed channel means that the guest has ended.
    pub(crate) fn ask(&self, command: Command) -> Result<Receiver<Answer>, Refused> {
        if self.storing().is_some() {
            return Err(Refused::Busy);
        }
        let (sender, answer) = channel();
        self.events.send(Event::Command(command, sender)).map_err(|_| Refused::Ended)?;
        Ok(answer)
    }
}
