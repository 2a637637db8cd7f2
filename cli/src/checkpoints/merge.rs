//! Merges the layers of a chain into one, in the background, so that chains stay short.

use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{PageEntry, PageIndex, Parent, Snapshot, WriteOptions, write_layer};
use snapvm::path_of_parent;

use super::Name;
use crate::commands::Parts;
use crate::input;
use crate::interrupt::Interrupt;
use crate::keys::KeyArgs;

/// A file that has the content of a checkpoint, with the layers below it merged into it.
#[derive(Clone, Debug)]
pub(crate) struct Merged {
    pub(crate) name: Name,
    /// The id of the checkpoint.
    pub(crate) of: String,
}

/// A thread that merges. Dropping it cancels it, and then it leaves no file.
pub(crate) struct Merging {
    cancelled: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Merged>>>,
}

impl Merging {
    /// Begins to merge the checkpoint at `top`, without the lowest `base_depth` files of its chain.
    pub(crate) fn start(
        top: PathBuf,
        base_depth: usize,
        name: Name,
        options: WriteOptions,
        keys: KeyArgs,
        interrupt: Interrupt,
    ) -> Result<Merging> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&cancelled);
        let merge = move || {
            let cancelled = || stop.load(Ordering::Relaxed) || interrupt.requested();
            merge_to_base(&top, base_depth, name, (&options, &keys), &cancelled)
        };
        let thread = std::thread::Builder::new().name("merge".into()).spawn(merge);
        let thread = thread.context("the thread that merges layers cannot be started")?;
        Ok(Merging { cancelled, thread: Some(thread) })
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the file.
    pub(crate) fn finish(mut self) -> Result<Merged> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(merged)) => merged,
            // A panic in the thread has been printed already.
            _ => bail!("the thread that merges layers panicked"),
        }
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its file is of no use any more.
            let _ = thread.join();
        }
    }
}

/// Writes the content of the checkpoint at `top` as one layer on the file from which the guest was restored, which with
/// its parents is the lowest `base_depth` files of the chain; or on the lowest file, if the guest was booted.
fn merge_to_base(
    top: &Path,
    base_depth: usize,
    name: Name,
    (options, keys): (&WriteOptions, &KeyArgs),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Merged> {
    let snapshot = open(top, keys)?;
    let base = snapshot.paths().len().saturating_sub(base_depth.max(1));
    let Some(base_path) = snapshot.paths().nth(base).flatten() else {
        bail!("{}: its base is no file", top.display())
    };
    let onto = open(base_path, keys)?;
    write(
        &snapshot,
        base,
        &onto,
        base_path,
        &top.with_file_name(name.file_name()),
        options,
        cancelled,
    )?;
    Ok(Merged { name, of: snapshot.header().id.to_string() })
}

/// Writes the content of the checkpoint at `top` as a layer on a merged file, which has the content of one of its
/// parents.
pub(crate) fn merge_onto(
    top: &Path,
    merged: &Merged,
    name: Name,
    options: &WriteOptions,
    keys: &KeyArgs,
) -> Result<Merged> {
    let snapshot = open(top, keys)?;
    let onto_path = top.with_file_name(merged.name.file_name());
    let onto = open(&onto_path, keys)?;
    let base = snapshot.headers().position(|header| header.id.to_string() == merged.of);
    let Some(base) = base else { bail!("{} is not on {}", top.display(), onto_path.display()) };
    let out = top.with_file_name(name.file_name());
    write(&snapshot, base, &onto, &onto_path, &out, options, &|| false)?;
    Ok(Merged { name, of: snapshot.header().id.to_string() })
}

fn open(path: &Path, keys: &KeyArgs) -> Result<Snapshot> {
    input::open(path, &keys.clone().into())
}

/// Writes `snapshot` as a layer on `onto`, which has the content of the file number `base` of its chain.
fn write(
    snapshot: &Snapshot,
    base: usize,
    onto: &Snapshot,
    onto_path: &Path,
    out: &Path,
    options: &WriteOptions,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<()> {
    let data = pages_above(snapshot, base, onto)?;
    let memory = snapshot.memory();
    let parts = Parts::of(snapshot)?;
    let contents = parts.contents(snapshot, &memory, &data);
    let parent = Parent::new(onto, path_of_parent(onto.storage(), onto_path, out)?);
    let progress = |_| match cancelled() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    write_layer(out, contents, &parent, options, &progress)?;
    Ok(())
}

/// The pages that may differ from the file number `base` of the chain, as ranges of source offsets: those that are in a
/// file above it, and those that are zero now.
fn pages_above(snapshot: &Snapshot, base: usize, onto: &Snapshot) -> Result<Vec<Range<u64>>> {
    let mut pages = Vec::new();
    snapshot.for_each_entry(0..snapshot.leaf_count(), |page, entry| {
        if matches!(entry, PageEntry::Data { chunk, .. } if usize::from(chunk.layer()) < base) {
            pages.push(page);
        }
        Ok(())
    })?;
    onto.for_each_entry(0..onto.leaf_count(), |page, _| {
        if snapshot.entry(page)? == PageEntry::Zero {
            pages.push(page);
        }
        Ok(())
    })?;
    let range = |page: PageIndex| page.source_offset()..page.source_offset() + PAGE_BYTES as u64;
    Ok(pages.into_iter().map(range).collect())
}
