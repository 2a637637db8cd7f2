//! Checkpoints of a guest that runs: after the first one, each holds only what has changed since the one before.

use std::path::Path;

use snapfmt::{Header, OnProgress, Parent, Snapshot, WriteOptions, write_layer};

use crate::error::SnapshotError;
use crate::live::{Armed, Cut, Saved};
use crate::memory::Origin;
use crate::write::{check_room, guest_of, path_of_parent, refuse_as_output};

impl Armed {
    /// Protects again what the guest has written, while it runs: before a later [`Vm::cut`](crate::Vm::cut).
    ///
    /// # Errors
    /// [`SnapshotError::Window`]. Then this is to be dropped.
    pub fn arm_again(&self) -> Result<(), SnapshotError> {
        self.window.arm_again().map_err(SnapshotError::Window)
    }

    /// Whether memory was written since the last point in time that was saved. A page that was only loaded counts.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.window.is_written()
    }
}

impl Cut {
    /// Of a guest that was armed with [`WindowOptions::tracks`](pager::window::WindowOptions): ends this point in time.
    /// With `saved`, the next one has only what changes from this one on. Otherwise it also has all that this one has.
    #[must_use]
    pub fn end(self, saved: bool) -> Armed {
        let Cut { window, discards, memory, .. } = self;
        window.end_cut(saved);
        Armed { window, discards, memory }
    }

    /// Writes what has changed since the last point in time that was saved, as a layer on `parent`. The caller makes
    /// sure that `parent`, which is at `parent_path`, has the memory of that point in time.
    ///
    /// # Errors
    /// [`SnapshotError`]; [`SnapshotError::NothingSaved`] if there was none.
    pub fn write_changes(
        &self,
        out: &Path,
        parent: &Snapshot,
        parent_path: &Path,
        options: &WriteOptions,
        progress: OnProgress<'_>,
    ) -> Result<Header, SnapshotError> {
        let guest = match &self.memory.origin {
            Origin::Booted { guest, .. } => guest.clone(),
            Origin::Restored(restored) => {
                self.memory.check_complete(restored, out)?;
                guest_of(&restored.snapshot)?
            }
        };
        refuse_as_output(out, parent)?;
        let options = &self.memory.as_sealed(options);
        let data = self.window.changed_pages().ok_or(SnapshotError::NothingSaved)?;
        check_room(&data, options, true)?;
        let (saved, states, check) = (Saved(self), self.states()?, || self.window.check());
        let contents = self.contents(&saved, &data, &states, guest).read_once(&check);
        let path = path_of_parent(parent.storage(), parent_path, out)?;
        Ok(write_layer(out, contents, &Parent::new(parent, path), options, progress)?.0)
    }
}
