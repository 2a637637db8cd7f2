//! `snap create URL`: the snapshot is written into a private file, and that is pushed.
//!
//! The writer goes back to the header when all else is written, and reads what it has written to find equal pages, so
//! it needs a file. The name appears when all is in the bucket.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use objects::Retry;

use super::push;
use crate::bucket::{self, to_error};
use crate::input::ParentArgs;
use crate::leftovers;
use crate::millis::ms;
use crate::session::Session;
use crate::summary::Summary;

/// Pushes the snapshot that `create` writes. The name is looked up before, so that no guest boots in vain.
pub(super) fn create(
    address: &Path,
    force: bool,
    session: &Session,
    create: impl FnOnce(&Path) -> Result<Summary>,
) -> Result<Summary> {
    let started = Instant::now();
    let url = bucket::url(address)?;
    let cache = bucket::cache()?;
    if objects::is_taken(&url, Retry::default()).map_err(to_error)? && !force {
        bail!("{url}: the name is taken; give --force to replace it");
    }
    let creating = leftovers::creating();
    // It is on a disk, and others cannot read it.
    let folder = tempfile::Builder::new().prefix("create-").tempdir_in(cache.folder());
    let folder = folder.with_context(|| cache.folder().display().to_string())?;
    leftovers::folder(folder.path());
    drop(creating);
    let file = folder.path().join("guest.snap");
    let mut summary = create(&file)?;
    push::send(&file, &ParentArgs::default(), &url, force, session)?;
    summary.file = address.to_owned();
    summary.total_ms = ms(started.elapsed());
    Ok(summary)
}
