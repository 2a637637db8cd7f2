//! Opens a snapshot in a bucket or registry.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;

use snapfmt::{Header, ReadError, Snapshot, Storage};

use crate::cancel::{Cancelled, unless_cancelled};
use crate::ends::end_of_chunks;
use crate::error::ObjectError;
use crate::lineage::{Lineage, Trust, chain, parents_of_file, source_at};
use crate::name;
use crate::options::Options;
use crate::remote::RemoteObject;
use crate::runtime;
use crate::url::ObjectUrl;

/// A snapshot in a bucket.
pub struct Opened {
    /// The snapshot, with all of its layers.
    pub snapshot: Snapshot,
    /// Its objects, the top one first.
    pub objects: Vec<RemoteObject>,
}

/// Opens the snapshot at an address: that of an object, or a name that a push has written. The parents of a layer are
/// in the same folder of the same bucket, or at the address that the layer has for them, if that is in the same bucket or
/// repository or in [`Options::parents_from`].
///
/// # Errors
/// [`ObjectError`]
pub fn open(url: &ObjectUrl, options: &Options) -> Result<Opened, ObjectError> {
    let trust = if options.asks_server { Trust::Server } else { Trust::Ids };
    open_unless(url, options, trust, &|| ControlFlow::Continue(()))
}

/// As [`open`]. The caller may cancel while a server does not answer.
pub(crate) fn open_unless(
    url: &ObjectUrl,
    options: &Options,
    trust: Trust,
    cancelled: Cancelled<'_>,
) -> Result<Opened, ObjectError> {
    let source = source_at(url, options)?;
    let lineage = |trust| {
        let chain = chain(source.clone(), trust, options);
        runtime::wait(unless_cancelled(cancelled, chain)).map_err(ObjectError::Runtime)??
    };
    let found = lineage(trust)?;
    let by_id = found.objects.iter().any(|object| name::id_of(object.url()).is_some());
    match opened(url, found, options) {
        // The cache may have another object than the one with that id.
        Err(_) if by_id && trust == Trust::Ids => opened(url, lineage(Trust::Server)?, options),
        opened => opened,
    }
}

fn opened(url: &ObjectUrl, lineage: Lineage, options: &Options) -> Result<Opened, ObjectError> {
    let wrong = |of: &ObjectUrl, reason: &str| ObjectError::Name {
        url: of.to_string(),
        reason: reason.to_owned(),
    };
    let snapshot = Snapshot::named_chain_with(lineage.layers(), options.keys.clone())
        .map_err(|error| ObjectError::Snapshot { name: url.to_string(), error })?;
    let objects = lineage.objects;
    let id_is_wrong = |(object, header): &(&RemoteObject, &Header)| {
        name::id_of(object.url()).is_some_and(|id| !id.eq_ignore_ascii_case(&header.id.to_string()))
    };
    if let Some((object, _)) = objects.iter().zip(snapshot.headers()).find(id_is_wrong) {
        return Err(wrong(object.url(), "the id in its address is of another snapshot"));
    }
    if let Some((of, name)) = &lineage.list {
        let same = snapshot.headers().zip(&name.layers).all(|(header, layer)| {
            (header.id.to_string(), header.crc) == (layer.id.clone(), layer.header_crc)
        });
        if !same {
            return Err(wrong(of, "its objects are not the snapshots that it lists"));
        }
    }
    if let Some(top) = objects.first() {
        top.request_before(end_of_chunks(&snapshot));
    }
    Ok(Opened { snapshot, objects })
}

/// Opens a layer in a file whose parents are objects: those in the folder `objects` beside `name`, or at the address that
/// the layer has for its parent. That must be in [`Options::parents_from`], or in the bucket or repository of `name`.
///
/// # Errors
/// [`ObjectError`]
pub fn open_over(
    file: &Path,
    name: Option<&ObjectUrl>,
    options: &Options,
) -> Result<Snapshot, ObjectError> {
    let shown = file.display().to_string();
    let failed = |error| ObjectError::Snapshot { name: shown.clone(), error };
    let open = || {
        let open = File::open(file);
        open.map_err(|source| ReadError::Open { path: file.to_owned(), source }).map_err(failed)
    };
    let keys = options.keys.clone();
    let hint = Snapshot::parent_hint_of(Storage::from(open()?), keys.as_deref()).map_err(failed)?;
    let parents = match &hint {
        Some(hint) => runtime::wait(parents_of_file(&shown, hint, name, options))
            .map_err(ObjectError::Runtime)??,
        None => None,
    };
    let named = [(Storage::from(open()?), file.to_owned())];
    let layers = named.into_iter().chain(parents.iter().flat_map(Lineage::layers));
    Snapshot::named_chain_with(layers, keys).map_err(failed)
}
