//! The pages of a chain of layers in one table: one look-up for a page, whatever the number of
//! layers.
//!
//! A leaf is merged when it is first used: it has the top layer's entries. For a page that is as in the
//! parent, it has the entry of the next layer, and so on.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::entry::{PageEntry, PageIndex};
use crate::error::ReadError;
use crate::layer::Layer;
use crate::layout::{ENTRY_BYTES, LEAF_PAGES, u64_at};
use crate::read_at::ReadAt;

/// Leaves this close to each other are read together.
const LEAF_GAP_BYTES: u64 = 64 << 10;

/// On a disk, the first read of one of this many leaves announces all of them: a disk reads 256 KiB nearly as fast as one
/// leaf, and a guest touches memory of many leaves soon after its restore.
const NEAR_LEAVES: usize = 64;

/// The merged index of some layers, top first.
pub(crate) struct PageTable {
    /// Position in `leaves`, plus one, of each leaf from `first_leaf` to the last existing one; 0 for a leaf that no
    /// layer has. The kernel provides this memory, as zeros, when it is accessed: so a sparse guest uses little memory
    /// for it.
    positions: Vec<u32>,
    first_leaf: u32,
    leaves: Vec<(u32, OnceLock<Box<Leaf>>)>,
    /// For each `NEAR_LEAVES` of them: some were announced.
    announced: Vec<AtomicBool>,
    pages: u64,
    /// The entry of a page that is in no layer.
    absent: PageEntry,
}

struct Leaf {
    /// The entries in the file, each checked when the leaf was read.
    entries: [u64; LEAF_PAGES],
    /// The layer of each entry; `None`: all are of the top layer.
    layers: Option<Box<[u16; LEAF_PAGES]>>,
}

impl PageTable {
    pub(crate) fn new<R: ReadAt>(layers: &[Layer<R>]) -> Self {
        let memory_bytes = layers.first().map_or(0, |layer| layer.header.memory_bytes);
        let mut numbers: Vec<u32> =
            layers.iter().flat_map(|layer| layer.index.leaf_numbers()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let first_leaf = numbers.first().copied().unwrap_or(0);
        let span = numbers.last().map_or(0, |last| last - first_leaf + 1);
        let mut positions = vec![0; span as usize];
        for (position, number) in numbers.iter().enumerate() {
            positions[(number - first_leaf) as usize] = position as u32 + 1;
        }
        let groups = numbers.len().div_ceil(NEAR_LEAVES);
        Self {
            positions,
            first_leaf,
            announced: std::iter::repeat_with(AtomicBool::default).take(groups).collect(),
            leaves: numbers.into_iter().map(|number| (number, OnceLock::new())).collect(),
            pages: memory_bytes / crate::layout::PAGE_BYTES as u64,
            absent: layers.last().map_or(PageEntry::Zero, |layer| layer.index.absent()),
        }
    }

    /// The entry of a page inside the memory.
    pub(crate) fn entry<R: ReadAt>(
        &self,
        layers: &[Layer<R>],
        page: PageIndex,
    ) -> Result<PageEntry, ReadError> {
        match self.position(page) {
            None => Ok(self.absent),
            Some(position) => Ok(self.leaf(layers, position)?.entry(page.position())),
        }
    }

    /// Announces to the storage which leaves will be read for these pages.
    pub(crate) fn expect<R: ReadAt>(&self, layers: &[Layer<R>], pages: &[PageIndex]) {
        let unread = |page: &PageIndex| {
            let position = self.position(*page)?;
            self.leaves[position].1.get().is_none().then_some(position)
        };
        let mut positions: Vec<usize> = pages.iter().filter_map(unread).collect();
        positions.sort_unstable();
        positions.dedup();
        // The caller knows which ones it needs.
        positions.iter().for_each(|position| _ = self.announce(*position));
        expect_leaves(layers.iter(), positions.iter().map(|position| self.leaves[*position].0));
    }

    /// Returns whether this is the first announcement of leaves near this one.
    fn announce(&self, position: usize) -> bool {
        !self.announced[position / NEAR_LEAVES].swap(true, Ordering::Relaxed)
    }

    /// The number of the page's leaf, if it exists and was not read yet.
    pub(crate) fn unread_leaf(&self, page: PageIndex) -> Option<u32> {
        let (number, leaf) = &self.leaves[self.position(page)?];
        leaf.get().is_none().then_some(*number)
    }

    /// The pages around a zero page, in the same leaf, that are zero too.
    pub(crate) fn zero_run<R: ReadAt>(
        &self,
        layers: &[Layer<R>],
        page: PageIndex,
    ) -> Result<Range<u64>, ReadError> {
        let first = u64::from(page.leaf()) * LEAF_PAGES as u64;
        let Some(position) = self.position(page) else {
            return Ok(first..(first + LEAF_PAGES as u64).min(self.pages));
        };
        let entries = &self.leaf(layers, position)?.entries;
        let zero = |at: &usize| entries[*at] == 0;
        let middle = page.position();
        let start = middle - (0..middle).rev().take_while(zero).count();
        let end = middle + (middle..LEAF_PAGES).take_while(zero).count();
        Ok(first + start as u64..(first + end as u64).min(self.pages))
    }

    /// Calls `visit` with every page of some leaves that is not zero, in ascending order.
    pub(crate) fn for_each_entry<R: ReadAt>(
        &self,
        layers: &[Layer<R>],
        positions: Range<usize>,
        visit: &mut dyn FnMut(PageIndex, PageEntry) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        for position in positions {
            let (number, kept) = &self.leaves[position];
            // The leaf is not kept. Otherwise a pass over all leaves would hold the whole index in memory, which may be
            // larger than a forged file on disk, whose leaves may be holes.
            let merged;
            let leaf = match kept.get() {
                Some(leaf) => leaf,
                None => {
                    merged = merge(layers, *number)?;
                    &merged
                }
            };
            let first = number * LEAF_PAGES as u32;
            let pages = (self.pages - u64::from(first)).min(LEAF_PAGES as u64) as usize;
            for at in 0..pages {
                match leaf.entry(at) {
                    PageEntry::Zero => {}
                    entry => visit(PageIndex(first + at as u32), entry)?,
                }
            }
        }
        Ok(())
    }

    /// Numbers of the leaves that some layer has, ascending.
    pub(crate) fn leaf_numbers(&self) -> impl ExactSizeIterator<Item = u32> {
        self.leaves.iter().map(|(number, _)| *number)
    }

    fn position(&self, page: PageIndex) -> Option<usize> {
        let at = page.leaf().checked_sub(self.first_leaf)?;
        let position = self.positions.get(at as usize)?;
        (*position as usize).checked_sub(1)
    }

    fn leaf<R: ReadAt>(&self, layers: &[Layer<R>], position: usize) -> Result<&Leaf, ReadError> {
        let (number, leaf) = &self.leaves[position];
        if let Some(leaf) = leaf.get() {
            return Ok(leaf);
        }
        if self.announce(position) {
            let near = self.leaves.chunks(NEAR_LEAVES).nth(position / NEAR_LEAVES);
            let numbers = near.unwrap_or_default().iter().map(|(number, _)| *number);
            // Storage that is not a disk reads larger blocks by itself.
            let on_disk = |layer: &&Layer<R>| !layer.storage.is_remote();
            expect_leaves(layers.iter().filter(on_disk), numbers);
        }
        let merged = Box::new(merge(layers, *number)?);
        // Two threads may both have merged it: the result is the same, and the first one is kept.
        Ok(leaf.get_or_init(|| merged))
    }
}

impl Leaf {
    fn entry(&self, at: usize) -> PageEntry {
        let layer = self.layers.as_ref().map_or(0, |layers| layers[at]);
        match PageEntry::decode(self.entries[at]) {
            Ok(PageEntry::Data { chunk, slot }) => {
                PageEntry::Data { chunk: chunk.in_layer(layer), slot }
            }
            Ok(entry) => entry,
            // Checked when the leaf was read. An error must not become a zero page.
            Err(_) => PageEntry::Parent,
        }
    }
}

/// Announces to the storage that these leaves, in ascending order, will be read.
fn expect_leaves<'a, R: ReadAt + 'a>(
    layers: impl Iterator<Item = &'a Layer<R>>,
    numbers: impl Iterator<Item = u32> + Clone,
) {
    for layer in layers {
        let mut expected = 0..0;
        for leaf in numbers.clone().filter_map(|number| layer.index.leaf_bytes(number)) {
            if expected.is_empty() || leaf.start > expected.end + LEAF_GAP_BYTES {
                layer.storage.expect(expected);
                expected = leaf;
            } else {
                expected.end = leaf.end;
            }
        }
        layer.storage.expect(expected);
    }
}

fn merge<R: ReadAt>(layers: &[Layer<R>], number: u32) -> Result<Leaf, ReadError> {
    let parent = PageEntry::Parent.encode();
    let mut entries = [parent; LEAF_PAGES];
    let mut of_layer = [0; LEAF_PAGES];
    let mut open = LEAF_PAGES;
    for (layer, depth) in layers.iter().zip(0u16..) {
        if open == 0 {
            break;
        }
        let absent = layer.index.absent().encode();
        let leaf = layer.leaf(number);
        let leaf = leaf.map_err(|error| layer.named(depth.into(), error))?;
        for (at, entry) in entries.iter_mut().enumerate().filter(|(_, entry)| **entry == parent) {
            *entry = leaf.as_ref().map_or(absent, |leaf| u64_at(&leaf[..], at * ENTRY_BYTES));
            of_layer[at] = depth;
            open -= usize::from(*entry != parent);
        }
    }
    let one_layer = of_layer.iter().all(|layer| *layer == 0);
    Ok(Leaf { entries, layers: (!one_layer).then(|| Box::new(of_layer)) })
}
