//! A cache on disk that all processes of a user share: a folder with one file for each object.
//!
//! Nothing is synced: chunks and index have checksums, and a block that fails its checksum is fetched once more.

mod entry;
mod lock;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::error::ObjectError;
use crate::fetch::Identity;
use crate::store::Store;
use crate::url::ObjectUrl;

pub(crate) use entry::{BLOCK_BYTES, Claim, Entry};

/// The most that the cache takes on disk, unless another limit is given.
pub const DEFAULT_CACHE_BYTES: u64 = 10 << 30;

/// A process checks the size of the cache again after it has stored this many bytes.
const LOOK_EVERY_BYTES: u64 = 32 << 20;

const SUFFIX: &str = ".blocks";
/// An empty file. A byte of it is locked while the ends of an object are fetched: see [`Cache::turn`].
const TURNS: &str = "turns";

/// The folder of the cache, and its limit.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    limit_bytes: u64,
    stored_bytes: AtomicU64,
}

/// The turn to fetch the ends of an object. It ends when it is dropped, and when the process is killed.
pub(crate) struct Turn(
    #[expect(dead_code, reason = "its lock ends when it is closed")] Option<File>,
);

/// An object in the cache: see [`Cache::list`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Cached {
    /// The address of the object.
    pub url: String,
    /// Its ETag.
    pub etag: String,
    /// The length of the object in bytes.
    pub object_bytes: u64,
    /// Its bytes on disk.
    pub cached_bytes: u64,
    /// When it was last opened or stored to.
    pub used: SystemTime,
    /// Whether a process has it open.
    pub in_use: bool,
    path: PathBuf,
}

impl Cache {
    /// Opens the cache in a folder. A missing folder is created, private to its owner.
    ///
    /// # Errors
    /// [`ObjectError::Cache`]
    pub fn open(folder: impl Into<PathBuf>, limit_bytes: u64) -> Result<Self, ObjectError> {
        let folder = folder.into();
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(|error| failed("make", &folder, error))?;
        let found = folder.metadata().map_err(|error| failed("look at", &folder, error))?;
        // Users with write access could change a guest.
        let owners = [rustix::process::geteuid().as_raw(), 0];
        if !owners.contains(&found.uid()) || found.mode() & 0o022 != 0 {
            let error = io::Error::new(
                io::ErrorKind::PermissionDenied,
                "others can write to it: give a folder that only its owner can write to",
            );
            return Err(failed("use", &folder, error));
        }
        Ok(Self { folder, limit_bytes, stored_bytes: AtomicU64::new(0) })
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file of an object.
    pub(crate) fn entry(&self, url: &ObjectUrl, found: &Identity) -> Result<Entry, ObjectError> {
        let path = self.path_of(url, found);
        let entry = Entry::open(&path, &url.to_string(), found);
        let entry = entry.map_err(|error| failed("open", &path, error))?;
        self.make_room(Some(&entry));
        Ok(entry)
    }

    /// Removes the file of an object. Processes that have it open keep it.
    pub(crate) fn forget(&self, url: &ObjectUrl, found: &Identity) {
        // If that fails, the object is opened from the cache again.
        let _ = fs::remove_file(self.path_of(url, found));
    }

    fn path_of(&self, url: &ObjectUrl, found: &Identity) -> PathBuf {
        self.folder.join(format!("{}-{}{SUFFIX}", name_of(url), hash(&found.etag)))
    }

    /// Whether the cache may have blocks of an object of this address.
    pub(crate) fn knows(&self, url: &ObjectUrl) -> bool {
        let name = name_of(url);
        let mut names = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        names.any(|entry| entry.file_name().to_str().is_some_and(|found| found.starts_with(&name)))
    }

    /// The version of an object of this address that was used last.
    pub(crate) fn last_identity(&self, url: &ObjectUrl) -> Option<Identity> {
        let name = name_of(url);
        let names = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let of_url = names.filter(|entry| {
            entry.file_name().to_str().is_some_and(|found| found.starts_with(&name))
        });
        let used = |entry: &fs::DirEntry| entry.metadata().and_then(|found| found.modified()).ok();
        let last = of_url.max_by_key(used)?;
        entry::describe(&last.path()).filter(|(of, _)| *of == url.to_string()).map(|found| found.1)
    }

    /// The turn to fetch the ends of an object. `None`: another process, or another thread, has it.
    pub(crate) fn turn(&self, url: &ObjectUrl) -> Option<Turn> {
        let path = self.folder.join(TURNS);
        let mut open = OpenOptions::new();
        let file = open.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        // Without locks, each process fetches for itself.
        let Ok(file) = file else { return Some(Turn(None)) };
        let at = lock_of(url);
        match lock::try_lock(&file, at..at + 1, lock::Kind::Exclusive) {
            Ok(true) => Some(Turn(Some(file))),
            Ok(false) => None,
            Err(_) => Some(Turn(None)),
        }
    }

    /// Counts stored bytes, and makes room each time enough were stored.
    pub(crate) fn stored(&self, bytes: u64, entry: &Entry) {
        let before = self.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before / LOOK_EVERY_BYTES != (before + bytes) / LOOK_EVERY_BYTES {
            self.make_room(Some(entry));
        }
    }

    /// All objects in the cache, the one that was used last first.
    ///
    /// # Errors
    /// [`ObjectError::Cache`]
    pub fn list(&self) -> Result<Vec<Cached>, ObjectError> {
        let names = fs::read_dir(&self.folder);
        let names = names.map_err(|error| failed("read", &self.folder, error))?;
        let mut all: Vec<_> = names.flatten().filter_map(|name| look(name.path())).collect();
        all.sort_by_key(|cached| std::cmp::Reverse(cached.used));
        Ok(all)
    }

    /// Removes objects that no process has open, the least recently used first, until the cache has at most `to_bytes`
    /// bytes. Returns the number of removed bytes.
    ///
    /// # Errors
    /// [`ObjectError::Cache`]
    pub fn prune(&self, to_bytes: u64) -> Result<u64, ObjectError> {
        let all = self.list()?;
        let mut total: u64 = all.iter().map(|cached| cached.cached_bytes).sum();
        let mut removed = 0;
        for cached in all.iter().rev() {
            if total <= to_bytes {
                break;
            }
            let gone = entry::remove_unused(&cached.path);
            if gone.map_err(|error| failed("remove", &cached.path, error))? {
                total = total.saturating_sub(cached.cached_bytes);
                removed += cached.cached_bytes;
            }
        }
        Ok(removed)
    }

    /// Enforces the limit: first removes objects that are not in use, then blocks of this one.
    fn make_room(&self, own: Option<&Entry>) {
        // Files that cannot be read or removed stay. The next call tries again.
        let _ = self.prune(self.limit_bytes);
        let total: u64 = self.list().iter().flatten().map(|cached| cached.cached_bytes).sum();
        if let (Some(own), excess @ 1..) = (own, total.saturating_sub(self.limit_bytes)) {
            own.punch(excess);
        }
    }
}

/// The folder that `$SNAP_CACHE` names, otherwise `snap` in the user's folder for caches. `None`: there is no such
/// folder.
#[must_use]
pub fn default_cache_folder() -> Option<PathBuf> {
    let named = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    named("SNAP_CACHE")
        .or_else(|| Some(named("XDG_CACHE_HOME")?.join("snap")))
        .or_else(|| Some(named("HOME")?.join(".cache/snap")))
}

fn look(path: PathBuf) -> Option<Cached> {
    let name = path.file_name()?.to_str()?;
    if !name.ends_with(SUFFIX) {
        return None;
    }
    let found = path.symlink_metadata().ok().filter(fs::Metadata::is_file)?;
    let (url, identity) = entry::describe(&path).unwrap_or_default();
    Some(Cached {
        url,
        etag: identity.etag,
        object_bytes: identity.len_bytes,
        cached_bytes: found.blocks() * 512,
        used: found.modified().ok()?,
        in_use: entry::is_in_use(&path),
        path,
    })
}

/// The byte of the file of turns that is locked for an address.
fn lock_of(url: &ObjectUrl) -> u64 {
    // 60 bits: less than the largest offset.
    u64::from_str_radix(&name_of(url)[..15], 16).unwrap_or(0)
}

/// A hash of the address and its server. The bucket's name may be a secret, so file names do not show it.
fn name_of(url: &ObjectUrl) -> String {
    hash(&format!("{url}\n{}", Store::endpoint(url)))
}

fn hash(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn failed(what: &'static str, path: &Path, error: io::Error) -> ObjectError {
    ObjectError::Cache { what, path: path.to_owned(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(etag: &str) -> Identity {
        Identity { etag: etag.into(), len_bytes: 3 * BLOCK_BYTES, version: None }
    }

    fn filled(cache: &Cache, key: &str) -> Entry {
        let url = format!("s3://bucket/{key}").parse().unwrap();
        let entry = cache.entry(&url, &identity("\"1\"")).unwrap();
        for block in 0..3 {
            entry.store(block, &vec![7; BLOCK_BYTES as usize]).unwrap();
        }
        entry
    }

    #[test]
    fn the_folder_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        let cache = Cache::open(&path, 1 << 30).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        drop(filled(&cache, "guest"));
        let file = fs::read_dir(&path).unwrap().next().unwrap().unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        let listed = cache.list().unwrap();
        assert_eq!((listed.len(), listed[0].url.as_str()), (1, "s3://bucket/guest"));
        assert!(listed[0].cached_bytes >= 3 * BLOCK_BYTES && !listed[0].in_use);
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = Cache::open(folder.path(), 1).unwrap_err();
        assert!(matches!(error, ObjectError::Cache { what: "use", .. }), "{error:?}");
    }

    #[test]
    fn objects_that_are_not_in_use_are_removed_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), 1 << 30).unwrap();
        drop(filled(&cache, "old"));
        let used = filled(&cache, "used");
        drop(filled(&cache, "new"));
        assert_eq!(cache.list().unwrap().iter().filter(|cached| cached.in_use).count(), 1);
        // The oldest is removed.
        cache.prune(7 * BLOCK_BYTES).unwrap();
        let left = || cache.list().unwrap().iter().map(|c| c.url.clone()).collect::<Vec<_>>();
        assert_eq!(left(), ["s3://bucket/new", "s3://bucket/used"]);
        cache.prune(0).unwrap();
        assert_eq!(left(), ["s3://bucket/used"]);
        let mut bytes = [0; 10];
        assert!(used.read(0, &mut bytes).unwrap());
        drop(used);
        assert!(cache.prune(0).unwrap() >= 3 * BLOCK_BYTES);
        assert!(left().is_empty());
    }

    #[test]
    fn an_object_in_use_loses_blocks_when_no_other_object_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), 2 * BLOCK_BYTES).unwrap();
        let entry = filled(&cache, "large");
        cache.make_room(Some(&entry));
        let there: Vec<_> = (0..3).filter(|block| entry.has(*block)).collect();
        // The header takes a page.
        assert_eq!(there.len(), 1, "{there:?}");
        assert!(cache.list().unwrap()[0].cached_bytes <= 2 * BLOCK_BYTES);
    }
}
