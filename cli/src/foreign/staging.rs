//! An output, a file or a folder of files, that appears whole at its path or not at all.
//!
//! It is built in a folder `.NAME.PID.tmp` next to the output and renamed when all is written and
//! synced. A process that is killed leaves its folder behind; the next one that writes the same
//! output removes it, which a lock on the folder keeps it from doing to one that is still in use.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FlockOperation, RenameFlags};

use crate::leftovers;

/// What the output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    File,
    /// A folder with files of these names, and no others.
    Folder(&'static [&'static str]),
}

/// An output that has not appeared yet. Dropped without [`Staging::publish`], it never does.
#[derive(Debug)]
pub(crate) struct Staging {
    out: PathBuf,
    shape: Shape,
    replace: bool,
    folder: PathBuf,
    /// Held open: it carries the lock.
    lock: File,
}

/// The name of a single file while it is in the staging folder.
const SINGLE: &str = "file";

impl Staging {
    pub(crate) fn new(out: &Path, shape: Shape, replace: bool) -> Result<Self> {
        let name = out.file_name().with_context(|| format!("{} names no file", out.display()))?;
        may_take(out, shape, replace)?;
        remove_abandoned(parent(out), name);
        let folder = out.with_file_name(temporary_name(name, std::process::id()));
        let failed = || format!("cannot create {}", out.display());
        // Guest memory holds secrets: only the owner may read it.
        DirBuilder::new().mode(0o700).create(&folder).with_context(failed)?;
        leftovers::folder(&folder);
        let lock = File::open(&folder).and_then(|lock| {
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        });
        let lock = lock.inspect_err(|_| remove(&folder)).with_context(failed)?;
        Ok(Self { out: out.to_owned(), shape, replace, folder, lock })
    }

    /// Creates the output file.
    pub(crate) fn file(&self) -> Result<File> {
        self.file_named(SINGLE)
    }

    /// Creates a file in the output folder.
    pub(crate) fn file_named(&self, name: &str) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(self.folder.join(name));
        file.with_context(|| format!("cannot create {}", self.out.display()))
    }

    /// Makes everything durable and gives it its name.
    pub(crate) fn publish(self) -> Result<()> {
        let out = &self.out;
        for entry in std::fs::read_dir(&self.folder)
            .with_context(|| format!("cannot sync {}", out.display()))?
        {
            let synced = entry.and_then(|entry| File::open(entry.path())?.sync_all());
            synced.with_context(|| format!("cannot sync {}", out.display()))?;
        }
        self.lock.sync_all().with_context(|| format!("cannot sync {}", out.display()))?;
        // Again, for what has come in the meantime.
        may_take(out, self.shape, self.replace)?;
        let (from, exists) = match self.shape {
            Shape::File => (self.folder.join(SINGLE), out.symlink_metadata().is_ok()),
            Shape::Folder(_) => (self.folder.clone(), out.symlink_metadata().is_ok()),
        };
        let flags = match (self.shape, self.replace && exists) {
            (_, false) => RenameFlags::NOREPLACE,
            (Shape::File, true) => RenameFlags::empty(),
            // The old folder ends under the temporary name, and with it.
            (Shape::Folder(_), true) => RenameFlags::EXCHANGE,
        };
        rustix::fs::renameat_with(CWD, &from, CWD, out, flags)
            .map_err(io::Error::from)
            .and_then(|()| File::open(parent(out))?.sync_all())
            .with_context(|| format!("cannot name {}", out.display()))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

/// Refuses an output path that is taken.
fn may_take(out: &Path, shape: Shape, replace: bool) -> Result<()> {
    let Ok(found) = out.symlink_metadata() else { return Ok(()) };
    if !replace {
        bail!("{} exists; give --force to replace it", out.display());
    }
    match shape {
        Shape::File if found.is_dir() => {
            bail!("{} is a folder; it is not replaced by a file", out.display())
        }
        Shape::Folder(_) if !found.is_dir() => {
            bail!("{} is not a folder; it is not replaced by one", out.display())
        }
        Shape::File => Ok(()),
        Shape::Folder(names) => only_has(out, names),
    }
}

/// Refuses to replace a folder in which there is something else, which would be lost.
fn only_has(folder: &Path, names: &[&str]) -> Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    for entry in entries {
        let name = entry.with_context(|| folder.display().to_string())?.file_name();
        if !names.iter().any(|ours| name == *ours) {
            let name = Path::new(&name).display();
            bail!("{} is not replaced: it also holds {name}", folder.display());
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

/// Removes the staging folders of processes that are no more. What fails is left to the next one.
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

/// Nothing more can be done if this fails; the name says what the folder is.
fn remove(folder: &Path) {
    let _ = std::fs::remove_dir_all(folder);
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn write(staging: &Staging, name: &str) {
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
    fn what_is_not_published_never_appears() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a");
        write(&Staging::new(&out, Shape::Folder(&["m"]), false).unwrap(), "m");
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
        drop(Staging::new(&folder.path().join("a"), Shape::File, false).unwrap());
        assert_eq!(names(folder.path()), [".a.2.tmp", ".a.x.tmp", ".b.1.tmp"]);
    }

    #[test]
    fn a_folder_is_replaced_only_when_nothing_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a");
        let shape = Shape::Folder(&["m"]);
        for _ in 0..2 {
            let staging = Staging::new(&out, shape, true).unwrap();
            write(&staging, "m");
            staging.publish().unwrap();
        }
        assert_eq!(names(folder.path()), ["a"]);
        assert!(Staging::new(&out, shape, false).is_err());
        assert!(Staging::new(&out, Shape::File, true).is_err());
        std::fs::write(out.join("mine"), b"").unwrap();
        let error = Staging::new(&out, shape, true).unwrap_err();
        assert!(error.to_string().contains("mine"), "{error}");
    }
}
