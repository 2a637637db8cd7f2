//! Opens a snapshot in a bucket. One round trip brings the first and the last MiB.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::try_join_all;
use object_store::GetRange;
use snapfmt::{ChainError, Header, ReadError, Snapshot, Storage};

use crate::cache::Cache;
use crate::cancel::{Cancelled, unless_cancelled};
use crate::error::ObjectError;
use crate::fetch::Source;
use crate::look::{Known, Looked, first_look};
use crate::name::{self, Name};
use crate::remote::RemoteObject;
use crate::retry::Retry;
use crate::runtime;
use crate::store::Store;
use crate::url::ObjectUrl;

/// Most layers of a chain, as in `snapfmt`.
const MOST_LAYERS: usize = 256;

/// How objects are read.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where blocks are kept.
    pub cache: Arc<Cache>,
    /// How temporary errors are retried.
    pub retry: Retry,
    /// Whether [`open`] asks the server for the version of each object, also of one with an id in its key. Such an
    /// object never changes, so otherwise it is opened from the cache without a request, also if it was deleted.
    pub asks_server: bool,
}

impl Options {
    /// With this cache, and 30 seconds of patience.
    #[must_use]
    pub fn new(cache: Cache) -> Self {
        Self { cache: Arc::new(cache), retry: Retry::default(), asks_server: false }
    }

    /// Sets [`Options::retry`].
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Sets [`Options::asks_server`].
    #[must_use]
    pub fn asks_server(mut self, asks: bool) -> Self {
        self.asks_server = asks;
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
    let trust = if options.asks_server { Trust::Server } else { Trust::Ids };
    open_unless(url, options, trust, &|| ControlFlow::Continue(()))
}

/// Whether an object with an id in its key is opened from the cache without a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    /// It is, because such an object never changes.
    Ids,
    /// The server is asked for the version of each object.
    Server,
}

/// As [`open`]. The caller may cancel while a server does not answer.
pub(crate) fn open_unless(
    url: &ObjectUrl,
    options: &Options,
    trust: Trust,
    cancelled: Cancelled<'_>,
) -> Result<Opened, ObjectError> {
    let store = Arc::new(Store::open(url)?);
    let source = Source::new(url, store, options.retry);
    let chain = open_objects(&source, options, trust, cancelled)?;
    let by_id = chain.objects.iter().any(|object| name::id_of(object.url()).is_some());
    match chain.open(url, trust) {
        // The cache may have another object than the one with that id.
        Err(_) if by_id && trust == Trust::Ids => {
            open_objects(&source, options, Trust::Server, cancelled)?.open(url, Trust::Server)
        }
        opened => opened,
    }
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
    let source = Source::new(&url, Arc::new(Store::open(&url)?), options.retry);
    let go_on = || ControlFlow::Continue(());
    let parents = open_objects(&source, options, Trust::Server, &go_on)?.objects;
    let named = [(Storage::from(open()?), file.to_owned())];
    Snapshot::named_chain(named.into_iter().chain(with_names(&parents))).map_err(failed)
}

/// The objects of a snapshot, the top one first, and the name or list that they were found by.
struct Chain {
    objects: Vec<RemoteObject>,
    list: Option<(ObjectUrl, Name)>,
}

impl Chain {
    fn open(self, url: &ObjectUrl, trust: Trust) -> Result<Opened, ObjectError> {
        let wrong = |of: &ObjectUrl, reason: &str| ObjectError::Name {
            url: of.to_string(),
            reason: reason.to_owned(),
        };
        let objects = self.objects;
        let snapshot = Snapshot::named_chain(with_names(&objects))
            .map_err(|error| ObjectError::Snapshot { name: url.to_string(), error })?;
        let id_is_right = |(object, header): (&RemoteObject, &Header)| {
            name::id_of(object.url()).is_none_or(|id| id == header.id.to_string())
        };
        if trust == Trust::Ids && !objects.iter().zip(snapshot.headers()).all(id_is_right) {
            return Err(wrong(url, "the cache has a snapshot with another id"));
        }
        if let Some((of, name)) = self.list {
            let same = snapshot.headers().zip(&name.layers).all(|(header, layer)| {
                (header.id.to_string(), header.crc) == (layer.id.clone(), layer.header_crc)
            });
            if !same {
                return Err(wrong(&of, "its objects are not the snapshots that it lists"));
            }
        }
        Ok(Opened { snapshot, objects })
    }
}

fn open_objects(
    source: &Source,
    options: &Options,
    trust: Trust,
    cancelled: Cancelled<'_>,
) -> Result<Chain, ObjectError> {
    let known = Known { len_bytes: None, trusts_ids: trust == Trust::Ids };
    let chain = chain(source.clone(), known, options);
    runtime::wait(unless_cancelled(cancelled, chain)).map_err(ObjectError::Runtime)??
}

fn with_names(objects: &[RemoteObject]) -> impl Iterator<Item = (Storage, PathBuf)> {
    objects
        .iter()
        .map(|object| (Storage::other(object.clone()), PathBuf::from(object.url().to_string())))
}

async fn chain(top: Source, known: Known, options: &Options) -> Result<Chain, ObjectError> {
    let layers = layers_of(&top, known, options);
    let looked = first_look(top.clone(), known, &options.cache);
    let (list, looked) = futures_util::try_join!(layers, looked)?;
    let (list, top, from) = match (looked, list) {
        (Looked::Name(source, name), _) => ((source.url.clone(), name), None, source),
        (Looked::Object(object), Some(list)) => {
            let source = object.source().clone();
            (list, Some(object), source)
        }
        (Looked::Object(object), None) => {
            let objects = parents(object, known, options).await?;
            return Ok(Chain { objects, list: None });
        }
    };
    // A name is beside the folder of its objects, a list is in that folder.
    let folder = if top.is_some() { "" } else { "objects/" };
    let rest = list.1.layers.iter().skip(usize::from(top.is_some())).map(|layer| async {
        let url = from.url.beside(&format!("{folder}{}", layer.file_name()))?;
        let known = Known { len_bytes: Some(layer.file_bytes), ..known };
        object_at(Source { url, ..from.clone() }, known, options).await
    });
    let rest = try_join_all(rest).await?;
    Ok(Chain { objects: top.into_iter().chain(rest).collect(), list: Some(list) })
}

/// The list of a layer's parents that a push has written beside it. It is requested together with the layer.
async fn layers_of(
    top: &Source,
    known: Known,
    options: &Options,
) -> Result<Option<(ObjectUrl, Name)>, ObjectError> {
    let Some(id) = name::id_of(&top.url) else { return Ok(None) };
    if known.trusts_ids && options.cache.last_identity(&top.url).is_some() {
        // Its parents were opened with it. Those that the cache has removed are found one after the other.
        return Ok(None);
    }
    let url = top.url.beside(&name::list_name(id))?;
    let source = Source { url, ..top.clone() };
    let (identity, _, bytes) = match source.first(GetRange::Bounded(0..name::MOST_BYTES)).await {
        Ok(found) => found,
        // A snapshot without a parent has none. Without the right to list a bucket, the answer is 403.
        Err(ObjectError::NotFound { .. } | ObjectError::Denied { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let wrong = |reason| ObjectError::Name { url: source.url.to_string(), reason };
    let list = Name::parse(&bytes, identity.len_bytes).map_err(wrong)?;
    match list.layers[0].id == id {
        true => Ok(Some((source.url, list))),
        false => Err(wrong("it is of another snapshot".to_owned())),
    }
}

/// Finds the parents of an object without a list one after the other: each object gives only its parent's id.
async fn parents(
    top: RemoteObject,
    known: Known,
    options: &Options,
) -> Result<Vec<RemoteObject>, ObjectError> {
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
        objects.push(object_at(source, known, options).await?);
    }
    Ok(objects)
}

async fn object_at(
    source: Source,
    known: Known,
    options: &Options,
) -> Result<RemoteObject, ObjectError> {
    match first_look(source, known, &options.cache).await? {
        Looked::Object(object) => Ok(object),
        Looked::Name(source, _) => {
            let reason = "a name where a snapshot was expected".to_owned();
            Err(ObjectError::Name { url: source.url.to_string(), reason })
        }
    }
}
