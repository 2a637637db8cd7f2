//! Opens a snapshot in a bucket or registry.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;

use snapfmt::{ReadError, Snapshot, Storage};

use crate::cancel::{Cancelled, unless_cancelled};
use crate::error::ObjectError;
use crate::lineage::{Lineage, chain, parents_of_file, source_at};
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
    open_unless(url, options, &|| ControlFlow::Continue(()))
}

/// As [`open`]. The caller may cancel while a server does not answer.
pub(crate) fn open_unless(
    url: &ObjectUrl,
    options: &Options,
    cancelled: Cancelled<'_>,
) -> Result<Opened, ObjectError> {
    let chain = chain(source_at(url, options)?, options);
    let opened = runtime::wait(unless_cancelled(cancelled, chain));
    let lineage = opened.map_err(ObjectError::Runtime)???;
    let snapshot = Snapshot::named_chain(lineage.layers())
        .map_err(|error| ObjectError::Snapshot { name: url.to_string(), error })?;
    if let Some(name) = &lineage.name {
        let same = snapshot.headers().zip(&name.layers).all(|(header, layer)| {
            (header.id.to_string(), header.crc) == (layer.id.clone(), layer.header_crc)
        });
        if !same {
            let reason = "its objects are not the snapshots that it lists".to_owned();
            return Err(ObjectError::Name { url: url.to_string(), reason });
        }
    }
    Ok(Opened { snapshot, objects: lineage.objects })
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
    let hint = Snapshot::parent_hint_of(Storage::from(open()?)).map_err(failed)?;
    let parents = match &hint {
        Some(hint) => runtime::wait(parents_of_file(&shown, hint, name, options))
            .map_err(ObjectError::Runtime)??,
        None => None,
    };
    let named = [(Storage::from(open()?), file.to_owned())];
    Snapshot::named_chain(named.into_iter().chain(parents.iter().flat_map(Lineage::layers)))
        .map_err(failed)
}
