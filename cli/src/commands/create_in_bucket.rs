//! `snap create URL`: the snapshot is written into a private file, and that is pushed.
//!
//! The writer goes back to the header when all else is written, and reads what it has written to find equal pages, so
//! it needs a file. The name appears when all is in the bucket.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use objects::{ObjectUrl, Retry};

use super::push;
use crate::bucket::{self, to_error};
use crate::input::{Input, ParentArgs};
use crate::keys::KeyArgs;
use crate::leftovers;
use crate::millis::ms;
use crate::session::Session;
use crate::summary::Summary;

/// What is to be snapshotted, and where to.
pub(super) struct Plan<'a> {
    pub(super) address: &'a Path,
    /// The snapshot that the new one is a layer on.
    pub(super) base: Option<&'a Path>,
    /// Whether the name is replaced if it is taken.
    pub(super) force: bool,
    /// Whether the guest ends when the file is written.
    pub(super) stop: bool,
    pub(super) keys: &'a KeyArgs,
}

/// Pushes the snapshot that `create` writes. What can be checked is checked before, so that no guest boots in vain.
pub(super) fn create(
    plan: &Plan<'_>,
    session: &Session,
    create: impl FnOnce(&Path) -> Result<Summary>,
) -> Result<Summary> {
    let started = Instant::now();
    let (url, force) = (bucket::url(plan.address)?, plan.force);
    let cache = bucket::cache()?;
    if objects::is_taken(&url, Retry::default()).map_err(to_error)? && !force {
        bail!("{url}: the name is taken; give --force to replace it");
    }
    let parents = ParentArgs::from(plan.keys.clone());
    check_base(plan.base, &parents, &url)?;
    let creating = leftovers::creating();
    // It is on a disk, and others cannot read it.
    let folder = tempfile::Builder::new().prefix("create-").tempdir_in(cache.folder());
    let folder = folder.with_context(|| cache.folder().display().to_string())?;
    if !plan.stop {
        leftovers::folder(folder.path());
    }
    drop(creating);
    let file = folder.path().join("guest.snap");
    let pushed = create(&file).and_then(|summary| {
        push::send(&file, &parents, &url, force, session)?;
        Ok(summary)
    });
    match pushed {
        Ok(mut summary) => {
            summary.file = plan.address.to_owned();
            summary.total_ms = ms(started.elapsed());
            Ok(summary)
        }
        // The guest has ended, and nothing else is left of it.
        Err(error) if plan.stop && file.exists() => {
            let kept = folder.keep().join("guest.snap");
            let kept = kept.display();
            Err(error
                .context(format!("the guest's snapshot is in {kept}, and snap push can send it")))
        }
        Err(error) => Err(error),
    }
}

/// Refuses a base from which a layer could not be pushed.
fn check_base(base: Option<&Path>, parents: &ParentArgs, url: &ObjectUrl) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    let base = Input { file: base.to_owned(), parents: parents.clone() };
    // The cache may have objects that were deleted in the bucket.
    let base = base.open_to_verify()?;
    objects::check_parents(&base, url).map_err(to_error)
}
