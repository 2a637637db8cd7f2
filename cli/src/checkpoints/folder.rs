//! The files of a folder of checkpoints, for the one process that writes to it.

use std::collections::HashSet;
use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{Name, names};
use crate::input;
use crate::keys::KeyArgs;

/// A folder of checkpoints. No other process writes to it as long as this exists.
pub(crate) struct Folder {
    path: PathBuf,
    keys: KeyArgs,
    _lock: File,
    files: Vec<Known>,
    last_number: u64,
    /// The ids of the snapshot that the guest was restored from, and of its parents. They may be files of this folder.
    /// The guest's process has them open, and begins its next chain on them.
    of_guest: HashSet<String>,
}

/// A file that opens with all of its parents.
struct Known {
    name: Name,
    id: String,
    /// The ids of its parents.
    parents: Vec<String>,
}

impl Folder {
    /// Opens the folder, or creates it for this user only.
    pub(crate) fn open(path: &Path, keys: &KeyArgs) -> Result<Folder> {
        let failed = || format!("cannot use the folder {}", path.display());
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            created => created.with_context(failed)?,
        }
        let lock = File::open(path).with_context(failed)?;
        match lock.try_lock() {
            Err(std::fs::TryLockError::WouldBlock) => {
                bail!("another snap checkpoint writes to {}", path.display());
            }
            locked => locked.with_context(failed)?,
        }
        let names = names(path)?;
        let last_number = names.last().map_or(0, |name| name.number);
        let mut folder = Folder {
            path: path.to_owned(),
            keys: keys.clone(),
            _lock: lock,
            files: Vec::new(),
            last_number,
            of_guest: HashSet::new(),
        };
        for name in names {
            // One that is not whole is not counted, and is left alone.
            let _ = folder.add(name);
        }
        Ok(folder)
    }

    /// Where the file of this name is.
    pub(crate) fn at(&self, name: Name) -> PathBuf {
        self.path.join(name.file_name())
    }

    /// The name of the next checkpoint.
    pub(crate) fn next(&self) -> Result<Name> {
        match self.last_number.checked_add(1).filter(|number| *number <= Name::MOST) {
            Some(number) => Ok(Name { number, is_merged: false }),
            None => bail!("{} has a checkpoint of the highest number", self.path.display()),
        }
    }

    /// Notes a new file, after it has appeared.
    pub(crate) fn add(&mut self, name: Name) -> Result<()> {
        let path = self.at(name);
        let snapshot = input::open(&path, &self.keys.clone().into())?;
        let mut ids = snapshot.headers().map(|header| header.id.to_string());
        let Some(id) = ids.next() else { bail!("{} has no header", path.display()) };
        self.files.push(Known { name, id, parents: ids.collect() });
        self.last_number = self.last_number.max(name.number);
        Ok(())
    }

    /// The id of a file.
    pub(crate) fn id(&self, name: Name) -> Option<&str> {
        self.known(name).map(|file| file.id.as_str())
    }

    /// How many parents a file has.
    pub(crate) fn depth(&self, name: Name) -> usize {
        self.known(name).map_or(0, |file| file.parents.len())
    }

    /// The first checkpoint of a chain is on the snapshot that the guest was restored from: its parents are not removed.
    pub(crate) fn begin_chain(&mut self, first: Name) {
        let parents = self.known(first).map(|file| file.parents.iter().cloned().collect());
        self.of_guest = parents.unwrap_or_default();
    }

    fn known(&self, name: Name) -> Option<&Known> {
        self.files.iter().find(|file| file.name == name)
    }

    /// Removes the files that neither the newest `keep` checkpoints need, nor the one at `parent`, which is the parent of
    /// the next one, nor the guest. Returns their names.
    pub(crate) fn prune(&mut self, keep: usize, parent: Option<Name>) -> Result<Vec<String>> {
        self.files.sort_unstable_by_key(|file| file.name);
        let checkpoints = self.files.iter().filter(|file| !file.name.is_merged);
        let kept = checkpoints.rev().take(keep);
        let parent = self.files.iter().filter(|file| Some(file.name) == parent);
        let needed: HashSet<&String> = kept
            .chain(parent)
            .flat_map(|file| file.parents.iter().chain(std::iter::once(&file.id)))
            .chain(&self.of_guest)
            .collect();
        // Layers before their parents: whatever ends this process, a file that is there is whole.
        let unneeded: Vec<Name> = self
            .files
            .iter()
            .rev()
            .filter(|file| !needed.contains(&file.id))
            .map(|file| file.name)
            .collect();
        let mut removed = Vec::new();
        for name in unneeded {
            let path = self.at(name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                result => result.with_context(|| format!("cannot remove {}", path.display()))?,
            }
            self.files.retain(|file| file.name != name);
            removed.push(name.file_name());
        }
        Ok(removed)
    }
}
