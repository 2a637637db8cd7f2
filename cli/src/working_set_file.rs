//! Writes a copy of a snapshot with another working set.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;
use snapfmt::{Changes, Existing, Header, Snapshot, WorkingSet, copy_snapshot};
use snapvm::path_of_parent;

use crate::input::{refuse_as_output, refuse_existing};
use crate::progress::Bar;
use crate::session::Session;

/// The output of a recorded working set.
pub(crate) struct Output<'a> {
    pub(crate) path: &'a Path,
    pub(crate) replace: bool,
}

impl Output<'_> {
    /// Refuses, before any work, an output that could not be written afterwards.
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
        let parent = snapshot.storages().zip(snapshot.paths()).nth(1);
        let parent = parent.and_then(|(storage, path)| Some((storage, path?)));
        let parent_path: Option<PathBuf> =
            parent.map(|(storage, path)| path_of_parent(storage, path, self.path)).transpose()?;
        let existing = if self.replace { Existing::Replace } else { Existing::Keep };
        let changes = Changes::new(set, metadata).parent_path(parent_path).existing(existing);
        let bar = Bar::new("writing", session.quiet, &session.interrupt);
        Ok(copy_snapshot(self.path, snapshot, &changes, &|p| bar.update(p))?)
    }
}
