//! Downloads objects of a bucket into snapshot files.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};
use snapfmt::{Existing, OnProgress, Output, Progress, ReadError, Snapshot, Storage, WriteError};

use crate::cancel::unless_cancelled;
use crate::error::ObjectError;
use crate::fetch::{Identity, Source};
use crate::lineage::Trust;
use crate::oci;
use crate::open::{Opened, open_unless};
use crate::options::Options;
use crate::place::address_in;
use crate::remote::RemoteObject;
use crate::runtime;
use crate::url::{ObjectUrl, Scheme};

/// Bytes of one request, and requests at the same time.
const PART_BYTES: u64 = 8 << 20;
const PARTS: usize = 4;

/// A file that a pull has written or found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Pulled {
    /// Its path.
    pub path: PathBuf,
    /// Its length in bytes.
    pub file_bytes: u64,
    /// Whether it was there already.
    pub was_there: bool,
}

/// Downloads a snapshot to `path`, and of a layer its parents into the same folder. The layers give the parents' file
/// names. Each file is verified, byte by byte, before it appears. A parent that exists is not replaced.
///
/// # Errors
/// [`ObjectError`]; then `path` has no file, and complete parents stay.
pub fn pull(
    url: &ObjectUrl,
    path: &Path,
    existing: Existing,
    options: &Options,
    progress: OnProgress<'_>,
) -> Result<Vec<Pulled>, ObjectError> {
    let opening = || progress(Progress::new(0, 0));
    let Opened { snapshot, objects } = open_unless(url, options, Trust::Server, &opening)?;
    let paths = local_paths(&snapshot, &objects, path, options)?;
    // Each byte is fetched, and then verified.
    let total_bytes = 2 * snapshot.headers().map(|header| header.file_bytes).sum::<u64>();
    let mut done_bytes = 0;
    let mut pulled = Vec::new();
    let headers: Vec<_> = snapshot.headers().collect();
    for (number, object) in objects.iter().enumerate().rev() {
        let (path, file_bytes) = (&paths[number], headers[number].file_bytes);
        let was_there = number > 0 && is_there(path, &paths, headers[number], number, options)?;
        if !was_there {
            let existing = if number == 0 { existing } else { Existing::Keep };
            let before = done_bytes;
            fetch(object, path, existing, (&paths[number + 1..], options), &|bytes| {
                progress(Progress::new(before + bytes, total_bytes))
            })?;
        }
        done_bytes += 2 * file_bytes;
        pulled.push(Pulled { path: path.clone(), file_bytes, was_there });
    }
    pulled.reverse();
    Ok(pulled)
}

/// Where each layer's file will be.
fn local_paths(
    snapshot: &Snapshot,
    objects: &[RemoteObject],
    top: &Path,
    options: &Options,
) -> Result<Vec<PathBuf>, ObjectError> {
    let mut paths = vec![top.to_owned()];
    for (number, header) in snapshot.headers().enumerate().skip(1) {
        let child = objects[number - 1..].iter().cloned();
        let named = child.map(|object| (Storage::other(object), PathBuf::new()));
        let hint = Snapshot::named_chain_with(named, options.keys.clone())
            .and_then(|child| child.parent_hint());
        let hint = hint.map_err(|error| ObjectError::Snapshot {
            name: objects[number - 1].url().to_string(),
            error,
        })?;
        // Only the last part is used: a snapshot from a bucket must not choose the folder.
        // The name of a parent that was in a bucket is its id: a digest would be no good name for a file.
        let hint = hint.as_ref().filter(|hint| address_in(hint).is_none());
        let name = hint.and_then(|hint| hint.path.file_name());
        let name = name.map_or_else(|| format!("{}.snap", header.id).into(), ToOwned::to_owned);
        let path = top.with_file_name(name);
        if paths.contains(&path) {
            return Err(WriteError::Exists { path }.into());
        }
        paths.push(path);
    }
    Ok(paths)
}

/// Whether the file of a parent is there; another file with its name is an error.
fn is_there(
    path: &Path,
    paths: &[PathBuf],
    header: &snapfmt::Header,
    number: usize,
    options: &Options,
) -> Result<bool, ObjectError> {
    if path.symlink_metadata().is_err() {
        return Ok(false);
    }
    let found = chain_of(None, &paths[number..], options);
    match found {
        Ok(found) if found.header() == header => Ok(true),
        Ok(_) => Err(WriteError::Exists { path: path.to_owned() }.into()),
        Err(error) => Err(ObjectError::Snapshot { name: path.display().to_string(), error }),
    }
}

/// Opens files as a chain; `top`, if given, has no name yet.
fn chain_of(
    top: Option<std::fs::File>,
    paths: &[PathBuf],
    options: &Options,
) -> Result<Snapshot, ReadError> {
    let mut layers: Vec<_> =
        top.into_iter().map(|file| (Storage::from(file), PathBuf::new())).collect();
    for path in paths {
        let file = std::fs::File::open(path)
            .map_err(|source| ReadError::Open { path: path.clone(), source })?;
        layers.push((Storage::from(file), path.clone()));
    }
    Snapshot::named_chain_with(layers, options.keys.clone())
}

fn fetch(
    object: &RemoteObject,
    path: &Path,
    existing: Existing,
    (parents, options): (&[PathBuf], &Options),
    progress: &(dyn Fn(u64) -> ControlFlow<()> + Sync),
) -> Result<(), ObjectError> {
    let mut output = Output::create(path, existing)?;
    let (source, identity) = (object.source(), object.identity());
    let download = download(source, identity, &mut output, progress);
    runtime::wait(download).map_err(ObjectError::Runtime)??;
    let named = |error| ObjectError::Snapshot { name: object.url().to_string(), error };
    let io = |source| ReadError::Open { path: path.to_owned(), source };
    let file = output.file().try_clone().map_err(|error| named(io(error)))?;
    let written = chain_of(Some(file), parents, options).map_err(named)?;
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let fetched_bytes = identity.len_bytes;
    let verified = written.verify(threads, &|p| progress(fetched_bytes + p.done_bytes));
    verified.map_err(|error| match error {
        ReadError::Cancelled => ObjectError::Cancelled,
        error => named(error),
    })?;
    Ok(output.publish()?)
}

/// Downloads without the cache, because a pulled file is not read again from the bucket.
async fn download(
    source: &Source,
    identity: &Identity,
    output: &mut Output,
    progress: &(dyn Fn(u64) -> ControlFlow<()> + Sync),
) -> Result<(), ObjectError> {
    let len = identity.len_bytes;
    let parts = (0..len).step_by(PART_BYTES as usize).map(|start| async move {
        let range = start..(start + PART_BYTES).min(len);
        let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
        source.range(&identity.expected(), range, &mut |part| bytes.extend(part)).await?;
        Ok::<_, ObjectError>((start, bytes))
    });
    let mut parts = stream::iter(parts).buffered(PARTS);
    let mut done_bytes = 0;
    let mut hash = Sha256::new();
    while let Some((start, bytes)) =
        unless_cancelled(&|| progress(done_bytes), parts.try_next()).await??
    {
        output.write_at(&bytes, start)?;
        hash.update(&bytes);
        done_bytes = start + bytes.len() as u64;
        if progress(done_bytes).is_break() {
            return Err(ObjectError::Cancelled);
        }
    }
    let found = oci::named(&hash.finalize());
    if source.url.scheme() == Scheme::Oci && found != identity.etag {
        return Err(ObjectError::WrongDigest { url: source.url.to_string(), found });
    }
    Ok(())
}
