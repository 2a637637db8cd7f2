//! The progress of the prefetch.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

/// The progress of the prefetch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Prefetch {
    /// No prefetch was requested.
    #[default]
    Off,
    /// In progress, or the pager was stopped before its end.
    Running,
    /// The whole list was processed.
    Done,
    /// Given up: the pages of the list required decoding too many bytes, the source panicked, or no thread could be
    /// started.
    GivenUp,
}

/// The progress of the prefetch, for threads that wait for its end.
pub(crate) struct PrefetchProgress {
    state: Mutex<Prefetch>,
    running: AtomicBool,
    changed: Condvar,
}

impl PrefetchProgress {
    pub(crate) fn new(wanted: bool) -> PrefetchProgress {
        let state = if wanted { Prefetch::Running } else { Prefetch::Off };
        PrefetchProgress {
            state: Mutex::new(state),
            running: AtomicBool::new(wanted),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn state(&self) -> Prefetch {
        *self.lock()
    }

    /// Whether the state is `Running`. This takes no lock.
    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    /// Waits until it is not `Running` any more, or for `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> Prefetch {
        let running = |state: &mut Prefetch| *state == Prefetch::Running;
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, running)
            .unwrap_or_else(PoisonError::into_inner);
        *state
    }

    pub(crate) fn ended(&self, state: Prefetch) {
        *self.lock() = state;
        self.running.store(false, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Prefetch> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PrefetchProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(f)
    }
}
