//! Copying a snapshot to another file with another working set. Chunks are copied byte for byte, and of a file that is not
//! sealed the index, too.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{Part, ReadError, WriteError};
use crate::file_builder::{self, FileBuilder};
use crate::index::IndexBuilder;
use crate::layer::Layer;
use crate::layout::{CHUNK_ALIGN, MAX_SECTIONS, MAX_STATE_BYTES, PAGE_BYTES};
use crate::metadata::Metadata;
use crate::output::{Existing, Output};
use crate::parent::ParentHint;
use crate::progress::{OnProgress, Progress};
use crate::read_at::ReadAt;
use crate::seal::Seal;
use crate::section::{Section, SectionKind};
use crate::snapshot::Snapshot;
use crate::working_set::WorkingSet;
use crate::writer;

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

/// Bytes that are read and written at a time.
const BLOCK_BYTES: u64 = 1 << 20;
/// Bytes that the kernel copies at a time: a copy can be interrupted in between.
const KERNEL_BLOCK_BYTES: u64 = 64 << 20;

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
    changes.working_set.check(snapshot.header().pages())?;
    let mut hint = snapshot.parent_hint().map_err(WriteError::Original)?;
    if let (Some(hint), Some(path)) = (&mut hint, &changes.parent_path) {
        hint.path.clone_from(path);
    }
    let id = Uuid::new_v4();
    let copy = Copy {
        snapshot,
        id,
        seal: snapshot.layers[0].seal.as_ref().map(|seal| seal.of_copy(id)),
        metadata: file_builder::encoded(&changes.metadata)?,
        working_set: Some(changes.working_set.encode()),
        hint,
        existing: changes.existing,
    };
    copy.write(path.as_ref(), progress)
}

/// A copy of a snapshot's file, with the same chunks at the same offsets, and what differs in it.
pub(crate) struct Copy<'a, R> {
    pub(crate) snapshot: &'a Snapshot<R>,
    pub(crate) id: Uuid,
    pub(crate) seal: Option<Seal>,
    pub(crate) metadata: Vec<u8>,
    pub(crate) working_set: Option<Vec<u8>>,
    pub(crate) hint: Option<ParentHint>,
    pub(crate) existing: Existing,
}

impl<R: ReadAt> Copy<'_, R> {
    pub(crate) fn write(
        self,
        path: &Path,
        progress: OnProgress<'_>,
    ) -> Result<crate::Header, WriteError> {
        self.check_hint()?;
        let original = &self.snapshot.layers[0];
        let mut output = Output::create(path, self.existing)?;
        let mut file = FileBuilder::new(&mut output, self.id, self.seal.as_ref(), None);
        let total_bytes = original.header.file_bytes;
        let mut done_bytes = 0;
        let report = &mut |bytes| {
            done_bytes += bytes;
            match progress(Progress { done_bytes, total_bytes }) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(WriteError::Cancelled),
            }
        };
        // Entries and chunks contain the offsets of chunks, so the offsets stay.
        let mut others = Vec::new();
        for section in self.snapshot.sections() {
            match section.kind {
                SectionKind::CHUNKS => {
                    file.offset = section.offset;
                    copy_section(&original.storage, &mut file, section, report)?;
                }
                SectionKind::METADATA | SectionKind::WORKING_SET | SectionKind::PARENT_HINT => {}
                _ => others.push(*section),
            }
        }
        if self.seal.is_some() {
            reseal(original, &others, &mut file)?;
            others.clear();
        }
        for section in others {
            let leaves = section.kind == SectionKind::INDEX_LEAVES;
            file.align(if leaves { PAGE_BYTES } else { CHUNK_ALIGN })?;
            copy_section(&original.storage, &mut file, &section, report)?;
        }
        file.section(SectionKind::METADATA, 0, 0, self.metadata)?;
        if let Some(set) = self.working_set {
            file.section(SectionKind::WORKING_SET, 0, 0, set)?;
        }
        let parent_id = self.hint.as_ref().map(|hint| hint.id);
        if let Some(hint) = self.hint {
            file.section(SectionKind::PARENT_HINT, 0, 0, hint.encode())?;
        }
        let found = (file.sections.len() + usize::from(self.seal.is_some())) as u64;
        if found > MAX_SECTIONS as u64 {
            let (what, max) = ("the number of sections", MAX_SECTIONS as u64);
            return Err(WriteError::Limit { what, min: 1, max, found });
        }
        // The chunks were not checked, so that chunks of another file would not be detected.
        original.unchanged().map_err(WriteError::Original)?;
        let header = file.close(crate::Header { parent_id, ..original.header.clone() })?;
        output.publish()?;
        Ok(header)
    }

    fn check_hint(&self) -> Result<(), WriteError> {
        let Some(hint) = &self.hint else { return Ok(()) };
        let found = hint.encode().len() as u64;
        let max = writer::most_hint_bytes(hint.header_hash.is_some());
        if found > max {
            let what = "the length of the parent's path";
            return Err(WriteError::Limit { what, min: 0, max, found });
        }
        Ok(())
    }
}

/// Copies the bytes of a section to the end of the file, by the kernel if that is possible.
fn copy_section(
    storage: &dyn ReadAt,
    file: &mut FileBuilder<'_>,
    section: &Section,
    report: &mut dyn FnMut(u64) -> Result<(), WriteError>,
) -> Result<(), WriteError> {
    file.sections.push(Section { offset: file.offset, ..*section });
    let mut at = section.offset;
    if let Some(from) = storage.file_to_copy() {
        while at < section.end() {
            let copied = file.copy_from(from, at..section.end().min(at + KERNEL_BLOCK_BYTES));
            if copied == 0 {
                break;
            }
            at += copied;
            report(copied)?;
        }
    }
    let mut block = vec![0; (section.end() - at).min(BLOCK_BYTES) as usize];
    while at < section.end() {
        let block = &mut block[..(section.end() - at).min(BLOCK_BYTES) as usize];
        let part = Part::Section(section.kind);
        storage
            .read_exact_at(block, at)
            .map_err(|source| ReadError::io(part, at, block.len() as u64, source))
            .map_err(WriteError::Original)?;
        file.append(block)?;
        at += block.len() as u64;
        report(block.len() as u64)?;
    }
    Ok(())
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
