//! Cold runs: the files' pages are dropped from the page cache before each.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::Advice;

/// How the page cache is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Only of these files.
    Fadvise,
    /// Of the whole host, if the first way has no effect and this one is permitted.
    DropCaches,
}

/// tmpfs and ramfs, by their magic numbers (statfs(2)).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

impl Way {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fadvise => "posix_fadvise(DONTNEED)",
            Self::DropCaches => DROP_CACHES,
        }
    }

    /// Writes out dirty pages, which could not be dropped, and drops the pages of `files`.
    pub(super) fn drop_pages(self, files: &[&File]) -> Result<()> {
        for file in files {
            file.sync_all().context("cannot sync a file to drop it from the page cache")?;
            rustix::fs::fadvise(file, 0, None, Advice::DontNeed)
                .context("cannot drop a file from the page cache")?;
        }
        if self == Self::DropCaches {
            rustix::fs::sync();
            let mut control = File::create(Path::new(DROP_CACHES))
                .with_context(|| format!("cannot open {DROP_CACHES}"))?;
            // 1: the page cache only.
            control.write_all(b"1\n").with_context(|| format!("cannot write {DROP_CACHES}"))?;
        }
        Ok(())
    }

    /// The least intrusive way for these files.
    ///
    /// # Errors
    /// When one is on a file system in memory, where its pages are the only copy.
    pub(super) fn first(files: &[&File]) -> Result<Self> {
        for file in files {
            let kind =
                rustix::fs::fstatfs(file).context("cannot read the type of a file system")?.f_type;
            if IN_MEMORY.contains(&(kind as u64)) {
                bail!(
                    "--cold: the snapshot or its raw image is on a file system in memory (tmpfs), which cannot be \
                     dropped; keep it on a disk (--dir, for the temporary files)"
                );
            }
        }
        Ok(Self::Fadvise)
    }

    /// The way to try when a run after this one has read nothing from storage.
    pub(super) fn next(self) -> Option<Self> {
        (self == Self::Fadvise).then_some(Self::DropCaches)
    }
}
