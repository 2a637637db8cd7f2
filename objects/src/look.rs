//! The first requests for an object. One round trip brings the first and the last MiB.

use std::ops::Range;
use std::sync::Arc;

use futures_util::future::try_join_all;
use object_store::GetRange;

use crate::cache::BLOCK_BYTES;
use crate::error::ObjectError;
use crate::fetch::{Identity, Source};
use crate::name::Name;
use crate::oci::{Layer, Manifest};
use crate::options::Options;
use crate::remote::RemoteObject;
use crate::url::{ObjectUrl, Scheme};

/// The bytes at each end of an object that the first answers contain. The front has the header and the chunks that
/// `snap optimize` puts there. The end has the index of up to 400 MiB of memory in use, and all that is read to open
/// it.
pub(crate) const END_BYTES: u64 = 1 << 20;

/// An object, or a name.
pub(crate) enum Looked {
    Object(RemoteObject),
    Name(Source, Name),
}

/// Opens an object, or reads a name.
pub(crate) async fn first_look(source: Source, options: &Options) -> Result<Looked, ObjectError> {
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
    Ok((try_join_all(blobs).await?, source.url.with_digest(&found.etag)?))
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
        object.source().range(object.identity(), range, &mut on_bytes).await?;
        Ok::<_, ObjectError>((start, bytes))
    };
    let tail = len.saturating_sub(END_BYTES + BLOCK_BYTES)..len;
    let (head, tail) = futures_util::try_join!(part(0..END_BYTES.min(len)), part(tail))?;
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
