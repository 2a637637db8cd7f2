//! The folders in which a path that a snapshot stores may be used. A snapshot may name any path of the host: without a
//! limit, an untrusted file would choose what is opened, and what its guest writes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Folders, with everything below them.
#[derive(Clone, Debug, Default)]
pub struct AllowedFolders {
    /// Each absolute, as it was given and without symbolic links.
    folders: Vec<PathBuf>,
}

impl AllowedFolders {
    /// These folders. One that does not exist, or cannot be examined, allows nothing.
    pub fn new(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        let both = |folder: PathBuf| [std::path::absolute(&folder), folder.canonicalize()];
        let mut folders: Vec<PathBuf> = folders.into_iter().flat_map(both).flatten().collect();
        folders.dedup();
        Self { folders }
    }

    /// Opens a file below one of the folders. Symbolic links on the way must stay below it, and `..` too
    /// (openat2(2), RESOLVE_BENEATH).
    ///
    /// # Errors
    /// [`io::ErrorKind::PermissionDenied`] without a system's number when the path is below none of them, otherwise
    /// those of open(2).
    pub(super) fn open(&self, path: &Path, flags: OFlags) -> io::Result<File> {
        for (folder, below) in self.above(path) {
            let directory = rustix::fs::open(
                folder,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            // RESOLVE_BENEATH refuses every absolute link, also where none can lead out.
            let beneath = match folder == Path::new("/") {
                true => ResolveFlags::NO_MAGICLINKS,
                false => ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
            };
            let flags = flags | OFlags::CLOEXEC;
            match rustix::fs::openat2(&directory, below, flags, Mode::empty(), beneath) {
                Ok(file) => return Ok(file.into()),
                // It leads out of this folder.
                Err(Errno::XDEV | Errno::LOOP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::new(io::ErrorKind::PermissionDenied, OUTSIDE))
    }

    /// Whether a name in this path's folder would be below one of the folders. For names that are created: the folder
    /// that contains it must exist.
    #[must_use]
    pub fn allow_name(&self, path: &Path) -> bool {
        let name = std::path::absolute(path).ok();
        let parent = name.as_deref().and_then(Path::parent).and_then(|at| at.canonicalize().ok());
        parent.is_some_and(|parent| self.folders.iter().any(|folder| parent.starts_with(folder)))
    }

    /// Whether a device of the host that has no path of its own is below one of the folders.
    #[must_use]
    pub fn allow_device(&self, device: &Path) -> bool {
        self.above(device).next().is_some()
    }

    /// The folders above a path, and the path from there.
    fn above<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = (&'a Path, &'a Path)> {
        let folders = self.folders.iter().map(PathBuf::as_path);
        folders.filter_map(|folder| Some((folder, path.strip_prefix(folder).ok()?)))
    }
}

const OUTSIDE: &str = "the path is in none of the folders that are allowed for paths in a snapshot";

/// Whether a path was refused because of its folder.
pub(super) fn is_outside(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied && error.raw_os_error().is_none()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn opens(allowed: &AllowedFolders, path: &Path) -> bool {
        match allowed.open(path, OFlags::RDONLY) {
            Ok(_) => true,
            Err(error) => {
                assert!(is_outside(&error), "{}: {error}", path.display());
                false
            }
        }
    }

    #[test]
    fn only_files_below_the_folders_are_opened() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        for folder in ["in", "in/deep", "out"] {
            std::fs::create_dir(at(folder)).unwrap();
            std::fs::write(at(folder).join("disk"), folder).unwrap();
        }
        symlink("../out/disk", at("in/relative")).unwrap();
        symlink(at("out/disk"), at("in/absolute")).unwrap();
        symlink("../out", at("in/folder")).unwrap();
        symlink("deep/disk", at("in/stays")).unwrap();
        symlink("in", at("moved")).unwrap();
        symlink("/proc/self/fd", at("in/magic")).unwrap();
        let allowed = AllowedFolders::new([at("in"), at("none")]);
        for good in ["in/disk", "in/deep/disk", "in/stays", "in/deep/../disk"] {
            assert!(opens(&allowed, &at(good)), "{good}");
        }
        for bad in [
            "out/disk",
            "in/relative",
            "in/absolute",
            "in/folder/disk",
            "in/magic/0",
            "in/../out/disk",
        ] {
            assert!(!opens(&allowed, &at(bad)), "{bad}");
        }
        assert!(!opens(&allowed, Path::new("in/disk")), "a relative path is from nowhere");
        assert!(!opens(&AllowedFolders::default(), &at("in/disk")));
        // A folder that is reached by a link is allowed under both names.
        let moved = AllowedFolders::new([at("moved")]);
        assert!(opens(&moved, &at("moved/disk")) && opens(&moved, &at("in/disk")));
        assert!(!opens(&moved, &at("out/disk")));
        let everything = AllowedFolders::new([PathBuf::from("/")]);
        assert!(opens(&everything, &at("in/absolute")) && opens(&everything, &at("out/disk")));
    }

    #[test]
    fn names_are_created_in_these_folders_only() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        std::fs::create_dir(at("in")).unwrap();
        symlink("..", at("in/up")).unwrap();
        let allowed = AllowedFolders::new([at("in")]);
        assert!(allowed.allow_name(&at("in/socket")));
        for bad in ["socket", "in/up/socket", "in/../socket", "in/none/socket"] {
            assert!(!allowed.allow_name(&at(bad)), "{bad}");
        }
        assert!(!allowed.allow_device(Path::new("/dev/net/tun")));
        assert!(AllowedFolders::new(["/dev/net".into()]).allow_device(Path::new("/dev/net/tun")));
    }
}
