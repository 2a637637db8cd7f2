//! Which part of the source is loaded next: first where faults cluster, then onwards from there, then the rest in the
//! file's order.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::layout::Layout;

/// What a loader takes at a time.
const PART_BYTES: u64 = 2 << 20;

/// All memory in parts, numbered by source offset, which is the order of the file.
pub(crate) struct Plan {
    /// By source offset.
    extents: Vec<PlanExtent>,
    taken: Vec<AtomicBool>,
    /// All parts before it are taken.
    cursor: AtomicUsize,
    /// Parts of which something was passed over.
    left: Mutex<Vec<Part>>,
    part_pages: u64,
    page_bytes: u64,
}

struct PlanExtent {
    first_part: usize,
    first_page: u64,
    pages: u64,
    source_offset: u64,
}

/// A part, and where it is to be begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) number: usize,
    /// Pages by their numbers in the layout, which follow each other in the source.
    pub(crate) pages: Range<u64>,
    pub(crate) source: Range<u64>,
    /// It comes for the second time: nothing is passed over any more.
    pub(super) again: bool,
}

impl Plan {
    pub(crate) fn new(layout: &Layout) -> Plan {
        let page_bytes = layout.page_bytes();
        let part_pages = (PART_BYTES / page_bytes).max(1);
        let mut parts = 0;
        let extents = layout.by_source().map(|(first_page, source)| {
            let pages = (source.end - source.start) / page_bytes;
            let first_part = parts;
            parts += pages.div_ceil(part_pages) as usize;
            PlanExtent { first_part, first_page, pages, source_offset: source.start }
        });
        let extents = extents.collect();
        let taken = std::iter::repeat_with(AtomicBool::default).take(parts).collect();
        let (cursor, left) = (AtomicUsize::new(0), Mutex::default());
        Plan { extents, taken, cursor, left, part_pages, page_bytes }
    }

    /// The next part for a loader whose last one was `last`.
    pub(crate) fn next(&self, last: Option<usize>, recent: &RecentFaults) -> Option<Part> {
        let clustered = recent.clustered(|page| self.part_of(page));
        // The part in which faults come is soon there by those faults: what comes after it is loaded first.
        let near = clustered.into_iter().flat_map(|part| [part + 1, part]);
        let onwards = last.map(|last| last + 1);
        let part = near.chain(onwards).find(|&part| self.take(part)).or_else(|| self.in_order());
        match part {
            Some(part) => Some(self.part(part)),
            None => self.left.lock().unwrap_or_else(PoisonError::into_inner).pop(),
        }
    }

    /// Something of the part was passed over: it comes again when all others were taken.
    pub(super) fn leave(&self, part: Part) {
        let left = Part { again: true, ..part };
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(left);
    }

    fn in_order(&self) -> Option<usize> {
        loop {
            let part = self.cursor.load(Ordering::Relaxed);
            if part >= self.taken.len() {
                return None;
            }
            let taken = self.take(part);
            let _ = self.cursor.compare_exchange(
                part,
                part + 1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            if taken {
                return Some(part);
            }
        }
    }

    fn take(&self, part: usize) -> bool {
        self.taken.get(part).is_some_and(|taken| !taken.swap(true, Ordering::Relaxed))
    }

    fn part(&self, number: usize) -> Part {
        let after = self.extents.partition_point(|extent| extent.first_part <= number);
        // The first extent begins with part 0.
        let extent = &self.extents[after - 1];
        let from = (number - extent.first_part) as u64 * self.part_pages;
        let until = (from + self.part_pages).min(extent.pages);
        let offset = |page: u64| extent.source_offset + page * self.page_bytes;
        Part {
            number,
            pages: extent.first_page + from..extent.first_page + until,
            source: offset(from)..offset(until),
            again: false,
        }
    }

    fn part_of(&self, page: u64) -> Option<usize> {
        let has = |extent: &&PlanExtent| {
            page.checked_sub(extent.first_page).is_some_and(|at| at < extent.pages)
        };
        let extent = self.extents.iter().find(has)?;
        Some(extent.first_part + ((page - extent.first_page) / self.part_pages) as usize)
    }
}

/// The pages of the last faults.
#[derive(Debug, Default)]
pub(crate) struct RecentFaults {
    /// Each page's number plus one; zero: none.
    pages: [AtomicU64; RecentFaults::COUNT],
    next: AtomicUsize,
}

impl RecentFaults {
    const COUNT: usize = 16;
    /// So many of them in one part are a cluster. Faults all over memory seldom have one.
    const CLUSTER: usize = 3;

    /// In a demand thread.
    pub(crate) fn add(&self, page: u64) {
        let at = self.next.fetch_add(1, Ordering::Relaxed) % RecentFaults::COUNT;
        self.pages[at].store(page + 1, Ordering::Relaxed);
    }

    /// The part with the most recent faults, if these are several.
    fn clustered(&self, part_of: impl Fn(u64) -> Option<usize>) -> Option<usize> {
        let last = self.next.load(Ordering::Relaxed);
        let at = |back: usize| last.wrapping_sub(back) % RecentFaults::COUNT;
        let page = |back: usize| self.pages[at(back)].load(Ordering::Relaxed).checked_sub(1);
        let parts: [Option<usize>; RecentFaults::COUNT] =
            std::array::from_fn(|back| page(back + 1).and_then(&part_of));
        let count = |part: usize| parts.iter().filter(|other| **other == Some(part)).count();
        parts.iter().flatten().copied().find(|&part| count(part) >= RecentFaults::CLUSTER)
    }
}
