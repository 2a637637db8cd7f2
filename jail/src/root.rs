//! Another root folder for all threads of a process.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_remount, unmount,
};
use rustix::process::{chdir, chroot, pivot_root};

use crate::SetupError;
use crate::files::{Files, Named, link_to};

/// Where the new root is mounted before it becomes the root. Every host has this folder, and what was needed in it is open.
const PLACE: &str = "/dev";

/// The root folder that a process gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// It stays as it is.
    Host,
    /// This folder. Other mounts stay, and a process with CAP_SYS_CHROOT could return to them.
    Folder(PathBuf),
    /// This folder, and nothing else is mounted. It needs [`crate::separate`].
    FolderOnly(PathBuf),
    /// A new folder in memory that has only the files that the process may still name, at their paths. It needs
    /// [`crate::separate`], before the files are named.
    Empty,
}

impl Root {
    /// Changes the root of all threads. The thread must not be jailed yet.
    ///
    /// # Errors
    /// The kernel refuses it, or the folder cannot be used.
    pub fn enter(&self, files: &Files) -> Result<(), SetupError> {
        match self {
            Self::Host => Ok(()),
            Self::Folder(folder) => {
                let change = || chroot(folder).and_then(|()| chdir("/"));
                let what = format!("change the root to {}", folder.display());
                change().map_err(SetupError::of(what))
            }
            Self::FolderOnly(folder) => {
                let what = format!("mount {} as the root", folder.display());
                mount_bind_recursive(folder, PLACE).map_err(SetupError::of(what))?;
                exchange(Path::new("/"))
            }
            Self::Empty => {
                // Relative paths stay valid as far as they lead to what is left.
                let current = std::env::current_dir().unwrap_or_else(|_| "/".into());
                make_empty(files, &current).map_err(SetupError::of("make an empty root"))?;
                exchange(&current)
            }
        }
    }
}

/// Mounts a folder in memory with these files.
fn make_empty(files: &Files, current: &Path) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("snap", PLACE, "tmpfs", flags, c"mode=755,size=1m")?;
    make_folder(&inside(current))?;
    let mut named: Vec<&Named> =
        files.named().iter().filter(|named| named.path.is_absolute()).collect();
    // A folder before what is in it.
    named.sort_by(|one, other| one.path.cmp(&other.path));
    let mut mounted: Option<&Path> = None;
    for Named { at, path, .. } in named {
        if mounted.is_some_and(|folder| path.starts_with(folder)) {
            continue;
        }
        let target = inside(path);
        let found = fs::metadata(link_to(at))?;
        if found.is_dir() {
            make_folder(&target)?;
        } else {
            make_folder(target.parent().unwrap_or(Path::new(PLACE)))?;
            // Never a file of the host, if one were there.
            fs::OpenOptions::new().write(true).create_new(true).open(&target)?;
        }
        match path.as_path() == Path::new("/proc") {
            // What is mounted below it hides files of the host, and in a user namespace the kernel refuses to show them.
            true => mount_bind_recursive(link_to(at), &target)?,
            false => mount_bind(link_to(at), &target)?,
        }
        mounted = Some(path);
    }
    Ok(mount_remount(PLACE, flags | MountFlags::RDONLY, c"")?)
}

/// Makes a folder and those that lead to it, unless they are there. Whatever the umask is, every user can enter them: the
/// process may get another user, and what is in them is mounted, with its own mode.
fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        make_folder(parent)?;
    }
    fs::create_dir(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
}

/// The place of a path before the root changes.
fn inside(path: &Path) -> PathBuf {
    Path::new(PLACE).join(path.strip_prefix("/").unwrap_or(path))
}

/// Makes the mount at [`PLACE`] the root, and unmounts all others.
fn exchange(current: &Path) -> Result<(), SetupError> {
    let exchange = || {
        chdir(PLACE)?;
        // The old root is then on top of the new one.
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        chdir(current)
    };
    exchange().map_err(SetupError::of("exchange the root (pivot_root)"))
}
