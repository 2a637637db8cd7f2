//! The objects of a layer and its parents.

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::try_join_all;
use snapfmt::{ParentHint, Snapshot, Storage};

use crate::error::ObjectError;
use crate::fetch::Source;
use crate::look::{Looked, all_blobs, first_look, one_blob};
use crate::name::{Name, file_name};
use crate::options::Options;
use crate::place::{address_in, check_place};
use crate::remote::RemoteObject;
use crate::store::Store;
use crate::url::{ObjectUrl, Scheme};

/// Most layers of a chain, as in `snapfmt`.
const MOST_LAYERS: usize = 256;

/// The objects of a layer and its parents.
pub(crate) struct Lineage {
    /// The top one is first.
    pub(crate) objects: Vec<RemoteObject>,
    /// The name that lists them.
    pub(crate) name: Option<Name>,
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

/// Opens the objects of a chain.
pub(crate) async fn chain(top: Source, options: &Options) -> Result<Lineage, ObjectError> {
    let (top, name) = match look(top.clone(), options).await? {
        None => {
            let (objects, manifest) = all_blobs(&top, options).await?;
            return Ok(Lineage { objects, name: None, manifest: Some(manifest) });
        }
        Some(Looked::Object(object)) => {
            let objects = parents(object, options).await?;
            return Ok(Lineage { objects, name: None, manifest: None });
        }
        Some(Looked::Name(source, name)) => (source, name),
    };
    let layers = name.layers.iter().map(|layer| async {
        let source = Source { url: top.url.beside(&layer.key())?, ..top.clone() };
        object(first_look(source, options).await?)
    });
    let objects = try_join_all(layers).await?;
    Ok(Lineage { objects, name: Some(name), manifest: None })
}

/// What is at an address; `None`: a manifest in a registry.
async fn look(source: Source, options: &Options) -> Result<Option<Looked>, ObjectError> {
    match source.url.scheme() {
        Scheme::Oci if source.url.key().as_ref().contains('@') => {
            Ok(one_blob(&source, options).await?.map(Looked::Object))
        }
        Scheme::Oci => Ok(None),
        _ => first_look(source, options).await.map(Some),
    }
}

fn object(looked: Looked) -> Result<RemoteObject, ObjectError> {
    match looked {
        Looked::Object(object) => Ok(object),
        Looked::Name(source, _) => Err(ObjectError::Name {
            url: source.url.to_string(),
            reason: "a name where a snapshot was expected".to_owned(),
        }),
    }
}

/// Finds the parents of an object without a name one after the other: each object only says which its parent is.
async fn parents(top: RemoteObject, options: &Options) -> Result<Vec<RemoteObject>, ObjectError> {
    let mut objects = vec![top];
    while let Some(last) = objects.last() {
        // Opening the chain reports an error.
        let hint = tokio::task::block_in_place(|| Snapshot::parent_hint_of(last.clone()));
        let Ok(Some(hint)) = hint else { break };
        let found = parent(last, &hint, options).await?;
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
    options: &Options,
) -> Result<Vec<RemoteObject>, ObjectError> {
    let address = address_in(hint);
    if child.url().scheme() != Scheme::Oci {
        let url = child.url().beside(&file_name(hint.id))?;
        let source = Source { url, ..child.source().clone() };
        match first_look(source, options).await {
            Err(ObjectError::NotFound { .. }) if address.is_some() => {}
            looked => return object(looked?).map(|parent| vec![parent]),
        }
    }
    let Some(url) = address else { return Ok(Vec::new()) };
    check_place(&child.url().to_string(), Some(child.url()), &url, options)?;
    let source = source_at(&url, options)?;
    match look(source.clone(), options).await? {
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
        match chain(source_at(&url, options)?, options).await {
            Err(ObjectError::NotFound { .. }) if address.is_some() => {}
            found => return found.map(Some),
        }
    }
    let Some(url) = address else { return Ok(None) };
    check_place(layer, name, &url, options)?;
    chain(source_at(&url, options)?, options).await.map(Some)
}

/// How the object at an address is requested.
pub(crate) fn source_at(url: &ObjectUrl, options: &Options) -> Result<Source, ObjectError> {
    Ok(Source::new(url, Arc::new(Store::open(url)?), options.retry))
}
