//! The first requests for the objects of a registry.

use std::ops::Range;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use object_store::GetRange;

use crate::ends::{FRONT_BYTES, SUFFIX_BYTES};
use crate::error::ObjectError;
use crate::fetch::{Identity, Source};
use crate::look::LAYERS;
use crate::name::Name;
use crate::oci::{Layer, Manifest};
use crate::options::Options;
use crate::remote::RemoteObject;
use crate::url::ObjectUrl;

/// The objects of a chain in a registry. Its manifest gives their digests and lengths, so they stay the same also when
/// the tag is given to another manifest. Also returns the address of the manifest by its digest.
pub(crate) async fn all_blobs(
    source: &Source,
    options: &Options,
) -> Result<(Vec<RemoteObject>, ObjectUrl), ObjectError> {
    let (found, _, bytes) = source.first(GetRange::Offset(0)).await?;
    let manifest = Manifest::parse(&bytes)
        .map_err(|reason| ObjectError::Name { url: source.url.to_string(), reason })?;
    let blobs = manifest.layers.into_iter().map(|layer| blob(source, layer, options));
    let objects = stream::iter(blobs).buffered(LAYERS).try_collect().await?;
    Ok((objects, source.url.with_digest(&found.etag)?))
}

async fn blob(
    manifest: &Source,
    layer: Layer,
    options: &Options,
) -> Result<RemoteObject, ObjectError> {
    let source = Source { url: manifest.url.with_digest(&layer.digest)?, ..manifest.clone() };
    let len = layer.len_bytes;
    let identity = Identity { etag: layer.digest, len_bytes: len, version: None };
    let object = RemoteObject::new(source, identity, Arc::clone(&options.cache))?;
    if object.has_ends() {
        return Ok(object);
    }
    let part = |range: Range<u64>| async {
        let (mut bytes, start) = (Vec::new(), range.start);
        let mut on_bytes = |part| bytes.extend(part);
        object.source().range(&object.identity().expected(), range, &mut on_bytes).await?;
        Ok::<_, ObjectError>((start, bytes))
    };
    let tail = len.saturating_sub(SUFFIX_BYTES)..len;
    let (head, tail) = futures_util::try_join!(part(0..FRONT_BYTES.min(len)), part(tail))?;
    tokio::task::block_in_place(|| {
        object.fill(head.0, &head.1);
        object.fill(tail.0, &tail.1);
    });
    Ok(object)
}

/// Opens the blob with the digest of an address. `None`: it may be the digest of a manifest. The blob is requested
/// first, because a registry may answer a request for a manifest that is none with a temporary error.
pub(crate) async fn one_blob(
    source: &Source,
    options: &Options,
) -> Result<Option<RemoteObject>, ObjectError> {
    let (identity, start, bytes) = match source.first(GetRange::Bounded(0..FRONT_BYTES)).await {
        // Some registries give a manifest as a blob, too.
        Ok(found) if Name::is_meant(&found.2) => return Ok(None),
        Err(ObjectError::NotFound { .. }) => return Ok(None),
        found => found?,
    };
    let object = RemoteObject::new(source.clone(), identity, Arc::clone(&options.cache))?;
    tokio::task::block_in_place(|| object.fill(start, &bytes));
    Ok(Some(object))
}
