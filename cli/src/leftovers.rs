//! Files that a command has created, which are removed if its process ends without dropping its values.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use snapvm::{OutputError, OutputShape, StagedOutput};

static LEFTOVERS: Mutex<Vec<Leftover>> = Mutex::new(Vec::new());

enum Leftover {
    /// A name, with the device and inode of its file.
    Name(PathBuf, (u64, u64)),
    Folder(PathBuf),
}

/// Registers the name `path`, as long as it names the same file as now.
pub(crate) fn name(path: &Path) {
    if let Some(identity) = identity(path) {
        add(Leftover::Name(path.to_owned(), identity));
    }
}

/// Registers the folder at `path`, with all its files.
pub(crate) fn folder(path: &Path) {
    add(Leftover::Folder(path.to_owned()));
}

/// An output whose staging folder is this command's.
pub(crate) fn staged_output(
    out: &Path,
    shape: OutputShape,
    replace: bool,
) -> Result<StagedOutput, OutputError> {
    let staged = StagedOutput::new(out, shape, replace)?;
    folder(staged.staging_folder());
    Ok(staged)
}

fn add(leftover: Leftover) {
    LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner).push(leftover);
}

/// A disk that does not answer delays the end of the process no longer than this.
const PATIENCE: Duration = Duration::from_secs(1);

/// Removes the registered files that still exist, if that does not take long.
pub(crate) fn remove() {
    let (done, ended) = std::sync::mpsc::channel();
    let removing = move || {
        remove_all();
        drop(done);
    };
    match std::thread::Builder::new().spawn(removing) {
        // Dropping the sender signals its end.
        Ok(_thread) => drop::<Result<(), _>>(ended.recv_timeout(PATIENCE)),
        Err(_) => remove_all(),
    }
}

fn remove_all() {
    for leftover in LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        // The process is ending: there is no way left to report an error.
        let _ = match leftover {
            Leftover::Name(path, known) if identity(&path) == Some(known) => {
                std::fs::remove_file(path)
            }
            Leftover::Name(..) => Ok(()),
            Leftover::Folder(path) => std::fs::remove_dir_all(path),
        };
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let named = path.symlink_metadata().ok()?;
    Some((named.dev(), named.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_registered_files_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["ours", "replaced", "other"] {
            std::fs::write(path(name), b"").unwrap();
        }
        std::fs::create_dir(path("folder")).unwrap();
        std::fs::write(path("folder").join("file"), b"").unwrap();
        name(&path("ours"));
        name(&path("replaced"));
        self::folder(&path("folder"));
        std::fs::write(path("new"), b"").unwrap();
        std::fs::rename(path("new"), path("replaced")).unwrap();
        remove_all();
        let entries = std::fs::read_dir(folder.path()).unwrap();
        let mut left: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["other", "replaced"]);
    }
}
