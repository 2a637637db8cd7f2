//! Uploads the files of a snapshot to a bucket or a registry, and gives them a name there.

mod bucket;
mod file;
mod name;
mod outcome;
mod registry;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use object_store::GetRange;
use snapfmt::{OnProgress, Snapshot};

use crate::error::ObjectError;
use crate::fetch::Source;
use crate::retry::Retry;
use crate::runtime;
use crate::store::Store;
use crate::url::{ObjectUrl, Scheme};

pub use outcome::{Pushed, PushedLayer};

/// Uploads the files of a snapshot that are not in the bucket yet, parents first, and then writes its name. The objects
/// are in the folder `objects` beside the name. In a registry, they are blobs, and the name is a tag. An interrupted
/// push leaves no name.
///
/// A name that is taken is an error, unless `replace` is set, or the name is already that of this snapshot.
///
/// # Errors
/// [`ObjectError`]
pub fn push(
    snapshot: &Snapshot,
    name: &ObjectUrl,
    replace: bool,
    retry: Retry,
    progress: OnProgress<'_>,
) -> Result<Pushed, ObjectError> {
    check_writable(name)?;
    if name.scheme() == Scheme::File {
        make_private_folder(&name.beside("objects")?)?;
    }
    let store = Arc::new(Store::open_to_write(name, retry)?);
    let source = Source::new(name, store, retry);
    let pushed = runtime::wait(async {
        match name.scheme() {
            Scheme::Oci => registry::push_all(snapshot, &source, replace, progress).await,
            _ => bucket::push_all(snapshot, &source, replace, progress).await,
        }
    });
    pushed.map_err(ObjectError::Runtime)?
}

/// Whether a push would replace this name, or tag.
///
/// # Errors
/// [`ObjectError`]
pub fn is_taken(name: &ObjectUrl, retry: Retry) -> Result<bool, ObjectError> {
    check_writable(name)?;
    let source = Source::new(name, Arc::new(Store::open(name)?), retry);
    let range = match name.scheme() {
        Scheme::Oci => GetRange::Offset(0),
        _ => GetRange::Bounded(0..1),
    };
    match runtime::wait(source.first(range)).map_err(ObjectError::Runtime)? {
        Ok(_) | Err(ObjectError::Empty { .. }) => Ok(true),
        Err(ObjectError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn check_writable(name: &ObjectUrl) -> Result<(), ObjectError> {
    if matches!(name.scheme(), Scheme::Http | Scheme::Https) {
        let what = "a snapshot is not pushed to an HTTP server, only read from one";
        return Err(ObjectError::Unsupported { url: name.to_string(), what });
    }
    Ok(())
}

/// Guest memory contains secrets, and the client would create a folder that all users can read.
fn make_private_folder(url: &ObjectUrl) -> Result<(), ObjectError> {
    let folder = Path::new("/").join(url.key().as_ref());
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.map_err(|error| ObjectError::Cache { what: "make", path: folder, error })
}
