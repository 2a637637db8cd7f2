//! A guest that is checkpointed: between two checkpoints its memory stays protected, so that what it writes is known.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use snapfmt::Snapshot;
use snapvm::Armed;

use crate::keys::KeyArgs;
use crate::{checkpoints, input};

/// How a live snapshot continues a chain.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoint {
    /// The last checkpoint, or a file with the same memory. Without it, or if what has changed since it is not known,
    /// a new chain begins.
    pub(crate) parent: Option<PathBuf>,
    /// Write no file if no page was written since the last checkpoint.
    pub(crate) if_changed: bool,
    /// How long the memory stays protected after this checkpoint, if there is no other one.
    pub(crate) track_for: Duration,
}

/// Memory that is protected since a checkpoint, and its file.
pub(super) struct Tracked {
    pub(super) armed: Armed,
    /// The id of the last checkpoint.
    pub(super) last: String,
}

/// The memory of a guest between two checkpoints, for the thread that owns the guest and the one that writes.
#[derive(Clone, Default)]
pub(super) struct Tracker(Arc<Mutex<Option<(Tracked, Instant)>>>);

/// The last checkpoint, on which the next one is a layer.
pub(super) struct Base {
    pub(super) last: String,
    pub(super) parent: Snapshot,
    pub(super) path: PathBuf,
}

impl Tracker {
    /// Takes the memory, if `parent` is the last checkpoint. Otherwise it is not protected any more.
    pub(super) fn take(
        &self,
        parent: Option<&Path>,
        keys: &KeyArgs,
    ) -> Result<Option<(Armed, Base)>> {
        let Some((Tracked { armed, last }, _)) = self.lock().take() else { return Ok(None) };
        let Some(path) = parent else { return Ok(None) };
        let named = || format!("the parent {}", path.display());
        let parent = input::open(path, &keys.clone().into()).with_context(named)?;
        let has_last = checkpoints::contents_of(&parent).with_context(named)?.contains(&last);
        Ok(has_last.then(|| (armed, Base { last, parent, path: path.to_owned() })))
    }

    /// Keeps the memory protected until the next checkpoint, or for some time.
    pub(super) fn keep(&self, tracked: Tracked, time: Duration) {
        *self.lock() = Some((tracked, Instant::now() + time));
    }

    /// Without checkpoints, memory is not protected.
    pub(super) fn stop(&self) {
        let tracked = self.lock().take();
        // Not under the lock: it takes the protection away.
        drop(tracked);
    }

    /// When its time is up.
    pub(super) fn until(&self) -> Option<Instant> {
        self.lock().as_ref().map(|(_, until)| *until)
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Tracked, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
