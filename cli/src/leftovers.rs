//! Files that a command has created, which are removed if its process ends without dropping its values.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use snapvm::{OutputError, OutputShape, StagedOutput};

static LEFTOVERS: Mutex<Vec<Leftover>> = Mutex::new(Vec::new());

enum Leftover {
    /// A name, with the device and inode of its file.
    Name(PathBuf, (u64, u64)),
    Folder(PathBuf),
}

static CREATIONS: Creations = Creations::new();

/// The files that are being created and are not registered yet.
struct Creations {
    state: Mutex<CreationsState>,
    changed: Condvar,
}

struct CreationsState {
    running: usize,
    /// The process ends, and creates nothing more.
    ending: bool,
}

/// While this exists, a file is being created and registered.
#[must_use]
pub(crate) struct Creating<'a>(&'a Creations);

/// A file is going to be created and registered; the end of the process waits for that. Once the process is ending,
/// this waits forever, because the file would not be removed.
pub(crate) fn creating() -> Creating<'static> {
    CREATIONS.begin()
}

impl Creations {
    const fn new() -> Self {
        let state = CreationsState { running: 0, ending: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn begin(&self) -> Creating<'_> {
        let state = self.changed.wait_while(self.state(), |state| state.ending);
        state.unwrap_or_else(PoisonError::into_inner).running += 1;
        Creating(self)
    }

    /// Waits for those that run, and lets no more begin.
    fn end(&self, timeout: Duration) {
        let mut state = self.state();
        state.ending = true;
        let running = |state: &mut CreationsState| state.running > 0;
        let waited = self.changed.wait_timeout_while(state, timeout, running);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn state(&self) -> MutexGuard<'_, CreationsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Creating<'_> {
    fn drop(&mut self) {
        self.0.state().running -= 1;
        self.0.changed.notify_all();
    }
}

/// Registers the name `path`, as long as it names the same file as now.
pub(crate) fn name(path: &Path) {
    if let Some(identity) = identity(path) {
        add(Leftover::Name(path.to_owned(), identity));
    }
}

/// The folders that have registered names.
pub(crate) fn folders() -> Vec<PathBuf> {
    let leftovers = LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = |leftover: &Leftover| match leftover {
        Leftover::Name(path, _) | Leftover::Folder(path) => path.parent().map(Path::to_owned),
    };
    let mut folders: Vec<_> = leftovers.iter().filter_map(folder).collect();
    folders.dedup();
    folders
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
    let _creating = creating();
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
        // A creation may itself wait, for a lock or a disk.
        CREATIONS.end(PATIENCE / 2);
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
    use std::sync::atomic::{AtomicBool, Ordering};

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

    #[test]
    fn the_end_waits_for_what_is_being_created() {
        let creations = Creations::new();
        let long = Duration::from_secs(60);
        let creating = creations.begin();
        let created = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                creations.end(long);
                assert!(created.load(Ordering::SeqCst));
            });
            while !creations.state().ending {
                std::thread::yield_now();
            }
            created.store(true, Ordering::SeqCst);
            drop(creating);
        });
        // One that does not end delays the process no longer than the given time.
        let stuck = Creations::new();
        let _creating = stuck.begin();
        stuck.end(Duration::from_millis(1));
    }
}
