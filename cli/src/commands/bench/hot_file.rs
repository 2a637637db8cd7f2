//! A snapshot with its working set at the front.

use std::path::PathBuf;

use anyhow::Result;
use snapfmt::Snapshot;

use crate::input::{self, ParentArgs};

/// A file with its working set at the front.
pub(super) struct Hot {
    pub(super) file: PathBuf,
    pub(super) snapshot: Snapshot,
    /// Pages of its working set.
    pub(super) pages: u64,
}

impl Hot {
    pub(super) fn open(parents: &ParentArgs, file: PathBuf) -> Result<Self> {
        let snapshot = input::open(&file, parents)?;
        let pages = snapshot.working_set()?.map_or(0, |set| set.len());
        Ok(Self { file, snapshot, pages })
    }
}
