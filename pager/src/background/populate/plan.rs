//! Decides which part of the source is loaded next: first where faults cluster, then the parts after that, then the
//! rest in the order of the file.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::layout::Layout;

/// The size of a part.
const PART_BYTES: u64 = 2 << 20;

/// All memory in parts. They are numbered by source offset, which is the order of the file.
pub(crate) struct Plan {
    /// Sorted by source offset.
    extents: Vec<PlanExtent>,
    taken: Vec<AtomicBool>,
    /// All parts before this one are taken.
    cursor: AtomicUsize,
    /// Parts of which pages were skipped.
    left: Mutex<Vec<Part>>,
    /// The number of pages of parts that are not done.
    pages_left: AtomicU64,
    part_pages: u64,
    page_bytes: u64,
}

struct PlanExtent {
    first_part: usize,
    first_page: u64,
    pages: u64,
    source_offset: u64,
}

/// A part of the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) number: usize,
    /// Page numbers of the layout. These pages follow each other in the source.
    pub(crate) pages: Range<u64>,
    pub(crate) source: Range<u64>,
    /// The part is loaded for the second time: no pages are skipped.
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
        let extents: Vec<PlanExtent> = extents.collect();
        let pages_left = extents.iter().map(|extent| extent.pages).sum::<u64>().into();
        let taken = std::iter::repeat_with(AtomicBool::default).take(parts).collect();
        let (cursor, left) = (AtomicUsize::new(0), Mutex::default());
        Plan { extents, taken, cursor, left, pages_left, part_pages, page_bytes }
    }

    /// The next part for a loader whose last part was `last`.
    pub(crate) fn next(&self, last: Option<usize>, recent: &RecentFaults) -> Option<Part> {
        let clustered = recent.clustered(|page| self.part_of(page));
        // Faults will soon load the part in which they cluster. So the part after it is loaded first.
        let near = clustered.into_iter().flat_map(|part| [part + 1, part]);
        let onwards = last.map(|last| last + 1);
        let part = near.chain(onwards).find(|&part| self.take(part)).or_else(|| self.in_order());
        match part {
            Some(part) => Some(self.part(part)),
            None => self.left.lock().unwrap_or_else(PoisonError::into_inner).pop(),
        }
    }

    /// Pages of the part were skipped: it is returned again after all others.
    pub(super) fn leave(&self, part: Part) {
        let left = Part { again: true, ..part };
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(left);
    }

    /// Every page of the part is dealt with: it is installed, or left to a fault, or known to be zero or unreadable.
    pub(super) fn done(&self, part: &Part) {
        self.pages_left.fetch_sub(part.pages.end - part.pages.start, Ordering::AcqRel);
    }

    /// The number of pages of parts that are not done. The memory must not be unregistered before this is 0.
    pub(super) fn pages_left(&self) -> u64 {
        self.pages_left.load(Ordering::Acquire)
    }

    /// Whether all parts have been returned once.
    pub(super) fn is_taken(&self) -> bool {
        self.cursor.load(Ordering::Relaxed) >= self.taken.len()
    }

    fn in_order(&self) -> Option<usize> {
        loop {
            let part = self.cursor.load(Ordering::Relaxed);
            if part >= self.taken.len() {
                return None;
            }
            let taken = self.take(part);
            let _ =
                self.cursor.compare_exchange(part, part + 1, Ordering::Relaxed, Ordering::Relaxed);
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
        // The first extent starts with part 0, so that `after` is at least 1.
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

/// The pages of the latest faults.
#[derive(Debug, Default)]
pub(crate) struct RecentFaults {
    /// The number of each page plus one. Zero means no page.
    pages: [AtomicU64; RecentFaults::COUNT],
    next: AtomicUsize,
}

impl RecentFaults {
    const COUNT: usize = 16;
    /// This many of them in one part are a cluster. Faults spread over the memory seldom form one.
    const CLUSTER: usize = 3;

    /// Called by a demand thread.
    pub(crate) fn add(&self, page: u64) {
        let at = self.next.fetch_add(1, Ordering::Relaxed) % RecentFaults::COUNT;
        self.pages[at].store(page + 1, Ordering::Relaxed);
    }

    /// The most recent part with a cluster of faults.
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

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use crate::region::Region;

    const MIB: u64 = 1 << 20;

    /// 7 MiB at the start of the source, and 4 MiB in front of them in memory.
    fn plan() -> Plan {
        let region = |host_addr, len, source_offset| {
            // SAFETY: no pager is started with it.
            unsafe { Region::new(host_addr, len, 4096, source_offset) }.expect("whole pages")
        };
        Plan::new(&Layout::cut(
            &[region(64 * MIB, 7 * MIB, 0), region(16 * MIB, 4 * MIB, 7 * MIB)],
            2,
        ))
    }

    #[test]
    fn every_page_comes_once_in_the_order_of_the_source() {
        let (plan, recent) = (plan(), RecentFaults::default());
        let parts: Vec<Part> = std::iter::from_fn(|| plan.next(None, &recent)).collect();
        let mut offset = 0;
        for part in &parts {
            assert_eq!(part.source.start, offset);
            assert_eq!(part.pages.end - part.pages.start, (part.source.end - offset) / 4096);
            assert_eq!(plan.part_of(part.pages.start), Some(part.number));
            offset = part.source.end;
        }
        assert_eq!((offset, parts.len()), (11 * MIB, 6));
        assert_eq!(plan.part_of(11 * 256), None);
    }

    #[test]
    fn the_parts_after_a_cluster_of_faults_come_first() {
        let (plan, recent) = (plan(), RecentFaults::default());
        let next = |last: Option<usize>| plan.next(last, &recent).map(|part| part.number);
        let page = |number: usize| plan.part(number).pages.start;
        assert_eq!(next(None), Some(0));
        // One fault in each of two parts is no cluster.
        [5, 2].into_iter().for_each(|part| recent.add(page(part)));
        assert_eq!(next(Some(0)), Some(1));
        (0..3).for_each(|_| recent.add(page(3)));
        assert_eq!([next(Some(1)), next(Some(4)), next(Some(3))], [Some(4), Some(3), Some(2)]);
        assert_eq!([next(Some(2)), next(Some(5))], [Some(5), None]);
    }

    #[test]
    fn skipped_parts_come_again_at_the_end() {
        let (plan, recent) = (plan(), RecentFaults::default());
        let first = plan.next(None, &recent).expect("the first");
        plan.leave(first.clone());
        assert_eq!(plan.pages_left(), 11 * 256);
        let numbers: Vec<(usize, bool)> = std::iter::from_fn(|| plan.next(None, &recent))
            .map(|part| (part.number, part.again))
            .collect();
        assert_eq!(
            numbers,
            [(1, false), (2, false), (3, false), (4, false), (5, false), (0, true)]
        );
        plan.done(&first);
        assert_eq!(plan.pages_left(), 11 * 256 - (first.pages.end - first.pages.start));
    }
}
