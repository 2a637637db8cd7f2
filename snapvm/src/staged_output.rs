//! An output, a file or a folder of files, that appears whole at its path or not at all.
//!
//! It is built in a folder `.NAME.PID.tmp` next to the output, and renamed when all is written and synced. A process
//! that is killed leaves its folder behind. The next process that writes the same output removes the folder, unless a
//! lock on it shows that it is still in use.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags};

/// The kind of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputShape {
    /// One file.
    File,
    /// A folder with files of these names, and no others.
    Folder(&'static [&'static str]),
}

/// An output that cannot be created, or would replace something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// The path does not end with a file name.
    #[error("{} does not end with a file name", path.display())]
    NoName {
        /// The output.
        path: PathBuf,
    },
    /// The output exists and may not be replaced.
    #[error("{} exists", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// A folder is not replaced by a file.
    #[error("{} is a folder; it is not replaced by a file", path.display())]
    IsFolder {
        /// The output.
        path: PathBuf,
    },
    /// A file is not replaced by a folder.
    #[error("{} is not a folder; it is not replaced by one", path.display())]
    NotFolder {
        /// The output.
        path: PathBuf,
    },
    /// The folder holds a file that would be lost.
    #[error("{} is not replaced: it also holds {}", path.display(), holds.display())]
    HoldsMore {
        /// The output.
        path: PathBuf,
        /// Name of that file.
        holds: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// The operation: create, list, sync or name.
        what: &'static str,
        /// The output.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        error: io::Error,
    },
}

/// An output that has not appeared yet. If it is dropped without [`StagedOutput::publish`], it never appears.
#[derive(Debug)]
pub struct StagedOutput {
    out: PathBuf,
    shape: OutputShape,
    replace: bool,
    folder: PathBuf,
    /// The open folder, which is locked.
    lock: File,
}

/// The name of a single file while it is in the staging folder.
const SINGLE: &str = "file";

impl StagedOutput {
    /// Creates the private folder in which the output is built. With `replace`, publishing replaces an existing
    /// output, but a folder only if it contains no files except those of `shape`.
    ///
    /// # Errors
    /// [`OutputError`]
    pub fn new(out: &Path, shape: OutputShape, replace: bool) -> Result<Self, OutputError> {
        let no_name = || OutputError::NoName { path: out.to_owned() };
        let name = out.file_name().ok_or_else(no_name)?;
        may_take(out, shape, replace)?;
        remove_abandoned(parent(out), name);
        let folder = out.with_file_name(temporary_name(name, std::process::id()));
        let failed = failed("create", out);
        // Guest memory holds secrets: only the owner may read it.
        DirBuilder::new().mode(0o700).create(&folder).map_err(&failed)?;
        let lock = File::open(&folder).and_then(|lock| {
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        });
        let lock = lock.inspect_err(|_| remove(&folder)).map_err(&failed)?;
        Ok(Self { out: out.to_owned(), shape, replace, folder, lock })
    }

    /// Where the output will appear.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.out
    }

    /// The folder in which the output is built. A process that ends without dropping this must remove the folder.
    #[must_use]
    pub fn staging_folder(&self) -> &Path {
        &self.folder
    }

    /// Creates the output file.
    ///
    /// # Errors
    /// [`OutputError::Io`]
    pub fn file(&self) -> Result<File, OutputError> {
        self.file_named(SINGLE)
    }

    /// Creates a file in the output folder.
    ///
    /// # Errors
    /// [`OutputError::Io`]
    pub fn file_named(&self, name: &str) -> Result<File, OutputError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(self.folder.join(name)).map_err(failed("create", &self.out))
    }

    /// Syncs all files and renames the output to its path.
    ///
    /// # Errors
    /// [`OutputError`]. The output does not appear, unless only the last sync, that of its name, has failed.
    pub fn publish(self) -> Result<(), OutputError> {
        let out = &self.out;
        let sync = failed("sync", out);
        for entry in std::fs::read_dir(&self.folder).map_err(&sync)? {
            entry.and_then(|entry| File::open(entry.path())?.sync_all()).map_err(&sync)?;
        }
        self.lock.sync_all().map_err(&sync)?;
        // This is checked again, because an output may have appeared meanwhile.
        may_take(out, self.shape, self.replace)?;
        let exists = out.symlink_metadata().is_ok();
        let from = match self.shape {
            OutputShape::File => self.folder.join(SINGLE),
            OutputShape::Folder(_) => self.folder.clone(),
        };
        let flags = match (self.shape, self.replace && exists) {
            (_, false) => RenameFlags::NOREPLACE,
            (OutputShape::File, true) => RenameFlags::empty(),
            // The old folder gets the temporary name, and is removed with it.
            (OutputShape::Folder(_), true) => RenameFlags::EXCHANGE,
        };
        rustix::fs::renameat_with(CWD, &from, CWD, out, flags)
            .map_err(io::Error::from)
            .and_then(|()| File::open(parent(out))?.sync_all())
            .map_err(failed("name", out))
    }
}

fn failed<'a>(what: &'static str, out: &'a Path) -> impl Fn(io::Error) -> OutputError + 'a {
    move |error| OutputError::Io { what, path: out.to_owned(), error }
}

impl Drop for StagedOutput {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

/// Refuses an output that exists and may not be replaced.
fn may_take(out: &Path, shape: OutputShape, replace: bool) -> Result<(), OutputError> {
    let Ok(found) = out.symlink_metadata() else { return Ok(()) };
    let path = out.to_owned();
    if !replace {
        return Err(OutputError::Exists { path });
    }
    match shape {
        OutputShape::File if found.is_dir() => Err(OutputError::IsFolder { path }),
        OutputShape::Folder(_) if !found.is_dir() => Err(OutputError::NotFolder { path }),
        OutputShape::File => Ok(()),
        OutputShape::Folder(names) => only_has(out, names),
    }
}

/// Refuses to replace a folder that contains other files, which would be lost.
fn only_has(folder: &Path, names: &[&str]) -> Result<(), OutputError> {
    let failed = failed("list", folder);
    for entry in std::fs::read_dir(folder).map_err(&failed)? {
        let name = entry.map_err(&failed)?.file_name();
        if !names.iter().any(|ours| name == *ours) {
            return Err(OutputError::HoldsMore { path: folder.to_owned(), holds: name.into() });
        }
    }
    Ok(())
}

fn parent(out: &Path) -> &Path {
    match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn temporary_name(name: &OsStr, process: u32) -> OsString {
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{process}.tmp"));
    temporary
}

/// Removes the staging folders of processes that have ended. If that fails, the next process tries again.
fn remove_abandoned(parent: &Path, name: &OsStr) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let found = entry.file_name();
        let middle = found
            .as_bytes()
            .strip_prefix(b".")
            .and_then(|rest| rest.strip_prefix(name.as_bytes()))
            .and_then(|rest| rest.strip_prefix(b"."))
            .and_then(|rest| rest.strip_suffix(b".tmp"));
        let ours = middle.is_some_and(|process| {
            !process.is_empty() && process.iter().all(|byte| byte.is_ascii_digit())
        });
        if !ours || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        let abandoned = File::open(&path).is_ok_and(|folder| {
            rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok()
        });
        if abandoned {
            remove(&path);
        }
    }
}

/// Removes a staging folder. If that fails, the next process that writes the same output tries again.
fn remove(folder: &Path) {
    let _ = std::fs::remove_dir_all(folder);
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn write(staging: &StagedOutput, name: &str) {
        staging.file_named(name).unwrap().write_all(b"x").unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn an_output_that_is_not_published_never_appears() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a");
        write(&StagedOutput::new(&out, OutputShape::Folder(&["m"]), false).unwrap(), "m");
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn abandoned_folders_are_removed_and_used_ones_kept() {
        let folder = tempfile::tempdir().unwrap();
        for name in [".a.1.tmp", ".a.x.tmp", ".b.1.tmp"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let used = folder.path().join(".a.2.tmp");
        std::fs::create_dir(&used).unwrap();
        let lock = File::open(&used).unwrap();
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        drop(StagedOutput::new(&folder.path().join("a"), OutputShape::File, false).unwrap());
        assert_eq!(names(folder.path()), [".a.2.tmp", ".a.x.tmp", ".b.1.tmp"]);
    }

    #[test]
    fn a_folder_is_replaced_only_when_nothing_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a");
        let shape = OutputShape::Folder(&["m"]);
        for _ in 0..2 {
            let staging = StagedOutput::new(&out, shape, true).unwrap();
            write(&staging, "m");
            staging.publish().unwrap();
        }
        assert_eq!(names(folder.path()), ["a"]);
        assert!(StagedOutput::new(&out, shape, false).is_err());
        assert!(StagedOutput::new(&out, OutputShape::File, true).is_err());
        std::fs::write(out.join("mine"), b"").unwrap();
        let error = StagedOutput::new(&out, shape, true).unwrap_err();
        assert!(error.to_string().contains("mine"), "{error}");
    }
}
