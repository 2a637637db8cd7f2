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
use snapfmt::{Header, OnProgress, Snapshot};

use crate::error::ObjectError;
use crate::fetch::Source;
use crate::name::file_name;
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

/// Checks that a layer on `parent` could be pushed: a parent that is an object must be where the push looks for it.
///
/// # Errors
/// [`ObjectError::Unsupported`]
pub fn check_parents(parent: &Snapshot, name: &ObjectUrl) -> Result<(), ObjectError> {
    let objects = parent.headers().zip(parent.storages()).zip(parent.paths());
    let mut objects = objects.filter(|((_, storage), _)| storage.file().is_none());
    let is_there = |((header, _), path): ((&Header, _), Option<&Path>)| {
        let url = path.and_then(Path::to_str).and_then(|path| path.parse::<ObjectUrl>().ok());
        url.is_some_and(|url| match name.repository() {
            Some(_) => {
                let is_same = (url.host(), url.repository()) == (name.host(), name.repository());
                url.scheme() == Scheme::Oci && is_same
            }
            None => name.beside(&format!("objects/{}", file_name(header.id))) == Ok(url),
        })
    };
    match objects.all(is_there) {
        true => Ok(()),
        false => Err(ObjectError::Unsupported {
            url: name.to_string(),
            what: "a parent is in another bucket, folder or repository: pull it first",
        }),
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
    made.map_err(|error| ObjectError::Folder { path: folder, error })
}
