//! A file that appears whole at its path or not at all.
//!
//! The bytes go into a file without a name (`O_TMPFILE`) in the directory of the output, so that
//! even SIGKILL leaves nothing behind. When all is written and synced it gets its name. Where the
//! file system has no nameless files, or an existing output is to be replaced, a name of the form
//! `.OUT.PID.tmp` is used for the moment before the rename.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags, RenameFlags};

use crate::error::WriteError;
use crate::writeback::Writeback;

/// Whether an existing output may be replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Existing {
    /// Keep it and fail.
    #[default]
    Keep,
    /// Replace it, in one step, once the new file is complete.
    Replace,
}

/// An output that has not appeared yet. Dropped without [`Output::publish`], it never does.
#[derive(Debug)]
pub struct Output {
    file: File,
    path: PathBuf,
    /// The name that the file has now, if it has one.
    temporary: Option<PathBuf>,
    existing: Existing,
    writeback: Option<Writeback>,
}

impl Output {
    /// Begins an output that will be at `path`. Only its owner will be able to read it.
    ///
    /// # Errors
    /// [`WriteError::Exists`], [`WriteError::NotAFile`]; [`WriteError::Output`] where no file can be made.
    pub fn create(path: &Path, existing: Existing) -> Result<Self, WriteError> {
        if let Ok(there) = path.symlink_metadata() {
            let path = path.to_owned();
            match existing {
                Existing::Keep => return Err(WriteError::Exists { path }),
                Existing::Replace if !there.is_file() => {
                    return Err(WriteError::NotAFile { path });
                }
                Existing::Replace => {}
            }
        }
        let failed = |source| output_error("create", path, source);
        let directory = directory_of(path);
        remove_stale(path, directory);
        let mut options = OpenOptions::new();
        // Guest memory contains secrets: only the owner may read the file.
        options.read(true).write(true).mode(0o600);
        // Without /proc, as in a chroot, a file without a name could not get one later.
        let nameless = match Path::new(OWN_FILES).exists() {
            true => options.clone().custom_flags(OFlags::TMPFILE.bits() as i32).open(directory),
            false => Err(io::ErrorKind::Unsupported.into()),
        };
        let (file, temporary) = match nameless {
            Ok(file) => (file, None),
            Err(error) if no_nameless_files(&error) => {
                let temporary = temporary_name(path).map_err(failed)?;
                let file = options.create_new(true).open(&temporary).map_err(failed)?;
                (file, Some(temporary))
            }
            Err(error) => return Err(failed(error)),
        };
        // The lock shows a later writer whether this one was killed or still runs. Where files cannot be
        // locked, a file that a killed writer has left is kept.
        let _ = file.try_lock();
        let mut output = Self { file, path: path.to_owned(), temporary, existing, writeback: None };
        output.writeback = Some(Writeback::start(&output.file).map_err(failed)?);
        Ok(output)
    }

    /// Writes all of `bytes` at `offset`. Offsets should ascend: what is behind them is handed to the disk.
    ///
    /// # Errors
    /// [`WriteError::Output`]
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<(), WriteError> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|source| output_error("write", &self.path, source))?;
        if let Some(writeback) = &mut self.writeback {
            writeback.reached(offset + bytes.len() as u64);
        }
        Ok(())
    }

    /// Lets the kernel copy bytes of another file to `offset`: where the file system can, both files then share them. Returns
    /// how many it has copied; 0 means that they have to be read and written, which also tells the reason.
    pub(crate) fn copy_from(&mut self, from: &File, bytes: Range<u64>, offset: u64) -> u64 {
        let len = (bytes.end - bytes.start) as usize;
        let (mut at, mut to) = (bytes.start, offset);
        let copied =
            rustix::fs::copy_file_range(from, Some(&mut at), &self.file, Some(&mut to), len);
        let copied = copied.unwrap_or(0) as u64;
        if let Some(writeback) = &mut self.writeback {
            writeback.reached(offset + copied);
        }
        copied
    }

    /// The file, which has no name yet: to check what was written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the bytes durable, gives the file its name, makes the name durable.
    ///
    /// # Errors
    /// [`WriteError::Exists`] if the name was taken meanwhile, otherwise [`WriteError::Output`].
    pub fn publish(mut self) -> Result<(), WriteError> {
        let written = self.writeback.take().map_or(Ok(()), Writeback::finish);
        written
            .and_then(|()| self.file.sync_all())
            .map_err(|source| output_error("sync", &self.path, source))?;
        match self.place() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(WriteError::Exists { path: self.path.clone() });
            }
            Err(error) => return Err(output_error("name", &self.path, error)),
        }
        self.temporary = None;
        File::open(directory_of(&self.path))
            .and_then(|directory| directory.sync_all())
            .map_err(|source| output_error("sync the directory of", &self.path, source))
    }

    fn place(&mut self) -> io::Result<()> {
        match (&self.temporary, self.existing) {
            (None, Existing::Keep) => link(&self.file, &self.path),
            (None, Existing::Replace) => {
                let temporary = temporary_name(&self.path)?;
                link(&self.file, &temporary)?;
                std::fs::rename(self.temporary.insert(temporary), &self.path)
            }
            (Some(temporary), Existing::Replace) => std::fs::rename(temporary, &self.path),
            (Some(temporary), Existing::Keep) => {
                let flags = RenameFlags::NOREPLACE;
                Ok(rustix::fs::renameat_with(CWD, temporary, CWD, &self.path, flags)?)
            }
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // If this fails too, nothing more can be done. The name shows what the file is.
            let _ = std::fs::remove_file(temporary);
        }
    }
}

fn output_error(operation: &'static str, path: &Path, source: io::Error) -> WriteError {
    WriteError::Output { operation, path: path.to_owned(), source }
}

/// Gives a nameless file a name, the way open(2) describes for `O_TMPFILE`. Fails if it is taken.
fn link(file: &File, path: &Path) -> io::Result<()> {
    let nameless = format!("{OWN_FILES}/{}", file.as_raw_fd());
    Ok(rustix::fs::linkat(CWD, nameless, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

/// The folder with the open files of this process.
const OWN_FILES: &str = "/proc/self/fd";

fn no_nameless_files(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    error.kind() == io::ErrorKind::Unsupported || matches!(errno, Some(Errno::ISDIR | Errno::INVAL))
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Removes the temporary files of earlier writers of `path` that were killed between naming and
/// renaming: those that are not locked.
fn remove_stale(path: &Path, directory: &Path) {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return };
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let temporary = entry.file_name();
        let process = temporary
            .to_str()
            .and_then(|temporary| temporary.strip_prefix('.')?.strip_prefix(name))
            .and_then(|rest| rest.strip_prefix('.')?.strip_suffix(".tmp")?.parse::<u32>().ok());
        if process.is_none() {
            continue;
        }
        let abandoned = File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        if abandoned {
            // Another writer may have removed it first.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn temporary_name(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.tmp", std::process::id()));
    Ok(path.with_file_name(temporary))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn nothing_is_visible_until_it_is_published() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        let mut output = Output::create(&path, Existing::Keep).unwrap();
        output.write_at(b"whole", 0).unwrap();
        assert!(names(directory.path()).is_empty());
        output.publish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(directory.path()), ["out"]);
    }

    #[test]
    fn a_dropped_output_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        drop(Output::create(&path, Existing::Replace).unwrap());
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn an_existing_file_is_kept_even_if_it_appears_late() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        let output = Output::create(&path, Existing::Keep).unwrap();
        std::fs::write(&path, b"old").unwrap();
        assert!(matches!(output.publish(), Err(WriteError::Exists { .. })));
        assert!(matches!(Output::create(&path, Existing::Keep), Err(WriteError::Exists { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn an_existing_file_is_replaced_in_one_step_on_request() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        std::fs::write(&path, b"old").unwrap();
        let mut output = Output::create(&path, Existing::Replace).unwrap();
        output.write_at(b"new", 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        output.publish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(names(directory.path()), ["out"]);
    }

    #[test]
    fn only_files_of_a_killed_writer_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        for name in [".out.1.tmp", ".out.2.tmp", ".out.x.tmp", ".outer.1.tmp"] {
            std::fs::write(directory.path().join(name), b"").unwrap();
        }
        let living = File::open(directory.path().join(".out.2.tmp")).unwrap();
        living.lock().unwrap();
        drop(Output::create(&path, Existing::Keep).unwrap());
        let mut left = names(directory.path());
        left.sort();
        assert_eq!(left, [".out.2.tmp", ".out.x.tmp", ".outer.1.tmp"]);
    }

    #[test]
    fn only_a_regular_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/nonexistent", &link).unwrap();
        for path in [Path::new("/dev/null"), directory.path(), &link] {
            let refused = Output::create(path, Existing::Replace);
            assert!(matches!(refused, Err(WriteError::NotAFile { .. })), "{path:?}");
        }
    }

    #[test]
    fn a_missing_directory_is_named() {
        let path = Path::new("/nonexistent/out");
        let error = Output::create(path, Existing::Keep).unwrap_err();
        assert_eq!(error.to_string(), "cannot create /nonexistent/out");
    }
}
