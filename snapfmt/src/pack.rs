//! From guest memory to chunks: finds the pages that have to be stored and compresses them, on all
//! cores.
//!
//! One task is one leaf of the index, 2 MiB of memory, so a chunk never crosses a leaf. Pages at the front
//! ([`HotPages`](crate::HotPages)) are packed first, in their own order, and left out of their leaves.

use std::collections::HashSet;
use std::ops::Range;

use crate::chunk::{self, Binding, ChunkBuffer};
use crate::codec::{Appended, Codec, Compressor};
use crate::dedupe::{Dedupe, Ticket};
use crate::entry::{ChunkExtent, PageEntry, PageIndex};
use crate::error::WriteError;
use crate::layout::{LEAF_SPAN_BYTES, PAGE_BYTES};
use crate::parent::ParentPages;
use crate::read_at::ReadAt;

/// The chunks of one leaf, encoded but not yet placed in the file.
#[derive(Default)]
pub(crate) struct PackedLeaf {
    pub(crate) number: u32,
    pub(crate) bytes: Appended,
    pub(crate) chunks: Vec<PackedChunk>,
    /// Stored pages in the order of the chunks' slots: of a leaf, ascending.
    pub(crate) pages: Vec<PageIndex>,
    /// Pages that have the bytes of another one, which comes before them.
    pub(crate) duplicates: Vec<(PageIndex, PageIndex)>,
    /// Pages that are zero here but not in the parent.
    pub(crate) cleared: Vec<PageIndex>,
}

pub(crate) struct PackedChunk {
    pub(crate) len: u32,
    pub(crate) pages: u16,
    pub(crate) codec: Codec,
}

/// The data ranges of a memory, cut into leaves.
pub(crate) struct LeafTasks {
    /// Sorted, disjoint, whole pages.
    ranges: Vec<Range<u64>>,
    leaves: Vec<u32>,
}

impl LeafTasks {
    /// Widens the ranges to whole pages and joins adjacent ranges; what is above the end of
    /// memory is ignored.
    pub(crate) fn new(data: &[Range<u64>], memory_bytes: u64) -> Self {
        let page = PAGE_BYTES as u64;
        let mut sorted: Vec<_> = data
            .iter()
            .map(|r| r.start / page * page..r.end.min(memory_bytes).next_multiple_of(page))
            .filter(|r| r.start < r.end)
            .collect();
        sorted.sort_by_key(|range| range.start);
        let mut ranges: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
        let mut leaves: Vec<u32> = Vec::new();
        for range in sorted {
            let first = (range.start / LEAF_SPAN_BYTES) as u32;
            let last = ((range.end - 1) / LEAF_SPAN_BYTES) as u32;
            let after = leaves.last().map_or(0, |leaf| leaf + 1);
            leaves.extend(first.max(after)..=last);
            match ranges.last_mut() {
                Some(before) if range.start <= before.end => before.end = before.end.max(range.end),
                _ => ranges.push(range),
            }
        }
        Self { ranges, leaves }
    }

    pub(crate) fn len(&self) -> usize {
        self.leaves.len()
    }

    /// Whether the page may hold data.
    pub(crate) fn covers(&self, page: PageIndex) -> bool {
        let at = page.source_offset();
        let after = self.ranges.partition_point(|range| range.end <= at);
        self.ranges.get(after).is_some_and(|range| range.start <= at)
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// The parts of one task's leaf that may hold data.
    pub(crate) fn ranges_of(&self, task: usize) -> (u32, impl Iterator<Item = Range<u64>>) {
        let number = self.leaves[task];
        let leaf = u64::from(number) * LEAF_SPAN_BYTES..(u64::from(number) + 1) * LEAF_SPAN_BYTES;
        let first = self.ranges.partition_point(|range| range.end <= leaf.start);
        let ranges = self.ranges[first..]
            .iter()
            .take_while({
                let end = leaf.end;
                move |range| range.start < end
            })
            .map(move |range| range.start.max(leaf.start)..range.end.min(leaf.end));
        (number, ranges)
    }
}

/// Memory is read in parts of this size, so that a page is still in the core's cache when it is
/// examined.
const PART_BYTES: usize = 128 << 10;

/// What the parent has at a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum There {
    Zero,
    /// The same bytes.
    Same,
    Other,
}

/// The working data of one thread.
pub(crate) struct Packer<'a> {
    memory: &'a dyn ReadAt,
    compressor: Compressor,
    chunk_pages: usize,
    binding: Binding<'a>,
    dedupe: Option<&'a Dedupe>,
    parent: Option<(&'a dyn ParentPages, ChunkBuffer)>,
    /// With a parent: what it has, for each page of the part.
    there: Vec<There>,
    /// With a parent: its chunks, and which pages of the part they have.
    order: Vec<(ChunkExtent, usize)>,
    /// Pages that are stored already.
    skip: Option<&'a HashSet<PageIndex>>,
    /// The leaf's pages to be stored, end to end, up to `gathered`; behind them space for the rest of the leaf.
    raw: Vec<u8>,
    gathered: usize,
    /// With dedupe: a hash of each of them.
    hashes: Vec<u128>,
    /// With dedupe: the page that each of them may be equal to.
    candidates: Vec<Option<PageIndex>>,
}

impl<'a> Packer<'a> {
    pub(crate) fn new(
        memory: &'a dyn ReadAt,
        compressor: Compressor,
        chunk_pages: usize,
        binding: Binding<'a>,
        dedupe: Option<&'a Dedupe>,
        parent: Option<&'a dyn ParentPages>,
    ) -> Self {
        let parent = parent.map(|parent| (parent, ChunkBuffer::new()));
        let raw = vec![0; LEAF_SPAN_BYTES as usize];
        Self {
            memory,
            compressor,
            chunk_pages,
            binding,
            dedupe,
            parent,
            there: Vec::new(),
            order: Vec::new(),
            skip: None,
            raw,
            gathered: 0,
            hashes: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Leaves these pages out of all leaves.
    pub(crate) fn skipping(mut self, pages: &'a HashSet<PageIndex>) -> Self {
        self.skip = Some(pages);
        self
    }

    /// Reads and packs the given pages, at most those of one leaf, in the given order. `turn` is the number of this
    /// task among all tasks.
    pub(crate) fn pack_pages(
        &mut self,
        turn: usize,
        pages: &[PageIndex],
        packed: &mut PackedLeaf,
    ) -> Result<(), WriteError> {
        let ticket = self.dedupe.map(|dedupe| dedupe.ticket(turn));
        self.clear(packed);
        for page in pages {
            let start = page.source_offset();
            self.gather(start..start + PAGE_BYTES as u64, packed)?;
        }
        self.encode(ticket, packed)
    }

    /// Reads one leaf's memory and packs the pages that have to be stored. Returns the number of bytes read. `turn` is
    /// the number of this task.
    pub(crate) fn pack(
        &mut self,
        turn: usize,
        tasks: &LeafTasks,
        task: usize,
        packed: &mut PackedLeaf,
    ) -> Result<u64, WriteError> {
        let ticket = self.dedupe.map(|dedupe| dedupe.ticket(turn));
        let (number, ranges) = tasks.ranges_of(task);
        self.clear(packed);
        packed.number = number;
        let mut read_bytes = 0;
        for range in ranges {
            read_bytes += range.end - range.start;
            self.gather(range, packed)?;
        }
        self.encode(ticket, packed)?;
        Ok(read_bytes)
    }

    fn clear(&mut self, packed: &mut PackedLeaf) {
        packed.bytes.clear();
        packed.chunks.clear();
        packed.pages.clear();
        packed.duplicates.clear();
        packed.cleared.clear();
        self.gathered = 0;
        self.hashes.clear();
    }

    /// Makes chunks of the gathered pages.
    fn encode(
        &mut self,
        ticket: Option<Ticket<'_>>,
        packed: &mut PackedLeaf,
    ) -> Result<(), WriteError> {
        if let Some(ticket) = ticket {
            self.drop_duplicates(ticket, packed)?;
        }
        let PackedLeaf { bytes, chunks, pages, .. } = packed;
        let raw_chunks = self.raw[..self.gathered].chunks(self.chunk_pages * PAGE_BYTES);
        for (pages, raw) in pages.chunks(self.chunk_pages).zip(raw_chunks) {
            let (len, codec) =
                chunk::encode(&mut self.compressor, pages, raw, self.binding, bytes)?;
            chunks.push(PackedChunk { len, pages: pages.len() as u16, codec });
        }
        Ok(())
    }

    /// Reads a range and gathers the pages that are not zero or, with a parent, differ from it.
    fn gather(&mut self, range: Range<u64>, packed: &mut PackedLeaf) -> Result<(), WriteError> {
        for source_offset in range.clone().step_by(PART_BYTES) {
            let len = (range.end - source_offset).min(PART_BYTES as u64);
            // Directly to the final place of its pages, because most of them are kept.
            let start = self.gathered;
            let part = &mut self.raw[start..start + len as usize];
            self.memory
                .read_exact_at(part, source_offset)
                .map_err(|source| WriteError::memory(source_offset, len, source))?;
            // Below 2^32: memory is at most 16 TiB.
            let first = (source_offset / PAGE_BYTES as u64) as u32;
            self.compare(first, start..start + len as usize)?;
            let pages = (start..start + len as usize).step_by(PAGE_BYTES).zip(first..);
            for (place, (at, number)) in pages.enumerate() {
                if self.skip.is_some_and(|skip| skip.contains(&PageIndex(number))) {
                    continue;
                }
                let bytes = &self.raw[at..at + PAGE_BYTES];
                let (page, zero) = (PageIndex(number), is_zero(bytes));
                match (zero, self.there.get(place).copied().unwrap_or(There::Zero)) {
                    (true, There::Zero) => {}
                    (true, _) => packed.cleared.push(page),
                    (false, There::Same) => {}
                    (false, _) => {
                        // While the page is in the core's cache.
                        if let Some(dedupe) = self.dedupe {
                            self.hashes.push(dedupe.hash(bytes));
                        }
                        packed.pages.push(page);
                        if at != self.gathered {
                            self.raw.copy_within(at..at + PAGE_BYTES, self.gathered);
                        }
                        self.gathered += PAGE_BYTES;
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares a part with the parent, if there is one. The pages of several layers may alternate: so each chunk is
    /// decoded once, and not for each of its pages.
    fn compare(&mut self, first: u32, part: Range<usize>) -> Result<(), WriteError> {
        let Some((parent, buffer)) = &mut self.parent else { return Ok(()) };
        self.there.clear();
        self.order.clear();
        for (place, number) in (0..part.len() / PAGE_BYTES).zip(first..) {
            self.there.push(There::Zero);
            let page = PageIndex(number);
            if self.skip.is_some_and(|skip| skip.contains(&page)) {
                continue;
            }
            if let PageEntry::Data { chunk, .. } = parent.entry(page).map_err(WriteError::Parent)? {
                self.order.push((chunk, place));
            }
        }
        self.order.sort_unstable();
        for (_, place) in &self.order {
            let (page, at) = (PageIndex(first + *place as u32), part.start + place * PAGE_BYTES);
            let there = parent.page(page, buffer).map_err(WriteError::Parent)?;
            self.there[*place] = match there {
                Some(there) if there == &self.raw[at..at + PAGE_BYTES] => There::Same,
                Some(_) => There::Other,
                None => There::Zero,
            };
        }
        Ok(())
    }

    /// Removes pages that have the bytes of an earlier one.
    fn drop_duplicates(
        &mut self,
        ticket: Ticket<'_>,
        packed: &mut PackedLeaf,
    ) -> Result<(), WriteError> {
        // Other threads wait for this turn, so the pages are compared after it. With any result, the remembered page is
        // a stored one.
        self.candidates.clear();
        ticket.take(|remember| {
            let pages = packed.pages.iter().zip(&self.hashes);
            self.candidates.extend(pages.map(|(page, hash)| remember(*hash, *page)));
        });
        // Many pages may be equal to the same one: it is read once.
        let (mut other, mut other_is) = ([0; PAGE_BYTES], None);
        // The memory of a guest that runs may have other bytes by now, so it is not read again.
        let compares = self.dedupe.is_some_and(Dedupe::compares);
        let mut kept = 0;
        for (at, candidate) in self.candidates.iter().enumerate() {
            let page = packed.pages[at];
            let bytes = at * PAGE_BYTES..(at + 1) * PAGE_BYTES;
            if let Some(earlier) = *candidate {
                if compares && other_is != Some(earlier) {
                    let source_offset = earlier.source_offset();
                    self.memory.read_exact_at(&mut other, source_offset).map_err(|source| {
                        WriteError::memory(source_offset, PAGE_BYTES as u64, source)
                    })?;
                    other_is = Some(earlier);
                }
                if !compares || self.raw[bytes.clone()] == other {
                    packed.duplicates.push((page, earlier));
                    continue;
                }
            }
            if kept != at {
                self.raw.copy_within(bytes, kept * PAGE_BYTES);
                packed.pages[kept] = page;
            }
            kept += 1;
        }
        packed.pages.truncate(kept);
        self.gathered = kept * PAGE_BYTES;
        Ok(())
    }
}

/// Whether a page is all zeros. The first bytes decide for most pages that are not; the rest is
/// one OR over blocks, which the compiler turns into vector instructions.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    let (blocks, rest) = page.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |sum, byte| sum | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_page_is_zero_only_if_every_byte_is() {
        let mut page = vec![0; PAGE_BYTES];
        assert!(is_zero(&page));
        for at in 0..PAGE_BYTES {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }

    proptest! {
        #[test]
        fn tasks_cover_exactly_the_pages_of_the_ranges(
            ranges in prop::collection::vec((0u64..20_000_000, 1u64..9_000_000), 0..8),
        ) {
            let memory_bytes = 16 << 20;
            let data: Vec<_> = ranges.into_iter().map(|(start, len)| start..start + len).collect();
            let page = PAGE_BYTES as u64;
            let mut expected = vec![false; (memory_bytes / page) as usize];
            for range in &data {
                for (at, covered) in expected.iter_mut().enumerate() {
                    let (start, end) = (at as u64 * page, (at as u64 + 1) * page);
                    *covered |= range.start < end && start < range.end;
                }
            }
            let tasks = LeafTasks::new(&data, memory_bytes);
            let mut found = vec![false; expected.len()];
            for task in 0..tasks.len() {
                let (number, ranges) = tasks.ranges_of(task);
                for range in ranges {
                    prop_assert_eq!(range.start / LEAF_SPAN_BYTES, u64::from(number));
                    prop_assert_eq!((range.end - 1) / LEAF_SPAN_BYTES, u64::from(number));
                    for at in range.start / page..range.end / page {
                        prop_assert!(!found[at as usize]);
                        found[at as usize] = true;
                    }
                }
            }
            prop_assert_eq!(tasks.total_bytes(), found.iter().filter(|at| **at).count() as u64 * page);
            prop_assert_eq!(found, expected);
        }
    }
}
