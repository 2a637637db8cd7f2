//! A copy of a sealed snapshot that other keys open. The file key stays, and with it the chunks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::copy::Copy;
use crate::error::{ChainError, Part, ReadError, WriteError};
use crate::file_builder;
use crate::layout::HEADER_BYTES;
use crate::metadata::Metadata;
use crate::output::Existing;
use crate::parent::ParentHint;
use crate::progress::OnProgress;
use crate::read_at::ReadAt;
use crate::seal::{KeyProvider, Parts, Seal};
use crate::snapshot::Snapshot;

/// Which keys open the copy: see [`rekey_snapshot`].
#[derive(Clone)]
#[non_exhaustive]
pub struct Rekey<'a> {
    /// The slots of the original that the copy has too, counted from 1.
    pub keep: Vec<usize>,
    /// Who wraps the file key for the copy's other slots.
    pub add: Vec<Arc<dyn KeyProvider>>,
    /// The metadata of the copy.
    pub metadata: Metadata,
    /// For a layer: a copy of its parent that is to be the parent of the layer's copy, and the path of it that the layer
    /// stores. With `None` it is the parent of the original.
    pub parent: Option<(&'a dyn ReadAt, PathBuf)>,
    /// What to do with a file that is already there.
    pub existing: Existing,
}

impl<'a> Rekey<'a> {
    /// Only the keys of these providers open the copy.
    #[must_use]
    pub fn new(add: Vec<Arc<dyn KeyProvider>>, metadata: Metadata) -> Self {
        Self { keep: Vec::new(), add, metadata, parent: None, existing: Existing::Keep }
    }

    /// Sets [`Rekey::keep`].
    #[must_use]
    pub fn keep(mut self, keep: Vec<usize>) -> Self {
        self.keep = keep;
        self
    }

    /// Sets [`Rekey::parent`].
    #[must_use]
    pub fn parent(mut self, parent: Option<(&'a dyn ReadAt, PathBuf)>) -> Self {
        self.parent = parent;
        self
    }

    /// Sets [`Rekey::existing`].
    #[must_use]
    pub fn existing(mut self, existing: Existing) -> Self {
        self.existing = existing;
        self
    }
}

/// Copies the file of a sealed snapshot (of a chain the top one) to `path`, so that other keys open the copy. The copy has
/// the same file key, and so the same chunks, which are not decoded. It has a new id; all other parts are encrypted again.
///
/// Whoever has opened the original may have kept the file key, which opens the copy too.
///
/// # Errors
/// [`WriteError`]; then nothing new is at `path`. [`WriteError::Original`] with [`ReadError::NotSealed`] if the snapshot is
/// not sealed.
pub fn rekey_snapshot<R: ReadAt>(
    path: impl AsRef<Path>,
    snapshot: &Snapshot<R>,
    rekey: &Rekey<'_>,
    progress: OnProgress<'_>,
) -> Result<crate::Header, WriteError> {
    let original = &snapshot.layers[0];
    let Some(seal) = &original.seal else {
        return Err(WriteError::Original(ReadError::NotSealed));
    };
    let mut hint = snapshot.parent_hint().map_err(WriteError::Original)?;
    if let (Some(hint), Some((storage, path))) = (&mut hint, &rekey.parent) {
        let parent = snapshot.layers.get(1).and_then(|parent| parent.seal.as_ref());
        *hint = hint_of(*storage, path, hint.id, parent)?;
    }
    let id = Uuid::new_v4();
    let working_set = snapshot.working_set().map_err(WriteError::Original)?;
    let copy = Copy {
        snapshot,
        id,
        seal: Some(seal.of_rekeyed_copy(id, &rekey.keep, &rekey.add)?),
        metadata: file_builder::encoded(&rekey.metadata)?,
        working_set: working_set.map(|set| set.encode()),
        hint,
        existing: rekey.existing,
    };
    copy.write(path.as_ref(), progress)
}

/// What a layer stores about a copy of its parent, whose keys are `parent`.
fn hint_of(
    storage: &dyn ReadAt,
    path: &Path,
    expected: Uuid,
    parent: Option<&Seal>,
) -> Result<ParentHint, WriteError> {
    let Some(parent) = parent else {
        let error = ChainError::ParentNeeded { id: expected };
        return Err(WriteError::Parent(error.into()));
    };
    let failed = |source| ReadError::io(Part::Header, 0, HEADER_BYTES as u64, source);
    let read = || {
        let parts = Parts::read(storage, storage.len_bytes().map_err(failed)?)?;
        let is_copy = parts.is_copy_of(storage, parent)?;
        Ok((parts.header, is_copy))
    };
    let (header, is_copy) = read().map_err(WriteError::Parent)?;
    if !is_copy {
        return Err(WriteError::OtherParent { expected, found: header.id });
    }
    let (id, header_crc, header_hash) = (header.id, header.crc, header.hash);
    Ok(ParentHint { id, header_crc, header_hash, path: path.to_owned() })
}
