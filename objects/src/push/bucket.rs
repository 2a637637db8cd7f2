//! Pushes a snapshot to a bucket: an object for each file, and an object that is its name.

use bytes::Bytes;
use snapfmt::layout::HEADER_BYTES;
use snapfmt::{Header, OnProgress, Progress, Snapshot};

use super::file::{File, unreadable};
use super::name::{give_name, holds};
use super::outcome::{Pushed, PushedLayer};
use crate::cancel::unless_cancelled;
use crate::ends::Ends;
use crate::error::ObjectError;
use crate::fetch::Source;
use crate::name::{LayerName, Name};

pub(super) async fn push_all(
    snapshot: &Snapshot,
    name: &Source,
    replace: bool,
    progress: OnProgress<'_>,
) -> Result<Pushed, ObjectError> {
    let layer_name = |header: &Header| LayerName {
        id: header.id.to_string(),
        header_crc: header.crc,
        file_bytes: header.file_bytes,
    };
    let named = Name::new(snapshot.headers().map(layer_name).collect());
    let content = Bytes::from(named.clone().encode(None));
    let total_bytes = snapshot.headers().map(|header| header.file_bytes).sum();
    let mut done_bytes = 0;
    let begun = || progress(Progress::new(0, total_bytes));
    // This is checked before the upload, which may take hours.
    if !replace && unless_cancelled(&begun, holds(name, &content)).await?? == Some(false) {
        return Err(ObjectError::NameTaken { url: name.url.to_string() });
    }
    let (mut layers, mut etag) = (Vec::new(), None);
    let files: Vec<_> = snapshot.headers().zip(snapshot.storages()).zip(&named.layers).collect();
    for (at, ((header, storage), layer)) in files.into_iter().enumerate().rev() {
        let to = Source { url: name.url.beside(&layer.key())?, ..name.clone() };
        let file = File::of(header, storage, &to.url)?;
        let before = done_bytes;
        let progress_of = |bytes| progress(Progress::new(before + bytes, total_bytes));
        etag = unless_cancelled(&|| progress_of(0), file.is_at(&to)).await??;
        let was_there = etag.is_some();
        if !was_there {
            // Before the object, so that each object that is complete has its list.
            if at + 1 < named.layers.len() {
                let list = Bytes::from(Name::new(named.layers[at..].to_vec()).encode(None));
                let to = Source { url: name.url.beside(&layer.list_key())?, ..name.clone() };
                unless_cancelled(&|| progress_of(0), give_name(&to, list, true)).await??;
            }
            etag = file.upload(&to, &progress_of).await?;
        }
        done_bytes += header.file_bytes;
        if progress(Progress::new(done_bytes, total_bytes)).is_break() {
            return Err(ObjectError::Cancelled);
        }
        layers.push(PushedLayer { url: to.url, file_bytes: header.file_bytes, was_there });
    }
    layers.reverse();
    let all = || progress(Progress::new(total_bytes, total_bytes));
    // The last object is that of the snapshot.
    let ends = etag.map(|etag| Ends::read(snapshot, etag)).transpose();
    let ends = ends.map_err(|error| unreadable(&name.url, 0, HEADER_BYTES, error))?;
    let content = Bytes::from(named.encode(ends));
    unless_cancelled(&all, give_name(name, content, replace)).await??;
    Ok(Pushed { layers })
}
