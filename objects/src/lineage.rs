//! The objects of a layer and its parents.

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use object_store::GetRange;
use snapfmt::{ParentHint, Snapshot, Storage};

use crate::blobs::{all_blobs, one_blob};
use crate::error::ObjectError;
use crate::fetch::Source;
use crate::look::{Known, LAYERS, Looked, first_look};
use crate::name::{self, Name, file_name};
use crate::options::Options;
use crate::place::{address_in, check_place};
use crate::remote::RemoteObject;
use crate::store::Store;
use crate::url::{ObjectUrl, Scheme};

/// Most layers of a chain, as in `snapfmt`.
const MOST_LAYERS: usize = 256;

/// Whether an object with an id in its key is opened from the cache without a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    /// It is, because such an object never changes.
    Ids,
    /// The server is asked for the version of each object.
    Server,
}

/// The objects of a layer and its parents.
pub(crate) struct Lineage {
    /// The top one is first.
    pub(crate) objects: Vec<RemoteObject>,
    /// The name or list that they were found by, with its address.
    pub(crate) list: Option<(ObjectUrl, Name)>,
    /// The address of the manifest that lists them, by its digest. It finds the parents, too, which the digest of a blob
    /// does not.
    pub(crate) manifest: Option<ObjectUrl>,
}

impl Lineage {
    /// The layers with their addresses.
    pub(crate) fn layers(&self) -> impl Iterator<Item = (Storage, PathBuf)> {
        let own = self.objects.iter().map(RemoteObject::url);
        let addresses = self.manifest.iter().chain(own.skip(usize::from(self.manifest.is_some())));
        let named = self.objects.iter().zip(addresses);
        named.map(|(object, url)| (Storage::other(object.clone()), url.to_string().into()))
    }
}

/// Opens the objects of a chain. With [`Trust::Ids`], those with an id in their key may be opened without a request.
pub(crate) async fn chain(
    top: Source,
    trust: Trust,
    options: &Options,
) -> Result<Lineage, ObjectError> {
    let known = Known { len_bytes: None, trusts_ids: trust == Trust::Ids };
    let list = list_of(&top, known, options);
    let (list, looked) = futures_util::try_join!(list, look(top.clone(), known, options))?;
    // A name is beside the folder of its objects, a list is in that folder.
    let (list, top, from, folder) = match (looked, list) {
        (None, _) => {
            let (objects, manifest) = all_blobs(&top, options).await?;
            return Ok(Lineage { objects, list: None, manifest: Some(manifest) });
        }
        (Some(Looked::Name(found)), _) => {
            let top = || found.top(&options.cache);
            let top = match trust {
                Trust::Ids => tokio::task::block_in_place(top)?,
                Trust::Server => None,
            };
            ((found.source.url.clone(), found.name), top, found.source, "objects/")
        }
        (Some(Looked::Object(object)), Some(list)) => {
            let source = object.source().clone();
            (list, Some(object), source, "")
        }
        (Some(Looked::Object(object)), None) => {
            let objects = parents(object, known, options).await?;
            return Ok(Lineage { objects, list: None, manifest: None });
        }
    };
    let rest = list.1.layers.iter().skip(usize::from(top.is_some())).map(|layer| async {
        let url = from.url.beside(&format!("{folder}{}", layer.file_name()))?;
        let known = Known { len_bytes: Some(layer.file_bytes), ..known };
        object(first_look(Source { url, ..from.clone() }, known, &options.cache).await?)
    });
    let rest: Vec<_> = stream::iter(rest).buffered(LAYERS).try_collect().await?;
    let objects = top.into_iter().chain(rest).collect();
    Ok(Lineage { objects, list: Some(list), manifest: None })
}

/// What is at an address; `None`: a manifest in a registry.
async fn look(
    source: Source,
    known: Known,
    options: &Options,
) -> Result<Option<Looked>, ObjectError> {
    match source.url.scheme() {
        Scheme::Oci if source.url.key().as_ref().contains('@') => {
            Ok(one_blob(&source, options).await?.map(Looked::Object))
        }
        Scheme::Oci => Ok(None),
        _ => first_look(source, known, &options.cache).await.map(Some),
    }
}

/// The list of a layer's parents that a push has written beside it. It is requested together with the layer.
async fn list_of(
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
    // The usual refusal below is no reason to read the credentials again.
    let source = Source { url, renews: false, ..top.clone() };
    let is_http = matches!(source.url.scheme(), Scheme::Http | Scheme::Https);
    let (identity, _, bytes) = match source.first(GetRange::Bounded(0..name::MOST_TEXT_BYTES)).await
    {
        // A web server may answer with a page instead of 404.
        Ok((_, _, bytes)) if is_http && !Name::is_meant(&bytes) => return Ok(None),
        Err(
            ObjectError::NoRanges { .. }
            | ObjectError::NoEtag { .. }
            | ObjectError::Empty { .. }
            | ObjectError::Refused { .. },
        ) if is_http => return Ok(None),
        Ok(found) => found,
        // A snapshot without a parent has none. Without the right to list a bucket, the answer is 403.
        Err(ObjectError::NotFound { .. } | ObjectError::Denied { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let wrong = |reason| ObjectError::Name { url: source.url.to_string(), reason };
    let (list, _) = Name::parse(&bytes, identity.len_bytes).map_err(wrong)?;
    match list.layers[0].id == id {
        true => Ok(Some((source.url, list))),
        false => Err(wrong("it is of another snapshot".to_owned())),
    }
}

fn object(looked: Looked) -> Result<RemoteObject, ObjectError> {
    match looked {
        Looked::Object(object) => Ok(object),
        Looked::Name(found) => Err(ObjectError::Name {
            url: found.source.url.to_string(),
            reason: "a name where a snapshot was expected".to_owned(),
        }),
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
        // Opening the chain reports an error.
        let keys = options.keys.as_deref();
        let hint = tokio::task::block_in_place(|| Snapshot::parent_hint_of(last.clone(), keys));
        let Ok(Some(hint)) = hint else { break };
        let found = parent(last, &hint, known, options).await?;
        let is_known = |one: &RemoteObject| objects.iter().any(|object| object.url() == one.url());
        if found.is_empty() || found.iter().any(is_known) || objects.len() >= MOST_LAYERS {
            break;
        }
        objects.extend(found);
    }
    Ok(objects)
}

/// The parent of an object: in the same folder by its id, or else at the address that the object has for it. If that is
/// of a manifest, also its parents. Empty: there is no such address.
async fn parent(
    child: &RemoteObject,
    hint: &ParentHint,
    known: Known,
    options: &Options,
) -> Result<Vec<RemoteObject>, ObjectError> {
    let address = address_in(hint);
    if child.url().scheme() != Scheme::Oci {
        let url = child.url().beside(&file_name(hint.id))?;
        let source = Source { url, ..child.source().clone() };
        match first_look(source, known, &options.cache).await {
            // Without the right to list a bucket, the answer for an object that is not there is 403.
            Err(ObjectError::NotFound { .. } | ObjectError::Denied { .. }) if address.is_some() => {
            }
            looked => return object(looked?).map(|parent| vec![parent]),
        }
    }
    let Some(url) = address else { return Ok(Vec::new()) };
    check_place(&child.url().to_string(), Some(child.url()), &url, options)?;
    let source = source_at(&url, options)?;
    match look(source.clone(), known, options).await? {
        Some(looked) => object(looked).map(|parent| vec![parent]),
        None => all_blobs(&source, options).await.map(|(objects, _)| objects),
    }
}

/// The parent of a layer in a file, and its parents: in the folder `objects` beside `name`, or else at the address that
/// the layer has for it. `None`: it has none.
pub(crate) async fn parents_of_file(
    layer: &str,
    hint: &ParentHint,
    name: Option<&ObjectUrl>,
    options: &Options,
) -> Result<Option<Lineage>, ObjectError> {
    let address = address_in(hint);
    if let Some(name) = name.filter(|name| name.scheme() != Scheme::Oci) {
        let url = name.beside(&format!("objects/{}", file_name(hint.id)))?;
        match chain(source_at(&url, options)?, Trust::Server, options).await {
            Err(ObjectError::NotFound { .. } | ObjectError::Denied { .. }) if address.is_some() => {
            }
            found => return found.map(Some),
        }
    }
    let Some(url) = address else { return Ok(None) };
    check_place(layer, name, &url, options)?;
    chain(source_at(&url, options)?, Trust::Server, options).await.map(Some)
}

/// How the object at an address is requested.
pub(crate) fn source_at(url: &ObjectUrl, options: &Options) -> Result<Source, ObjectError> {
    Ok(Source::new(url, Arc::new(Store::open(url)?), options.retry))
}
