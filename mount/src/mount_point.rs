//! Attaches a FUSE connection to a folder, and detaches it.
//!
//! Not by fuser: when its session ends it unmounts whatever is at the path then, which may be the mount of another server.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{getegid, geteuid};

use crate::error::MountError;

const FUSE: &str = "/dev/fuse";
/// The program that mounts and unmounts for users without privileges. It belongs to libfuse, and is set-user-id root.
const FUSERMOUNT: &str = "fusermount3";

/// A folder with a mount of this process on it. Dropping it detaches the mount.
pub(crate) struct MountPoint {
    folder: PathBuf,
    /// Major and minor number of the mounted file system, which no other has as long as it exists.
    device: (u32, u32),
    /// It was unmounted by another process.
    gone: bool,
}

impl MountPoint {
    /// Mounts on an empty folder; returns the connection, too.
    pub(crate) fn attach(folder: &Path, allow_other: bool) -> Result<(Self, OwnedFd), MountError> {
        let folder = usable(folder)?;
        // fusermount3 opens it as this user, too.
        let fuse = OpenOptions::new().read(true).write(true).open(FUSE);
        let fuse = fuse.map_err(MountError::NoFuse)?.into();
        let connection = match attach_directly(&folder, fuse, allow_other) {
            Err(Errno::PERM) => attach_by_fusermount(&folder, allow_other),
            attached => attached.map_err(io::Error::from),
        };
        let connection =
            connection.map_err(|error| MountError::Mount { folder: folder.clone(), error })?;
        let device = device(&folder)
            .map_err(|errno| MountError::Folder { folder: folder.clone(), error: errno.into() })?;
        Ok((Self { folder, device, gone: false }, connection))
    }

    /// Its absolute path.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// It was unmounted by another process, and the folder may have another mount now.
    pub(crate) fn forget(&mut self) {
        self.gone = true;
    }

    /// Removes the mount from the folder. Files that are open or mapped stay usable.
    pub(crate) fn detach(&self) -> Result<(), MountError> {
        // It may have been unmounted before, and another file system may be there now.
        if self.gone || device(&self.folder).ok() != Some(self.device) {
            return Ok(());
        }
        let failed = |error| MountError::Unmount { folder: self.folder.clone(), error };
        match unmount(&self.folder, UnmountFlags::DETACH) {
            Ok(()) => Ok(()),
            Err(Errno::PERM) => {
                let output = fusermount(&["-u", "-z"], &self.folder).output().map_err(failed)?;
                if output.status.success() { Ok(()) } else { Err(failed(message(&output))) }
            }
            Err(errno) => Err(failed(errno.into())),
        }
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        // Where an error can be reported, `detach` was called before.
        let _ = self.detach();
    }
}

/// The absolute path of a folder that can be mounted on.
fn usable(folder: &Path) -> Result<PathBuf, MountError> {
    let look = || {
        if !fs::metadata(folder)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        if fs::read_dir(folder)?.next().is_some() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        folder.canonicalize()
    };
    look().map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::NOTCONN) => MountError::Dead { folder: folder.to_owned() },
        _ => MountError::Folder { folder: folder.to_owned(), error },
    })
}

/// Of the file system at a path. It does not ask the server, which may not answer yet, or any more.
fn device(folder: &Path) -> Result<(u32, u32), Errno> {
    let stat = statx(CWD, folder, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor))
}

/// Mounts with the privilege of this process.
fn attach_directly(folder: &Path, fuse: OwnedFd, allow_other: bool) -> Result<OwnedFd, Errno> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    let mut options =
        format!("fd={},rootmode=40000,user_id={user},group_id={group}", fuse.as_raw_fd());
    if allow_other {
        options.push_str(",allow_other");
    }
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    mount("snap", folder, "fuse.snap", flags, options.as_c_str())?;
    Ok(fuse)
}

/// fusermount3 mounts, and sends the connection to the socket that `_FUSE_COMMFD` names: its stdin.
fn attach_by_fusermount(folder: &Path, allow_other: bool) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut options = "ro,nosuid,nodev,noatime,fsname=snap,subtype=snap".to_owned();
    if allow_other {
        options.push_str(",allow_other");
    }
    let mut command = fusermount(&["-o", &options], folder);
    command.env("_FUSE_COMMFD", "0").stdin(OwnedFd::from(theirs));
    let output = command.output().map_err(|error| match error.kind() {
        // The program does not exist.
        io::ErrorKind::NotFound => Errno::PERM.into(),
        _ => error,
    })?;
    if !output.status.success() {
        return Err(message(&output));
    }
    // If it has sent nothing, this is the end of the stream.
    drop(command);
    received(&ours)
}

fn fusermount(arguments: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(FUSERMOUNT);
    command.args(arguments).arg("--").arg(folder);
    command.stdin(Stdio::null());
    command
}

/// What fusermount3 has printed.
fn message(output: &Output) -> io::Error {
    io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// The descriptor in a message.
fn received(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.ok_or_else(|| io::Error::other("fusermount3 has sent no descriptor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_empty_folder_is_mounted_on() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |path: &Path| match usable(path).unwrap_err() {
            MountError::Folder { error, .. } => error.kind(),
            error => panic!("{error}"),
        };
        assert_eq!(usable(folder.path()).unwrap(), folder.path().canonicalize().unwrap());
        let file = folder.path().join("file");
        assert_eq!(kind(&file), io::ErrorKind::NotFound);
        fs::File::create(&file).unwrap();
        assert_eq!(kind(&file), io::ErrorKind::NotADirectory);
        assert_eq!(kind(folder.path()), io::ErrorKind::DirectoryNotEmpty);
    }
}
