//! Copying a snapshot to another file with another working set. Chunks and index are copied byte for byte.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Part, ReadError, WriteError};
use crate::index::IndexBuilder;
use crate::layer::Layer;
use crate::layout::{CHUNK_ALIGN, MAX_SECTIONS, MAX_STATE_BYTES, PAGE_BYTES};
use crate::metadata::Metadata;
use crate::output::{Existing, Output};
use crate::parent::ParentHint;
use crate::read_at::ReadAt;
use crate::section::{Section, SectionKind};
use crate::snapshot::Snapshot;
use crate::working_set::WorkingSet;
use crate::writer::{self, FileBuilder, OnProgress, Progress};

/// What differs in the copy of a snapshot: see [`copy_snapshot`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Changes {
    /// The working set of the copy.
    pub working_set: WorkingSet,
    /// The metadata of the copy.
    pub metadata: Metadata,
    /// For a layer: the path of the parent that the copy stores. With `None` it is the path in the original.
    pub parent_path: Option<PathBuf>,
    /// What to do with a file that is already there.
    pub existing: Existing,
}

impl Changes {
    /// Another working set and other metadata.
    #[must_use]
    pub fn new(working_set: WorkingSet, metadata: Metadata) -> Self {
        Self { working_set, metadata, parent_path: None, existing: Existing::Keep }
    }

    /// Sets [`Changes::parent_path`].
    #[must_use]
    pub fn parent_path(mut self, parent_path: impl Into<Option<PathBuf>>) -> Self {
        self.parent_path = parent_path.into();
        self
    }

    /// Sets [`Changes::existing`].
    #[must_use]
    pub fn existing(mut self, existing: Existing) -> Self {
        self.existing = existing;
        self
    }
}

/// Bytes that are copied at a time.
const BLOCK_BYTES: u64 = 1 << 20;

/// Copies the file of a snapshot (of a chain the top one) to `path` with some changes. The copy has a new id. Chunks
/// are copied without a check, so damage stays, and it stays detectable. The chunks keep the id of the snapshot that
/// they were written for, and the header of the copy has that id too. Each chunk has the same offset in both files.
///
/// The copy of a sealed snapshot is sealed with the same keys. Its chunks are those of the original; all other parts are
/// encrypted again, and sections of kinds that this version does not know are left out.
///
/// # Errors
/// [`WriteError`]; then nothing new is at `path`.
pub fn copy_snapshot<R: ReadAt>(
    path: impl AsRef<Path>,
    snapshot: &Snapshot<R>,
    changes: &Changes,
    progress: OnProgress<'_>,
) -> Result<crate::Header, WriteError> {
    let header = snapshot.header().clone();
    changes.working_set.check(header.pages())?;
    let json = writer::encoded(&changes.metadata)?;
    let hint = parent_hint(snapshot, changes)?;

    let id = Uuid::new_v4();
    let seal = snapshot.layers[0].seal.as_ref().map(|seal| seal.of_copy(id));
    let mut output = Output::create(path.as_ref(), changes.existing)?;
    let mut file = FileBuilder::new(&mut output, id, seal.as_ref(), None);
    let storage = snapshot.storage();
    let total_bytes = header.file_bytes;
    let mut done_bytes = 0;
    let mut copy = |file: &mut FileBuilder<'_>, section: &Section| {
        let offset = file.offset;
        file.sections.push(Section { offset, ..*section });
        let mut block = vec![0; section.len.min(BLOCK_BYTES) as usize];
        for at in (section.offset..section.end()).step_by(BLOCK_BYTES as usize) {
            let block = &mut block[..(section.end() - at).min(BLOCK_BYTES) as usize];
            let part = Part::Section(section.kind);
            storage
                .read_exact_at(block, at)
                .map_err(|source| ReadError::io(part, at, block.len() as u64, source))
                .map_err(WriteError::Original)?;
            file.append(block)?;
            done_bytes += block.len() as u64;
            if progress(Progress { done_bytes, total_bytes }) == ControlFlow::Break(()) {
                return Err(WriteError::Cancelled);
            }
        }
        Ok(())
    };
    // Entries and chunks contain the offsets of chunks, so the offsets stay.
    let mut others = Vec::new();
    for section in snapshot.sections() {
        match section.kind {
            SectionKind::CHUNKS => {
                file.offset = section.offset;
                copy(&mut file, section)?;
            }
            SectionKind::METADATA | SectionKind::WORKING_SET | SectionKind::PARENT_HINT => {}
            _ => others.push(*section),
        }
    }
    if seal.is_some() {
        reseal(&snapshot.layers[0], &others, &mut file)?;
        others.clear();
    }
    for section in others {
        let leaves = section.kind == SectionKind::INDEX_LEAVES;
        file.align(if leaves { PAGE_BYTES } else { CHUNK_ALIGN })?;
        copy(&mut file, &section)?;
    }
    file.section(SectionKind::METADATA, 0, 0, json)?;
    file.section(SectionKind::WORKING_SET, 0, 0, changes.working_set.encode())?;
    if let Some(hint) = hint {
        file.section(SectionKind::PARENT_HINT, 0, 0, hint.encode())?;
    }
    let found = (file.sections.len() + usize::from(seal.is_some())) as u64;
    if found > MAX_SECTIONS as u64 {
        let (what, max) = ("the number of sections", MAX_SECTIONS as u64);
        return Err(WriteError::Limit { what, min: 1, max, found });
    }
    // The chunks were not checked, so that chunks of another file would not be detected.
    snapshot.layers[0].unchanged().map_err(WriteError::Original)?;
    let header = file.close(header)?;
    output.publish()?;
    Ok(header)
}

/// Encrypts the index, the memory map and the states of a sealed file for a copy, which has other keys for them.
fn reseal<R: ReadAt>(
    layer: &Layer<R>,
    sections: &[Section],
    file: &mut FileBuilder<'_>,
) -> Result<(), WriteError> {
    let mut index = IndexBuilder::new(layer.index.absent());
    for number in layer.index.leaf_numbers() {
        if let Some(leaf) = layer.leaf(number).map_err(WriteError::Original)? {
            index.push_encoded(number, &leaf);
        }
    }
    file.index(index)?;
    for section in sections {
        let most = match section.kind {
            // The map that was opened.
            SectionKind::MEMORY_MAP => section.len,
            SectionKind::STATE => MAX_STATE_BYTES,
            _ => continue,
        };
        let content = layer.section(section, most).map_err(WriteError::Original)?;
        file.section(section.kind, section.tag, section.version, content)?;
    }
    Ok(())
}

fn parent_hint<R: ReadAt>(
    snapshot: &Snapshot<R>,
    changes: &Changes,
) -> Result<Option<ParentHint>, WriteError> {
    let Some(mut hint) = snapshot.parent_hint().map_err(WriteError::Original)? else {
        return Ok(None);
    };
    if let Some(path) = &changes.parent_path {
        hint.path.clone_from(path);
    }
    let found = hint.encode().len() as u64;
    let max = writer::most_hint_bytes(hint.header_hash.is_some());
    if found > max {
        let what = "the length of the parent's path";
        return Err(WriteError::Limit { what, min: 0, max, found });
    }
    Ok(Some(hint))
}
