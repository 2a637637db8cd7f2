//! Joins loaded pages into runs that one ioctl can install.

use crate::layout::Place;

/// A loaded page, and its place in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) place: Place,
    pub(crate) buffer_offset: usize,
}

/// Pages of one extent that follow each other both in memory and in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first_page: u64,
    pub(crate) pages: usize,
    pub(crate) host_addr: u64,
    pub(crate) extent: usize,
    pub(crate) buffer_offset: usize,
}

impl Run {
    pub(crate) fn holds(&self, page: u64) -> bool {
        page >= self.first_page && page - self.first_page < self.pages as u64
    }

    fn is_followed_by(&self, next: &Placed, page_bytes: usize) -> bool {
        next.place.extent == self.extent
            && next.place.page == self.first_page + self.pages as u64
            && next.buffer_offset == self.buffer_offset + self.pages * page_bytes
    }
}

/// Fills `runs` from `placed`. Pages that follow each other become one run. The run with `fault_page`, if there is one,
/// comes first, so that the faulting thread is woken before the rest is installed.
pub(crate) fn coalesce(
    placed: impl Iterator<Item = Placed>,
    page_bytes: usize,
    fault_page: u64,
    runs: &mut Vec<Run>,
) {
    runs.clear();
    for next in placed {
        match runs.last_mut() {
            Some(run) if run.is_followed_by(&next, page_bytes) => run.pages += 1,
            _ => runs.push(Run {
                first_page: next.place.page,
                pages: 1,
                host_addr: next.place.host_addr,
                extent: next.place.extent,
                buffer_offset: next.buffer_offset,
            }),
        }
    }
    if let Some(with_fault) = runs.iter().position(|run| run.holds(fault_page)) {
        runs.swap(0, with_fault);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::region::PAGE_BYTES as PAGE;

    fn placed(page: u64, buffer_slot: usize) -> Placed {
        // Two extents: the pages below 100, and those from 100 on, which are elsewhere in memory.
        let (extent, host_addr) =
            if page < 100 { (0, 0x10_0000 + page * 4096) } else { (1, 0x90_0000 + page * 4096) };
        Placed { place: Place { page, host_addr, extent }, buffer_offset: buffer_slot * PAGE }
    }

    #[test]
    fn a_dense_chunk_is_one_run() {
        let mut runs = Vec::new();
        coalesce((0..16).map(|i| placed(32 + i, i as usize)), PAGE, 40, &mut runs);
        assert_eq!(runs.len(), 1);
        assert_eq!((runs[0].first_page, runs[0].pages, runs[0].buffer_offset), (32, 16, 0));
    }

    #[test]
    fn a_run_does_not_cross_an_extent() {
        let mut runs = Vec::new();
        coalesce([placed(99, 0), placed(100, 1)].into_iter(), PAGE, 100, &mut runs);
        assert_eq!(runs.iter().map(|run| run.first_page).collect::<Vec<_>>(), [100, 99]);
    }

    proptest! {
        #[test]
        fn runs_hold_exactly_the_pages_each_at_its_place(
            pages in prop::collection::vec(0u64..200, 0..64),
            slots in prop::collection::vec(0usize..64, 64),
            in_order: bool,
            fault_page in 0u64..200,
        ) {
            let input: Vec<Placed> = pages
                .iter()
                .enumerate()
                .map(|(i, &page)| placed(page, if in_order { i } else { slots[i] }))
                .collect();
            let mut runs = Vec::new();
            coalesce(input.iter().copied(), PAGE, fault_page, &mut runs);
            let mut unrolled: Vec<(u64, u64, usize)> = runs
                .iter()
                .flat_map(|run| (0..run.pages).map(move |i| (
                    run.first_page + i as u64,
                    run.host_addr + (i * PAGE) as u64,
                    run.buffer_offset + i * PAGE,
                )))
                .collect();
            let mut expected: Vec<_> =
                input.iter().map(|p| (p.place.page, p.place.host_addr, p.buffer_offset)).collect();
            unrolled.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(unrolled, expected);
            if pages.contains(&fault_page) {
                prop_assert!(runs[0].holds(fault_page));
            }
        }
    }
}
