//! The snapshots in some folders by their ids, whatever the names of their files.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::header::Header;
use crate::layout::HEADER_BYTES;
use crate::parent::{ParentHint, open_file};
use crate::read_at::ReadAt;

/// The limit of files that are read, of all folders together. Of each, the first 4 KiB are read.
pub(crate) const MOST_FILES: usize = 4096;
/// The limit of names that are read of one folder.
const MOST_NAMES: usize = 64 * MOST_FILES;

/// What was found in the folders, which are not trusted: files with a correct header. The rest of a file may be
/// damaged.
pub(crate) struct Catalogue {
    snapshots: Vec<(PathBuf, Header)>,
    /// Whether there are files that were not read.
    pub(crate) more: bool,
}

impl Catalogue {
    /// Reads the headers of the regular files of the folders, not of folders in them: in the order of the folders,
    /// files called `.snap` before others, otherwise by name. Unreadable files are skipped.
    pub(crate) fn read(folders: &[PathBuf]) -> Self {
        let mut catalogue = Self { snapshots: Vec::new(), more: false };
        let mut left = MOST_FILES;
        for folder in folders {
            let (names, more) = first_names(folder, left);
            catalogue.more |= more;
            left -= names.len();
            let snapshots = names.into_iter().filter_map(|name| {
                let path = folder.join(name);
                let header = header_of(&path)?;
                Some((path, header))
            });
            catalogue.snapshots.extend(snapshots);
        }
        catalogue
    }

    /// The files whose headers are those of the parent.
    pub(crate) fn find(&self, hint: &ParentHint) -> impl Iterator<Item = &Path> {
        let fits = |header: &Header| hint.check(header).is_ok();
        self.snapshots.iter().filter(move |(_, header)| fits(header)).map(|(path, _)| &**path)
    }
}

/// The first `most` names in the order in which the files are read, and whether there are more.
fn first_names(folder: &Path, most: usize) -> (Vec<OsString>, bool) {
    let mut more = false;
    // The last one is on top: it is removed when there are too many.
    let mut first = BinaryHeap::new();
    let entries = folder.read_dir().into_iter().flatten().flatten();
    for (count, entry) in entries.enumerate() {
        if count == MOST_NAMES {
            more = true;
            break;
        }
        // An entry that is neither a file nor a link need not be counted.
        if entry.file_type().is_ok_and(|kind| !kind.is_file() && !kind.is_symlink()) {
            continue;
        }
        let name = entry.file_name();
        let of_snapshot = Path::new(&name).extension().is_some_and(|extension| extension == "snap");
        first.push((Reverse(of_snapshot), name));
        if first.len() > most {
            first.pop();
            more = true;
        }
    }
    (first.into_sorted_vec().into_iter().map(|(_, name)| name).collect(), more)
}

/// The header of a snapshot, if the file is a regular one and begins with a good header.
fn header_of(path: &Path) -> Option<Header> {
    // Not even opened: a device may do something then.
    if !path.metadata().is_ok_and(|found| found.is_file() && found.len() >= HEADER_BYTES as u64) {
        return None;
    }
    let file = open_file(path).ok()?;
    let mut bytes = [0; HEADER_BYTES];
    ReadAt::read_exact_at(&file, &mut bytes, 0).ok()?;
    Header::decode(&bytes, file.len_bytes().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_in_a_stable_order_and_their_number_is_limited() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b", "c.snap", "a.txt", "d.snap", "A", ".hidden.snap"] {
            std::fs::write(folder.path().join(name), b"").unwrap();
        }
        std::fs::create_dir(folder.path().join("0.snap")).unwrap();
        // A hidden `.snap` alone has no extension; this one has.
        let order = [".hidden.snap", "c.snap", "d.snap", "A", "a.txt", "b"];
        assert_eq!(first_names(folder.path(), 6), (order.map(OsString::from).to_vec(), false));
        let (names, more) = first_names(folder.path(), 4);
        assert_eq!((&names[..], more), (&order.map(OsString::from)[..4], true));
        assert_eq!(first_names(folder.path(), 0), (Vec::new(), true));
        assert_eq!(first_names(Path::new("/nonexistent"), 9), (Vec::new(), false));
    }
}
