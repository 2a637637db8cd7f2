//! The private folder in memory of a fork, which is removed with its process.
//!
//! A process that is killed leaves its folder behind. The next fork removes it, unless a lock on it shows that it is
//! still in use: `/dev/shm` may be shared with processes whose numbers are not known here.

use std::fs::{DirEntry, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

use crate::leftovers;

const PREFIX: &str = "snap-fork-";

/// The folder. Dropping it removes it.
pub(super) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    pub(super) fn new() -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        remove_abandoned(&place);
        Self::in_place(&place)
            .with_context(|| format!("cannot create a folder in {}", place.display()))
    }

    fn in_place(place: &Path) -> io::Result<Self> {
        let _creating = leftovers::creating();
        loop {
            let mut folder = tempfile::Builder::new();
            let folder = folder.prefix(PREFIX).rand_bytes(12);
            // Guest memory holds secrets: only the owner may read it.
            let folder = folder.permissions(Permissions::from_mode(0o700)).tempdir_in(place)?;
            let locked = lock(folder.path(), FlockOperation::LockExclusive);
            // Another fork may have taken it for an abandoned one before it was locked.
            if folder.path().symlink_metadata().is_ok() {
                let lock = locked?;
                let path = folder.keep();
                leftovers::folder(&path);
                return Ok(Self { path, _lock: lock });
            }
        }
    }

    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is in memory, and private.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Removes the folders of forks that have ended. If that fails, the next fork tries again.
fn remove_abandoned(place: &Path) {
    let Ok(entries) = place.read_dir() else { return };
    for entry in entries.flatten().filter(is_ours) {
        if let Ok(_lock) = lock(&entry.path(), FlockOperation::NonBlockingLockExclusive) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Locks a file in the folder. The lock of the folder itself is that of the sockets in it.
fn lock(folder: &Path, operation: FlockOperation) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let lock = options.open(folder.join("lock"))?;
    flock(&lock, operation)?;
    Ok(lock)
}

/// Whether it is a folder of this user's forks.
fn is_ours(entry: &DirEntry) -> bool {
    let is_named = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
    let is_own = |found: std::fs::Metadata| {
        found.is_dir() && found.uid() == rustix::process::geteuid().as_raw()
    };
    // Not that of the target of a link.
    is_named && entry.metadata().is_ok_and(is_own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_that_are_not_in_use_are_removed() {
        let place = tempfile::tempdir().expect("a temporary folder");
        let used = Folder::in_place(place.path()).expect("it is created");
        let mode = used.path.metadata().expect("it is there").mode();
        assert_eq!(mode & 0o777, 0o700);
        let at = |name: &str| place.path().join(name);
        std::fs::create_dir(at("snap-fork-old")).expect("it is created");
        std::fs::write(at("snap-fork-old/cut.snap"), "").expect("it is written");
        std::fs::create_dir(at("other")).expect("it is created");
        std::os::unix::fs::symlink(at("other"), at("snap-fork-link")).expect("it is created");
        remove_abandoned(place.path());
        assert!(used.path.is_dir() && !at("snap-fork-old").exists());
        assert!(at("other").is_dir() && at("snap-fork-link").is_symlink());
        let path = used.path.clone();
        drop(used);
        assert!(!path.exists());
    }
}
