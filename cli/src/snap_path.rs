//! The folders of $SNAP_PATH.

use std::path::{Path, PathBuf};

/// The folders in which the parents of layers are searched.
pub(crate) fn folders() -> Vec<PathBuf> {
    let folders = std::env::var_os("SNAP_PATH").unwrap_or_default();
    std::env::split_paths(&folders).filter(|folder| *folder != Path::new("")).collect()
}
