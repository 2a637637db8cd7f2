//! The first look at an object: whether it is a snapshot or a name, and which version of it is there. The answers also
//! contain both ends of it, which are all that is read to open a snapshot.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::try_join_all;
use object_store::GetRange;

use crate::cache::{BLOCK_BYTES, Cache, Turn};
use crate::ends::{END_BYTES, FRONT_BYTES, SUFFIX_BYTES};
use crate::error::ObjectError;
use crate::fetch::{Identity, Source};
use crate::fetcher::{LOOK_AGAIN, OTHERS};
use crate::name::{self, Name};
use crate::remote::RemoteObject;
use crate::url::Scheme;

/// Enough to distinguish a snapshot from a name, and for a name of 25 layers.
const PEEK_BYTES: u64 = 4096;

/// The limit of layers that are opened at the same time. Each has up to two requests under way.
pub(crate) const LAYERS: usize = 32;

/// What is known of an object before any request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Known {
    /// Its length, from a name. Then no byte is requested twice.
    pub(crate) len_bytes: Option<u64>,
    /// An object with an id in its key never changes. If its ends are cached, no request is sent.
    pub(crate) trusts_ids: bool,
}

/// What is at an address.
pub(crate) enum Looked {
    /// An object that may be a snapshot.
    Object(RemoteObject),
    /// A name.
    Name(Box<Found>),
}

/// A name that was read.
pub(crate) struct Found {
    /// Where it was read.
    pub(crate) source: Source,
    pub(crate) name: Name,
    /// What follows its text: see [`Name::ends`].
    ends_bytes: Bytes,
}

/// Opens an object, or reads a name. One of the processes that do so at the same time fetches the ends of an object.
pub(crate) async fn first_look(
    source: Source,
    known: Known,
    cache: &Arc<Cache>,
) -> Result<Looked, ObjectError> {
    if known.trusts_ids
        && name::id_of(&source.url).is_some()
        && let Some(identity) = cache.last_identity(&source.url)
    {
        let object = RemoteObject::cached(source.clone(), identity, Arc::clone(cache))?;
        if object.has_ends() {
            return Ok(Looked::Object(object));
        }
    }
    let mut turn = cache.turn(&source.url);
    if turn.is_none() {
        if let Some(looked) = look_after_another(&source, cache, &mut turn).await? {
            return Ok(looked);
        }
    } else if cache.knows(&source.url) {
        // One request without a body, if the object is still the one that is cached.
        match source.identity().await {
            Ok(identity) => {
                let object = RemoteObject::new(source.clone(), identity, Arc::clone(cache))?;
                if object.has_ends() {
                    return Ok(Looked::Object(object));
                }
            }
            // A server that only answers GET.
            Err(ObjectError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    fetch_ends(source, known, cache).await
}

/// Waits until another process has stored the ends in the cache. `None`: it has not, or this is a name.
async fn look_after_another(
    source: &Source,
    cache: &Arc<Cache>,
    turn: &mut Option<Turn>,
) -> Result<Option<Looked>, ObjectError> {
    let (identity, _, first_bytes) = source.first(GetRange::Bounded(0..PEEK_BYTES)).await?;
    let is_name = Name::is_meant(&first_bytes);
    if is_name && identity.len_bytes <= PEEK_BYTES {
        return named(source.clone(), first_bytes, identity.len_bytes).map(Some);
    }
    if is_name {
        // The cache has no names.
        return Ok(None);
    }
    let object = RemoteObject::new(source.clone(), identity, Arc::clone(cache))?;
    let started = Instant::now();
    while turn.is_none() && !object.has_ends() && started.elapsed() < OTHERS {
        tokio::time::sleep(LOOK_AGAIN).await;
        *turn = cache.turn(&source.url);
    }
    Ok(object.has_ends().then_some(Looked::Object(object)))
}

/// Fetches the ends of an object, and stores them in the cache.
async fn fetch_ends(
    source: Source,
    known: Known,
    cache: &Arc<Cache>,
) -> Result<Looked, ObjectError> {
    let len_bytes = known.len_bytes;
    let mut parts = ends(&source, len_bytes).await?;
    if !are_of_one_version(&parts) {
        // It was replaced between the two.
        parts = ends(&source, len_bytes).await?;
    }
    let (first, last) = (&parts[0], &parts[parts.len() - 1]);
    if !are_of_one_version(&parts) {
        let (expected, found) = (first.0.etag.clone(), Some(last.0.etag.clone()));
        return Err(ObjectError::Replaced { url: source.url.to_string(), expected, found });
    }
    let identity = first.0.clone();
    if let Some(expected) = len_bytes.filter(|expected| *expected != identity.len_bytes) {
        let (url, found) = (source.url.to_string(), identity.len_bytes);
        return Err(ObjectError::WrongLength { url, expected, found });
    }
    if Name::is_meant(&first.2) {
        let mut bytes = first.2.clone();
        // The two overlap if it is short.
        let (got, start) = (bytes.len() as u64, last.1);
        if let Some(rest) = got.checked_sub(start).and_then(|skip| last.2.get(skip as usize..)) {
            bytes.extend(rest);
        }
        return named(source, bytes, identity.len_bytes);
    }
    let object = RemoteObject::new(source, identity, Arc::clone(cache))?;
    tokio::task::block_in_place(|| {
        parts.iter().for_each(|(_, offset, bytes)| object.fill(*offset, bytes));
    });
    Ok(Looked::Object(object))
}

/// Reads a name.
fn named(source: Source, bytes: Vec<u8>, len_bytes: u64) -> Result<Looked, ObjectError> {
    let (name, ends_bytes) = Name::parse(&bytes, len_bytes)
        .map_err(|reason| ObjectError::Name { url: source.url.to_string(), reason })?;
    let text_bytes = bytes.len() - ends_bytes.len();
    let ends_bytes = Bytes::from(bytes).split_off(text_bytes);
    Ok(Looked::Name(Box::new(Found { source, name, ends_bytes })))
}

impl Found {
    /// Opens the first object of a name without a request: with its ends in the cache, or else with those in the name.
    /// These stay in memory, because the server has not confirmed that they are of this object. `None`: the name has no
    /// ends.
    pub(crate) fn top(&self, cache: &Arc<Cache>) -> Result<Option<RemoteObject>, ObjectError> {
        let (Some(ends), Some(top)) = (&self.name.ends, self.name.layers.first()) else {
            return Ok(None);
        };
        let url = self.source.url.beside(&top.key())?;
        let known = cache.last_identity(&url).filter(|known| known.len_bytes == top.file_bytes);
        let named =
            || Identity { etag: ends.etag.clone(), len_bytes: top.file_bytes, version: None };
        let source = Source { url, ..self.source.clone() };
        let object = RemoteObject::cached(source, known.unwrap_or_else(named), Arc::clone(cache))?;
        if !object.has_ends() {
            object.hold_ends(&self.ends_bytes);
        }
        Ok(Some(object))
    }
}

/// Bytes of an object at an offset, and the version that they are of.
type Part = (Identity, u64, Vec<u8>);

fn are_of_one_version(parts: &[Part]) -> bool {
    parts.windows(2).all(|pair| pair[0].0 == pair[1].0)
}

/// The first and the last bytes of an object, from two requests at the same time, or from one if it is known to be
/// small.
async fn ends(source: &Source, len_bytes: Option<u64>) -> Result<Vec<Part>, ObjectError> {
    if let Some(len) = len_bytes {
        let all = len <= FRONT_BYTES + SUFFIX_BYTES;
        let tail = len.saturating_sub(END_BYTES) / BLOCK_BYTES * BLOCK_BYTES..len;
        let ranges = if all { vec![0..len] } else { vec![0..FRONT_BYTES, tail] };
        let gets = ranges.into_iter().map(|range| source.first(GetRange::Bounded(range)));
        match try_join_all(gets).await {
            // It is shorter. The answers below contain its length.
            Err(ObjectError::Empty { .. }) => {}
            parts => return parts,
        }
    }
    let head = source.first(GetRange::Bounded(0..FRONT_BYTES));
    if source.url.scheme() != Scheme::Az {
        let tail = source.first(GetRange::Suffix(SUFFIX_BYTES));
        let (head, tail) = futures_util::try_join!(head, tail)?;
        return Ok(vec![head, tail]);
    }
    // Azure has no ranges that count from the end.
    let head = head.await?;
    if head.0.len_bytes <= FRONT_BYTES {
        return Ok(vec![head]);
    }
    let start = head.0.len_bytes.saturating_sub(SUFFIX_BYTES);
    let tail = source.first(GetRange::Offset(start)).await?;
    Ok(vec![head, tail])
}
