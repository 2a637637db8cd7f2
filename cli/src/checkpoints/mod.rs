//! A folder of checkpoints: `000007.snap` is the seventh one. `000007.merged.snap` has the same content in another form:
//! the layers below it are merged into it, so that the chain of later ones stays short.

mod folder;
mod merge;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use snapfmt::{Parents, ReadError, Snapshot};

use crate::keys::KeyArgs;
use crate::snap_path;
use crate::stderr::say;
pub(crate) use folder::Folder;
pub(crate) use merge::{Merged, Merging, merge_onto};

/// A file of such a folder, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name {
    /// From 1.
    pub(crate) number: u64,
    pub(crate) is_merged: bool,
}

impl Name {
    /// The highest number. A file with a higher one is not counted.
    pub(crate) const MOST: u64 = 999_999_999_999_999;

    pub(crate) fn of(path: &Path) -> Option<Name> {
        let name = path.file_name()?.to_str()?.strip_suffix(".snap")?;
        let (digits, is_merged) = match name.strip_suffix(".merged") {
            Some(digits) => (digits, true),
            None => (name, false),
        };
        let is_number = digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_digit());
        let number =
            digits.parse().ok().filter(|number| is_number && (1..=Self::MOST).contains(number))?;
        let found = Name { number, is_merged };
        // Not with more zeros than it needs.
        (*found.file_name() == *path.file_name()?).then_some(found)
    }

    pub(crate) fn file_name(self) -> String {
        let kind = if self.is_merged { ".merged" } else { "" };
        format!("{:06}{kind}.snap", self.number)
    }
}

/// The files of a folder that have the name of a checkpoint, ascending.
fn names(folder: &Path) -> Result<Vec<Name>> {
    let failed = || format!("cannot read the folder {}", folder.display());
    let mut names = Vec::new();
    for entry in folder.read_dir().with_context(failed)? {
        names.extend(Name::of(&entry.with_context(failed)?.path()));
    }
    names.sort_unstable();
    Ok(names)
}

/// The file that is meant by `DIR`, its newest whole checkpoint, or by `DIR@K`, its checkpoint K. `None` if `path` is
/// neither.
pub(crate) fn resolve(path: &Path, keys: &KeyArgs) -> Result<Option<PathBuf>> {
    if path.is_dir() {
        return newest(path, keys);
    }
    let text = path.to_str().filter(|_| path.symlink_metadata().is_err());
    let Some((folder, number)) = text.and_then(|text| text.rsplit_once('@')) else {
        return Ok(None);
    };
    let (folder, Ok(number)) = (Path::new(folder), number.parse()) else { return Ok(None) };
    if !folder.is_dir() {
        return Ok(None);
    }
    let names = names(folder)?;
    let numbers: Vec<u64> =
        names.iter().filter(|name| !name.is_merged).map(|name| name.number).collect();
    match (numbers.contains(&number), numbers.first(), numbers.last()) {
        (true, ..) => Ok(Some(folder.join(Name { number, is_merged: false }.file_name()))),
        (false, Some(first), Some(last)) => {
            bail!("{} has no checkpoint {number}: it has {first} to {last}", folder.display())
        }
        _ => bail!("{} has no checkpoints", folder.display()),
    }
}

/// The newest checkpoint that opens with all of its parents.
fn newest(folder: &Path, keys: &KeyArgs) -> Result<Option<PathBuf>> {
    let keys = keys.provider()?;
    let parents = Parents { files: Vec::new(), folders: snap_path::folders(), keys };
    let mut first_error = None;
    for name in names(folder)?.into_iter().rev().filter(|name| !name.is_merged) {
        let path = folder.join(name.file_name());
        match Snapshot::open_with(&path, &parents) {
            Ok(_) => {
                if let Some(error) = &first_error {
                    say(&format!("snap: {} is used instead: {error:#}\n", path.display()));
                }
                return Ok(Some(path));
            }
            Err(error) => {
                let error = anyhow::Error::new(error).context(path.display().to_string());
                first_error.get_or_insert(error);
            }
        }
    }
    first_error.map_or(Ok(None), Err)
}

/// The ids of the snapshots whose content this one has: its own, and that of the one that it was merged from.
pub(crate) fn contents_of(snapshot: &Snapshot) -> Result<Vec<String>, ReadError> {
    let metadata = snapshot.metadata()?;
    let from = metadata.other.get("rewritten_from").and_then(|ids| ids.get(0)?.as_str());
    let own = snapshot.header().id.to_string();
    Ok(std::iter::once(own).chain(from.map(str::to_owned)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_and_what_is_none() {
        for (number, is_merged, text) in [
            (7, false, "000007.snap"),
            (16, true, "000016.merged.snap"),
            (1_234_567, false, "1234567.snap"),
            (Name::MOST, false, "999999999999999.snap"),
        ] {
            let name = Name { number, is_merged };
            assert_eq!(name.file_name(), text);
            assert_eq!(Name::of(&Path::new("folder").join(text)), Some(name));
        }
        for other in [
            "7.snap",
            "0000007.snap",
            "000000.snap",
            "000007.snap.tmp",
            "000007",
            "1000000000000000.snap",
            "18446744073709551615.snap",
            "+00007.snap",
            "a.snap",
            ".000007.snap",
        ] {
            assert_eq!(Name::of(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn what_is_no_folder_of_checkpoints_is_left_alone() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| PathBuf::from(format!("{}{name}", folder.path().display()));
        assert_eq!(resolve(folder.path(), &KeyArgs::default()).expect("it is readable"), None);
        assert_eq!(resolve(&at("/a@b.snap"), &KeyArgs::default()).expect("no folder"), None);
        assert!(
            resolve(&at("@3"), &KeyArgs::default())
                .expect_err("it is empty")
                .to_string()
                .contains("no checkpoints")
        );
        std::fs::write(at("/000002.snap"), "").expect("it is written");
        assert_eq!(
            resolve(&at("@2"), &KeyArgs::default()).expect("it is there"),
            Some(at("/000002.snap"))
        );
        let error = resolve(&at("@3"), &KeyArgs::default()).expect_err("there is one").to_string();
        assert!(error.ends_with("has no checkpoint 3: it has 2 to 2"), "{error}");
        resolve(folder.path(), &KeyArgs::default()).expect_err("none is whole");
    }
}
