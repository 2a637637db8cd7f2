//! The bodies of requests of the control socket.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use snapfmt::{Codec, Existing, WriteOptions};

use crate::live::Checkpoint;

/// The body of `PATCH /vm`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VmState {
    pub(super) state: Wanted,
}

#[derive(Deserialize)]
pub(super) enum Wanted {
    Paused,
    Resumed,
}

/// The body of `PUT /snapshot/create`.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateSnapshot {
    pub(super) snapshot_path: PathBuf,
    #[serde(default)]
    pub(super) snapshot_type: SnapshotType,
    #[serde(default, rename = "type")]
    pub(super) pausing: Pausing,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) checkpoint: Option<CheckpointFields>,
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) deferred: bool,
    #[serde(default)]
    pub(super) stop: bool,
    #[serde(default)]
    pub(super) force: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) codec: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) level: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) chunk_pages: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dedupe: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) threads: Option<NonZeroUsize>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// How a live snapshot continues a chain.
#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CheckpointFields {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<PathBuf>,
    #[serde(default)]
    pub(crate) if_changed: bool,
    pub(crate) track_ms: u64,
}

/// The longest time between two checkpoints.
const MOST_TRACK_MS: u64 = 24 * 60 * 60 * 1000;

impl CheckpointFields {
    pub(super) fn checked(self, wanted: &CreateSnapshot) -> Result<Checkpoint, &'static str> {
        if wanted.pausing != Pausing::Live || matches!(wanted.snapshot_type, SnapshotType::Diff) {
            return Err(
                "checkpoint: for a snapshot with the type \"live\", and without a snapshot_type",
            );
        }
        if self.parent.as_ref().is_some_and(|parent| !parent.is_absolute()) {
            return Err(
                "checkpoint: the parent is relative, and the guest's working folder is not yours",
            );
        }
        if !(1..=MOST_TRACK_MS).contains(&self.track_ms) {
            return Err("checkpoint: track_ms is not in 1 to a day");
        }
        let CheckpointFields { parent, if_changed, track_ms } = self;
        Ok(Checkpoint { parent, if_changed, track_for: Duration::from_millis(track_ms) })
    }
}

impl CreateSnapshot {
    pub(super) fn can_be_deferred(&self) -> bool {
        let is_full = matches!(self.snapshot_type, SnapshotType::Full);
        self.pausing == Pausing::Live && is_full && self.checkpoint.is_none()
    }

    /// How the file is to be written, or the error in the request.
    pub(super) fn options(&self) -> Result<WriteOptions, String> {
        let mut options = WriteOptions::default();
        if let Some(codec) = &self.codec {
            options.codec = codec.parse().map_err(|error| format!("codec: {error}"))?;
        }
        if let Some(level) = self.level {
            if options.codec != Codec::Zstd {
                return Err(format!("level: {} has no levels", options.codec));
            }
            if !(-7..=22).contains(&level) {
                return Err(format!("level: {level} is not in -7 to 22"));
            }
            options.level = level;
        }
        if let Some(pages) = self.chunk_pages {
            if !(1..=512).contains(&pages) {
                return Err(format!("chunk_pages: {pages} is not in 1 to 512"));
            }
            options.chunk_pages = pages.into();
        }
        options.dedupe = self.dedupe.unwrap_or(options.dedupe);
        options.threads = self.threads.unwrap_or(options.threads);
        options.existing = if self.force { Existing::Replace } else { Existing::Keep };
        Ok(options)
    }
}

#[derive(Clone, Copy, Default, Deserialize, Serialize)]
pub(super) enum SnapshotType {
    #[default]
    Full,
    Diff,
}

/// The body of `PUT /snapshot/load`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LoadSnapshot {
    #[serde(rename = "type")]
    pub(super) kind: LoadType,
}

#[derive(Deserialize)]
pub(super) enum LoadType {
    /// The snapshot that the guest was restored from.
    #[serde(rename = "reset")]
    Reset,
}

/// The body of `PUT` and `DELETE /snapshot/pages`.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeferredPages {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) page: Option<u32>,
}

/// Whether the guest is paused until the file is complete, or runs meanwhile.
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(super) enum Pausing {
    #[default]
    #[serde(rename = "paused")]
    Paused,
    #[serde(rename = "live")]
    Live,
}
