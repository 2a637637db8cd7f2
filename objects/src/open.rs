//! Opens a snapshot in a bucket. One round trip brings the first and the last MiB.

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::try_join_all;
use object_store::GetRange;
use snapfmt::{ChainError, ReadError, Snapshot, Storage};

use crate::cache::{BLOCK_BYTES, Cache};
use crate::cancel::{Cancelled, unless_cancelled};
use crate::error::ObjectError;
use crate::fetch::{Identity, Source};
use crate::name::{self, Name};
use crate::oci::Manifest;
use crate::remote::RemoteObject;
use crate::retry::Retry;
use crate::runtime;
use crate::store::Store;
use crate::url::{ObjectUrl, Scheme};

/// The bytes at each end of an object that the first answers contain. The front has the header and the chunks that
/// `snap optimize` puts there. The end has the index of up to 400 MiB of memory in use, and all that is read to open
/// it.
pub(crate) const END_BYTES: u64 = 1 << 20;

/// Most layers of a chain, as in `snapfmt`.
const MOST_LAYERS: usize = 256;

/// How objects are read.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where blocks are kept.
    pub cache: Arc<Cache>,
    /// How temporary errors are retried.
    pub retry: Retry,
}

impl Options {
    /// With this cache, and 30 seconds of patience.
    #[must_use]
    pub fn new(cache: Cache) -> Self {
        Self { cache: Arc::new(cache), retry: Retry::default() }
    }

    /// Sets [`Options::retry`].
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }
}

/// A snapshot in a bucket.
pub struct Opened {
    /// The snapshot, with all of its layers.
    pub snapshot: Snapshot,
    /// Its objects, the top one first.
    pub objects: Vec<RemoteObject>,
}

/// Opens the snapshot at an address: that of an object, or a name that a push has written. The parents of a layer are
/// in the same folder of the same bucket.
///
/// # Errors
/// [`ObjectError`]
pub fn open(url: &ObjectUrl, options: &Options) -> Result<Opened, ObjectError> {
    open_unless(url, options, &|| ControlFlow::Continue(()))
}

/// As [`open`]. The caller may cancel while a server does not answer.
pub(crate) fn open_unless(
    url: &ObjectUrl,
    options: &Options,
    cancelled: Cancelled<'_>,
) -> Result<Opened, ObjectError> {
    let (objects, name) = open_objects(url, options, cancelled)?;
    let snapshot = Snapshot::named_chain(with_names(&objects))
        .map_err(|error| ObjectError::Snapshot { name: url.to_string(), error })?;
    if let Some(name) = name {
        let same = snapshot.headers().zip(&name.layers).all(|(header, layer)| {
            (header.id.to_string(), header.crc) == (layer.id.clone(), layer.header_crc)
        });
        if !same {
            let reason = "its objects are not the snapshots that it lists".to_owned();
            return Err(ObjectError::Name { url: url.to_string(), reason });
        }
    }
    Ok(Opened { snapshot, objects })
}

/// Opens a layer in a file whose parents are objects: those in the folder `objects` beside `name`.
///
/// # Errors
/// [`ObjectError`]
pub fn open_over(
    file: &Path,
    name: &ObjectUrl,
    options: &Options,
) -> Result<Snapshot, ObjectError> {
    let failed = |error| ObjectError::Snapshot { name: file.display().to_string(), error };
    let open = || {
        let open = File::open(file);
        open.map_err(|source| ReadError::Open { path: file.to_owned(), source }).map_err(failed)
    };
    let id = match Snapshot::new(Storage::from(open()?)) {
        Ok(complete) => return Ok(complete),
        Err(ReadError::Chain(ChainError::ParentNeeded { id })) => id,
        Err(error) => return Err(failed(error)),
    };
    let url = name.beside(&format!("objects/{}", name::file_name(id)))?;
    let parents = open_objects(&url, options, &|| ControlFlow::Continue(()))?.0;
    let named = [(Storage::from(open()?), file.to_owned())];
    Snapshot::named_chain(named.into_iter().chain(with_names(&parents))).map_err(failed)
}

fn open_objects(
    url: &ObjectUrl,
    options: &Options,
    cancelled: Cancelled<'_>,
) -> Result<(Vec<RemoteObject>, Option<Name>), ObjectError> {
    let store = Arc::new(Store::open(url)?);
    let chain = chain(Source::new(url, store, options.retry), options);
    runtime::wait(unless_cancelled(cancelled, chain)).map_err(ObjectError::Runtime)??
}

fn with_names(objects: &[RemoteObject]) -> impl Iterator<Item = (Storage, PathBuf)> {
    objects
        .iter()
        .map(|object| (Storage::other(object.clone()), PathBuf::from(object.url().to_string())))
}

/// The objects of a chain, and the name that lists them.
async fn chain(
    top: Source,
    options: &Options,
) -> Result<(Vec<RemoteObject>, Option<Name>), ObjectError> {
    if top.url.scheme() == Scheme::Oci {
        return Ok((in_registry(&top, options).await?, None));
    }
    let (top, name) = match first_look(top, options).await? {
        Looked::Object(object) => return Ok((parents(object, options).await?, None)),
        Looked::Name(source, name) => (source, name),
    };
    let layers = name.layers.iter().map(|layer| async {
        let source = Source { url: top.url.beside(&layer.key())?, ..top.clone() };
        match first_look(source, options).await? {
            Looked::Object(object) => Ok(object),
            Looked::Name(source, _) => Err(not_a_snapshot(&source)),
        }
    });
    Ok((try_join_all(layers).await?, Some(name)))
}

/// Finds the parents of an object without a name one after the other: each object gives only its parent's id.
async fn parents(top: RemoteObject, options: &Options) -> Result<Vec<RemoteObject>, ObjectError> {
    let mut objects = vec![top];
    while let Some(last) = objects.last() {
        let id = match tokio::task::block_in_place(|| Snapshot::new(last.clone())) {
            Err(ReadError::Chain(ChainError::ParentNeeded { id })) => id,
            // Opening the chain reports the error.
            Ok(_) | Err(_) => break,
        };
        let url = last.url().beside(&name::file_name(id))?;
        if objects.iter().any(|object| *object.url() == url) || objects.len() == MOST_LAYERS {
            break;
        }
        let source = Source { url, ..last.source().clone() };
        match first_look(source, options).await? {
            Looked::Object(object) => objects.push(object),
            Looked::Name(source, _) => return Err(not_a_snapshot(&source)),
        }
    }
    Ok(objects)
}

/// The objects of a chain in a registry. Its manifest gives their digests and lengths, so they stay the same also when
/// the tag is given to another manifest.
async fn in_registry(source: &Source, options: &Options) -> Result<Vec<RemoteObject>, ObjectError> {
    if source.url.key().as_ref().contains('@')
        && let Some(object) = one_blob(source, options).await?
    {
        return Ok(vec![object]);
    }
    let (_, _, bytes) = source.first(GetRange::Offset(0)).await?;
    let manifest = Manifest::parse(&bytes)
        .map_err(|reason| ObjectError::Name { url: source.url.to_string(), reason })?;
    let objects = manifest.layers.into_iter().map(|layer| async move {
        let source = Source { url: source.url.with_digest(&layer.digest)?, ..source.clone() };
        let identity = Identity { etag: layer.digest, len_bytes: layer.len_bytes, version: None };
        let object =
            RemoteObject::new(source.clone(), identity.clone(), Arc::clone(&options.cache))?;
        if !object.has_ends() {
            let len = identity.len_bytes;
            let part = |range: Range<u64>| {
                let (source, identity) = (&source, &identity);
                async move {
                    let mut bytes = Vec::new();
                    let start = range.start;
                    source.range(identity, range, &mut |part| bytes.extend(part)).await?;
                    Ok::<_, ObjectError>((start, bytes))
                }
            };
            let tail = len.saturating_sub(END_BYTES + BLOCK_BYTES)..len;
            let (head, tail) = futures_util::try_join!(part(0..END_BYTES.min(len)), part(tail))?;
            tokio::task::block_in_place(|| {
                object.fill(head.0, &head.1);
                object.fill(tail.0, &tail.1);
            });
        }
        Ok::<_, ObjectError>(object)
    });
    try_join_all(objects).await
}

/// Opens the blob with the digest of an address. `None`: it may be the digest of a manifest. The blob is requested
/// first, because a registry may answer a request for a manifest that is none with a temporary error.
async fn one_blob(source: &Source, options: &Options) -> Result<Option<RemoteObject>, ObjectError> {
    let (identity, start, bytes) = match source.first(GetRange::Bounded(0..END_BYTES)).await {
        // Some registries give a manifest as a blob, too.
        Ok(found) if Name::is_meant(&found.2) => return Ok(None),
        Err(ObjectError::NotFound { .. }) => return Ok(None),
        found => found?,
    };
    let object = RemoteObject::new(source.clone(), identity, Arc::clone(&options.cache))?;
    tokio::task::block_in_place(|| object.fill(start, &bytes));
    Ok(Some(object))
}

fn not_a_snapshot(source: &Source) -> ObjectError {
    let reason = "a name where a snapshot was expected".to_owned();
    ObjectError::Name { url: source.url.to_string(), reason }
}

enum Looked {
    Object(RemoteObject),
    Name(Source, Name),
}

/// Opens an object, or reads a name.
async fn first_look(source: Source, options: &Options) -> Result<Looked, ObjectError> {
    if options.cache.knows(&source.url) {
        // One request without a body, if the object is still the one that is cached.
        match source.identity().await {
            Ok(identity) => {
                let cache = Arc::clone(&options.cache);
                let object = RemoteObject::new(source.clone(), identity, cache)?;
                if object.has_ends() {
                    return Ok(Looked::Object(object));
                }
            }
            // A server that only answers GET.
            Err(ObjectError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let (head, tail) = ends(&source).await?;
    let (head, tail) = match head.0 == tail.0 {
        true => (head, tail),
        // It was replaced between the two.
        false => ends(&source).await?,
    };
    if head.0 != tail.0 {
        let (expected, found) = (head.0.etag, Some(tail.0.etag));
        return Err(ObjectError::Replaced { url: source.url.to_string(), expected, found });
    }
    if Name::is_meant(&head.2) {
        let name = Name::parse(&head.2, head.0.len_bytes)
            .map_err(|reason| ObjectError::Name { url: source.url.to_string(), reason })?;
        return Ok(Looked::Name(source, name));
    }
    let object = RemoteObject::new(source, head.0, Arc::clone(&options.cache))?;
    tokio::task::block_in_place(|| {
        object.fill(head.1, &head.2);
        object.fill(tail.1, &tail.2);
    });
    Ok(Looked::Object(object))
}

type Part = (Identity, u64, Vec<u8>);

/// The first and the last bytes of an object, from two requests at the same time.
async fn ends(source: &Source) -> Result<(Part, Part), ObjectError> {
    let head = source.first(GetRange::Bounded(0..END_BYTES));
    // Blocks of which only a part comes are left out.
    let suffix = END_BYTES + BLOCK_BYTES;
    if source.url.scheme() != Scheme::Az {
        return futures_util::try_join!(head, source.first(GetRange::Suffix(suffix)));
    }
    // Azure has no ranges that count from the end.
    let head = head.await?;
    let start = head.0.len_bytes.saturating_sub(suffix);
    let tail = source.first(GetRange::Offset(start)).await?;
    Ok((head, tail))
}
