//! The handle of a running guest: the commands that threads of its clients may send.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use snapfmt::{Progress, WriteOptions};

use super::adding::{AddError, Adding};
use super::checkpoint::Checkpoint;
use crate::on_restore::HookError;
use crate::summary::{ResetSummary, Summary};

/// An event for the thread that owns the guest.
pub(super) enum Event {
    /// The guest has stopped, or a stop was requested.
    Stopped,
    /// The thread that writes a checkpoint has ended.
    Checkpointed,
    /// The command of `--on-restore` was not successful.
    HookFailed(HookError),
    Command(Command, Sender<Answer>),
}

/// A command for the guest.
#[derive(Debug)]
pub(crate) enum Command {
    Pause,
    Resume,
    Store(StoreRequest),
    /// Put it back to its snapshot; it returns to its former state.
    Reset,
}

/// Snapshot it, in any state.
#[derive(Debug)]
pub(crate) struct StoreRequest {
    pub(crate) out: PathBuf,
    /// Store only what differs from the snapshot that the guest was restored from.
    pub(crate) changes_only: bool,
    /// Let it run while the file is written.
    pub(crate) live: bool,
    /// Continue a chain of live snapshots.
    pub(crate) checkpoint: Option<Checkpoint>,
    /// Answer when the file opens, and then add its memory: what the guest may have changed since the snapshot that it was
    /// restored from, or all of a guest that was booted.
    pub(crate) deferred: bool,
    /// End the guest afterwards; otherwise it returns to its former state.
    pub(crate) stop: bool,
    pub(crate) options: WriteOptions,
    /// Set when the client has disconnected, or a client cancels the snapshot.
    pub(crate) cancelled: Arc<AtomicBool>,
}

/// The result of a command.
pub(crate) type Answer = Result<Done, Refused>;

/// A command that was done.
#[derive(Debug)]
pub(crate) enum Done {
    Plain,
    Stored(Summary),
    Reset(ResetSummary),
}

/// A command that was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("the guest is being snapshotted")]
    Busy,
    #[error("the guest has ended")]
    Ended,
    /// The guest is not one for this command. With all causes.
    #[error("{0}")]
    Unfit(String),
    /// With all causes.
    #[error("{0}")]
    Failed(String),
}

/// The state of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum State {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
    Ended,
}

/// The progress of the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Storing {
    pub(crate) done_bytes: u64,
    pub(crate) total_bytes: u64,
}

/// The state of the guest, for all threads.
pub(super) struct Status {
    state: Mutex<State>,
    /// Of a guest that is paused for it.
    storing: Mutex<Cancel>,
    /// Of a guest that runs on.
    saving: Mutex<Cancel>,
    /// The file whose memory is being added.
    pub(super) adding: Adding,
    resetting: AtomicBool,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl Status {
    pub(super) fn set(&self, state: State) {
        *self.lock() = state;
    }

    /// A snapshot of a paused guest begins, or ends.
    pub(super) fn storing(&self, cancel: Cancel) {
        self.progress(Progress::new(0, 0));
        *lock(&self.storing) = cancel;
    }

    /// A snapshot of a guest that runs on begins, or ends.
    pub(super) fn saving(&self, cancel: Cancel) {
        self.progress(Progress::new(0, 0));
        *lock(&self.saving) = cancel;
    }

    /// Whether a file is being written while the guest runs on.
    pub(super) fn is_saving(&self) -> bool {
        lock(&self.saving).is_some()
    }

    /// A reset begins, or ends.
    pub(super) fn resetting(&self, resetting: bool) {
        self.progress(Progress::new(0, 0));
        self.resetting.store(resetting, Ordering::SeqCst);
    }

    pub(super) fn progress(&self, progress: Progress) {
        self.done_bytes.store(progress.done_bytes, Ordering::SeqCst);
        self.total_bytes.store(progress.total_bytes, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn at(&self) -> Storing {
        Storing {
            done_bytes: self.done_bytes.load(Ordering::SeqCst),
            total_bytes: self.total_bytes.load(Ordering::SeqCst),
        }
    }
}

/// While there is a snapshot: what cancels it.
type Cancel = Option<Arc<AtomicBool>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends commands to the guest, from any thread. After the guest has ended it returns an error.
#[derive(Clone)]
pub(crate) struct Remote {
    events: Sender<Event>,
    status: Arc<Status>,
}

/// The events from all [`Remote`]s, and from the guest itself.
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
        storing: Mutex::default(),
        saving: Mutex::default(),
        adding: Adding::default(),
        resetting: AtomicBool::new(false),
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

    /// The progress, while the guest is paused for its snapshot.
    pub(crate) fn storing(&self) -> Option<Storing> {
        lock(&self.status.storing).as_ref().map(|_| self.status.at())
    }

    /// The progress of the snapshot of a guest that runs on.
    pub(crate) fn saving(&self) -> Option<Storing> {
        lock(&self.status.saving).as_ref().map(|_| self.status.at())
    }

    /// The progress of a reset.
    pub(crate) fn resetting(&self) -> Option<Storing> {
        self.status.resetting.load(Ordering::SeqCst).then(|| self.status.at())
    }

    /// Cancels the snapshot that is being written. Returns whether there is one.
    pub(crate) fn cancel(&self) -> bool {
        let cancels = [lock(&self.status.storing).clone(), lock(&self.status.saving).clone()];
        let cancels: Vec<_> = cancels.into_iter().flatten().collect();
        cancels.iter().for_each(|cancel| cancel.store(true, Ordering::SeqCst));
        !cancels.is_empty()
    }

    /// Returns when the page with this number is in the file with this id, or without a number when all of them are.
    /// `has_left` shows whether the client waits no more.
    pub(crate) fn added(
        &self,
        id: &str,
        page: Option<u32>,
        has_left: &dyn Fn() -> bool,
    ) -> Result<(), AddError> {
        match page {
            Some(page) => self.status.adding.add_page(id, page, has_left),
            None => self.status.adding.wait(id, has_left),
        }
    }

    /// Cancels the file with this id whose memory is being added, and returns when that has ended.
    pub(crate) fn cancel_adding(
        &self,
        id: &str,
        has_left: &dyn Fn() -> bool,
    ) -> Result<(), AddError> {
        self.status.adding.cancel(id, has_left)
    }

    /// Sends a command. Its answer comes when it is done; a closed channel means that the guest has ended.
    pub(crate) fn ask(&self, command: Command) -> Result<Receiver<Answer>, Refused> {
        let saving =
            self.saving().is_some() && matches!(command, Command::Store(_) | Command::Reset);
        if saving || self.storing().is_some() {
            return Err(Refused::Busy);
        }
        let (sender, answer) = channel();
        self.events.send(Event::Command(command, sender)).map_err(|_| Refused::Ended)?;
        Ok(answer)
    }
}
