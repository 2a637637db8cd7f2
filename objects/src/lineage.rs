//! The objects of a layer and its parents.

use std::sync::Arc;

use futures_util::future::try_join_all;
use snapfmt::{ParentHint, Snapshot};

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

/// The objects of a chain, and the name that lists them.
pub(crate) async fn chain(
    top: Source,
    options: &Options,
) -> Result<(Vec<RemoteObject>, Option<Name>), ObjectError> {
    let (top, name) = match look(top.clone(), options).await? {
        None => return Ok((all_blobs(&top, options).await?, None)),
        Some(Looked::Object(object)) => return Ok((parents(object, options).await?, None)),
        Some(Looked::Name(source, name)) => (source, name),
    };
    let layers = name.layers.iter().map(|layer| async {
        let source = Source { url: top.url.beside(&layer.key())?, ..top.clone() };
        object(first_look(source, options).await?)
    });
    Ok((try_join_all(layers).await?, Some(name)))
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
        let Some(parent) = parent(last, &hint, options).await? else { break };
        let is_loop = objects.iter().any(|object| object.url() == parent.url());
        if is_loop || objects.len() == MOST_LAYERS {
            break;
        }
        objects.push(parent);
    }
    Ok(objects)
}

/// The parent of an object: in the same folder by its id, or else at the address that the object has for it. `None`: it
/// has none.
async fn parent(
    child: &RemoteObject,
    hint: &ParentHint,
    options: &Options,
) -> Result<Option<RemoteObject>, ObjectError> {
    let address = address_in(hint);
    if child.url().scheme() != Scheme::Oci {
        let url = child.url().beside(&file_name(hint.id))?;
        let source = Source { url, ..child.source().clone() };
        match first_look(source, options).await {
            Err(ObjectError::NotFound { .. }) if address.is_some() => {}
            looked => return object(looked?).map(Some),
        }
    }
    let Some(url) = address else { return Ok(None) };
    check_place(&child.url().to_string(), Some(child.url()), &url, options)?;
    look(source_at(&url, options)?, options).await?.map(object).transpose()
}

/// The parent of a layer in a file, and its parents: in the folder `objects` beside `name`, or else at the address that
/// the layer has for it.
pub(crate) async fn parents_of_file(
    layer: &str,
    hint: &ParentHint,
    name: Option<&ObjectUrl>,
    options: &Options,
) -> Result<Vec<RemoteObject>, ObjectError> {
    let address = address_in(hint);
    if let Some(name) = name.filter(|name| name.scheme() != Scheme::Oci) {
        let url = name.beside(&format!("objects/{}", file_name(hint.id)))?;
        match chain(source_at(&url, options)?, options).await {
            Err(ObjectError::NotFound { .. }) if address.is_some() => {}
            found => return Ok(found?.0),
        }
    }
    let Some(url) = address else { return Ok(Vec::new()) };
    check_place(layer, name, &url, options)?;
    Ok(chain(source_at(&url, options)?, options).await?.0)
}

/// How the object at an address is requested.
pub(crate) fn source_at(url: &ObjectUrl, options: &Options) -> Result<Source, ObjectError> {
    Ok(Source::new(url, Arc::new(Store::open(url)?), options.retry))
}
