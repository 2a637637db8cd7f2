//! Writing a guest's memory and state to one file. The file appears complete or not at all.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::Path;

use uuid::Uuid;

use crate::codec::Compressor;
use crate::contents::{Contents, WriteOptions};
use crate::dedupe::Dedupe;
use crate::error::{ChainError, WriteError};
use crate::file_builder::FileBuilder;
use crate::header::Header;
use crate::hot::{self, HotPages};
use crate::layout::{
    MAX_CHUNK_PAGES, MAX_PARENT_HINT_BYTES, MAX_SEALED_PARENT_HINT_BYTES, MAX_SECTIONS,
    MAX_STATE_BYTES, PAGE_BYTES,
};
use crate::memory_map;
use crate::metadata::Metadata;
use crate::ordered;
use crate::output::Output;
use crate::pack::{LeafTasks, PackedLeaf, Packer};
use crate::parent::Parent;
use crate::progress::{OnProgress, Progress};
use crate::seal::Seal;
use crate::section::SectionKind;

/// Writes a snapshot to `path`. Returns its header and its metadata as written.
///
/// Memory in use: about 3 x 4 MiB a thread, and 4 KiB for every 2 MiB of memory that is not all
/// zero. To find equal pages: 20 MiB at most, or 60 MiB of memory that is read once.
///
/// # Errors
/// [`WriteError`]; then `path` is unchanged.
pub fn write_snapshot(
    path: impl AsRef<Path>,
    contents: Contents<'_>,
    options: &WriteOptions,
    progress: OnProgress<'_>,
) -> Result<(Header, Metadata), WriteError> {
    write(path.as_ref(), contents, None, None, options, progress)
}

/// Writes a layer to `path`: only the pages that differ from `parent`. Returns its header and
/// its metadata as written. Only the ranges of `contents.data` are read and compared; all other
/// pages are as in the parent.
///
/// # Errors
/// As [`write_snapshot`]; also when the parent cannot be read or has other memory regions.
pub fn write_layer(
    path: impl AsRef<Path>,
    contents: Contents<'_>,
    parent: &Parent<'_>,
    options: &WriteOptions,
    progress: OnProgress<'_>,
) -> Result<(Header, Metadata), WriteError> {
    check_regions(&contents, Some(parent))?;
    write(path.as_ref(), contents, Some(parent), None, options, progress)
}

/// Writes a snapshot, or with a parent a layer, with a working set. It may put the pages of the set at the front: see
/// [`HotPages`].
///
/// # Errors
/// As [`write_snapshot`] and [`write_layer`]; also when the set has pages beyond memory.
pub fn write_with_set(
    path: impl AsRef<Path>,
    contents: Contents<'_>,
    parent: Option<&Parent<'_>>,
    hot: &HotPages<'_>,
    options: &WriteOptions,
    progress: OnProgress<'_>,
) -> Result<(Header, Metadata), WriteError> {
    check_regions(&contents, parent)?;
    write(path.as_ref(), contents, parent, Some(hot), options, progress)
}

fn write(
    path: &Path,
    contents: Contents<'_>,
    parent: Option<&Parent<'_>>,
    hot: Option<&HotPages<'_>>,
    options: &WriteOptions,
    progress: OnProgress<'_>,
) -> Result<(Header, Metadata), WriteError> {
    let memory_bytes = memory_map::validate(contents.regions)?;
    check_limits(&contents, parent, options)?;
    let id = Uuid::new_v4();
    let seal = options.seal.as_deref().map(|keys| Seal::create(keys, id)).transpose()?;
    let mut output = Output::create(path, options.existing)?;
    let mut file = FileBuilder::new(&mut output, id, seal.as_ref(), parent);
    let binding = file.binding();

    let tasks = LeafTasks::new(contents.data, memory_bytes);
    let dedupe = options.dedupe.then(|| match contents.read_once {
        None => Dedupe::comparing(),
        Some(_) => Dedupe::read_once(),
    });
    let packer = |codec| {
        let compressor = Compressor::new(codec, options.level)?;
        let (dedupe, parent) = (dedupe.as_ref(), parent.map(|parent| parent.pages));
        let chunk_pages = options.chunk_pages;
        Ok(Packer::new(contents.memory, compressor, chunk_pages, binding, dedupe, parent))
    };
    let front = hot::front(hot, &tasks, memory_bytes)?;
    let hot_bytes = front.pages.len() as u64 * PAGE_BYTES as u64;
    let total_bytes = tasks.total_bytes() + hot_bytes;
    let mut done_bytes = 0;
    let mut report = |bytes| {
        done_bytes += bytes;
        match progress(Progress { done_bytes, total_bytes }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(WriteError::Cancelled),
        }
    };
    file.begin(SectionKind::CHUNKS);
    let hot_tasks = front.tasks(options.chunk_pages);
    ordered::run(
        hot_tasks.len(),
        options.threads,
        || packer(front.codec),
        |packer, task, packed: &mut PackedLeaf| packer.pack_pages(task, &hot_tasks[task], packed),
        |packed| {
            file.append_hot(packed)?;
            report((packed.pages.len() * PAGE_BYTES) as u64)
        },
    )?;
    let skip: HashSet<_> = front.pages.iter().copied().collect();
    ordered::run(
        tasks.len(),
        options.threads,
        || packer(options.codec).map(|packer| packer.skipping(&skip)),
        |packer, task, (packed, read_bytes): &mut (PackedLeaf, u64)| {
            *read_bytes = packer.pack(hot_tasks.len() + task, &tasks, task, packed)?;
            Ok(())
        },
        |(packed, read_bytes)| {
            file.append_leaf(packed)?;
            report(*read_bytes)
        },
    )?;
    file.end(0);
    if let Some(check) = contents.read_once {
        check().map_err(|source| WriteError::Inconsistent { source })?;
    }
    file.working_set = hot.map(|hot| hot.set.encode());

    let mut metadata = contents.metadata;
    metadata.storage = file.storage();
    let header =
        file.finish(contents.regions, memory_bytes, contents.states, &metadata, options)?;
    output.publish()?;
    Ok((header, metadata))
}

/// A layer has the memory map of its parent.
pub(crate) fn check_regions(
    contents: &Contents<'_>,
    parent: Option<&Parent<'_>>,
) -> Result<(), WriteError> {
    match parent {
        Some(parent) if contents.regions != parent.regions => {
            Err(WriteError::Parent(ChainError::MemoryMap { id: parent.hint.id }.into()))
        }
        _ => Ok(()),
    }
}

pub(crate) fn check_limits(
    contents: &Contents<'_>,
    parent: Option<&Parent<'_>>,
    options: &WriteOptions,
) -> Result<(), WriteError> {
    let limit = |what, min, max, found: usize| match (min..=max).contains(&(found as u64)) {
        true => Ok(()),
        false => Err(WriteError::Limit { what, min, max, found: found as u64 }),
    };
    limit("pages per chunk", 1, MAX_CHUNK_PAGES as u64, options.chunk_pages)?;
    let others = 7 + u64::from(options.seal.is_some());
    limit("the number of states", 0, MAX_SECTIONS as u64 - others, contents.states.len())?;
    let hint_bytes = parent.map_or(0, |parent| parent.hint.encode().len());
    limit(
        "the length of the parent's path",
        0,
        most_hint_bytes(options.seal.is_some()),
        hint_bytes,
    )?;
    let parent_is_sealed = parent.is_some_and(|parent| parent.hint.header_hash.is_some());
    if parent.is_some() && parent_is_sealed != options.seal.is_some() {
        return Err(WriteError::ParentSeal { parent_is_sealed });
    }
    for state in contents.states {
        limit("the length of a state", 0, MAX_STATE_BYTES, state.bytes.len())?;
    }
    Ok(())
}

/// Most bytes of a parent hint.
pub(crate) fn most_hint_bytes(sealed: bool) -> u64 {
    if sealed { MAX_SEALED_PARENT_HINT_BYTES } else { MAX_PARENT_HINT_BYTES }
}
