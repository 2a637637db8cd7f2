//! How guest memory is divided into memory slots: see [`memory_slots`](crate::memory_slots).

use std::ops::Range;

use crate::layout::LARGE_PAGE_BYTES;

/// Most first slots. If there are more first ranges, the smallest gaps between them are included.
const FIRST_SLOTS_MAX: usize = 16;
/// A late slot has about this length, so that one ioctl is short. In large guests it is longer: see
/// [`LATE_SLOTS_MAX`].
const LATE_SLOT_MIN_BYTES: u64 = 1 << 30;
/// About the most late slots. KVM offers 32764 slots, older hosts offer 509.
const LATE_SLOTS_MAX: u64 = 64;

/// A run of guest memory for one memory slot, or a whole region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) gpa: u64,
    pub(crate) len: u64,
    pub(crate) host_addr: u64,
}

/// Divides the regions into slots. The second list marks the slots that hold the first ranges.
pub(crate) fn split(regions: &[Slot], first: &[Range<u64>]) -> (Vec<Slot>, Vec<bool>) {
    let total: u64 = regions.iter().map(|region| region.len).sum();
    let late_bytes =
        LATE_SLOT_MIN_BYTES.max((total / LATE_SLOTS_MAX).next_multiple_of(LARGE_PAGE_BYTES));
    let mut by_region: Vec<_> =
        regions.iter().map(|region| aligned_ranges(region, first)).collect();
    join_smallest_gaps(&mut by_region);

    let mut slots = Vec::new();
    let mut is_first = Vec::new();
    for (region, first) in regions.iter().zip(by_region) {
        let mut done = region.gpa;
        let mut cut = |until: u64, step: u64, register_now: bool| {
            while done < until {
                let len = step.min(until - done);
                let host_addr = region.host_addr + (done - region.gpa);
                slots.push(Slot { gpa: done, len, host_addr });
                is_first.push(register_now);
                done += len;
            }
        };
        for range in first {
            cut(range.start, late_bytes, false);
            cut(range.end, u64::MAX, true);
        }
        cut(region.gpa + region.len, late_bytes, false);
    }
    (slots, is_first)
}

/// The parts of `first` inside the region, widened to whole large pages, sorted, without overlaps.
fn aligned_ranges(region: &Slot, first: &[Range<u64>]) -> Vec<Range<u64>> {
    let region_end = region.gpa + region.len;
    let mut ranges: Vec<Range<u64>> = first
        .iter()
        .map(|range| {
            let start = range.start - range.start % LARGE_PAGE_BYTES;
            let end = range.end.checked_next_multiple_of(LARGE_PAGE_BYTES).unwrap_or(region_end);
            start.max(region.gpa)..end.min(region_end)
        })
        .filter(|range| !range.is_empty())
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let touches = next.start <= last.end;
        if touches {
            last.end = last.end.max(next.end);
        }
        touches
    });
    ranges
}

/// Leaves at most [`FIRST_SLOTS_MAX`] ranges in all, by taking in the smallest gaps between them.
fn join_smallest_gaps(by_region: &mut [Vec<Range<u64>>]) {
    let count: usize = by_region.iter().map(Vec::len).sum();
    let mut gaps: Vec<u64> = by_region
        .iter()
        .flat_map(|ranges| ranges.windows(2).map(|pair| pair[1].start - pair[0].end))
        .collect();
    gaps.sort_unstable();
    let mut excess = count.saturating_sub(FIRST_SLOTS_MAX).min(gaps.len());
    // Gaps up to this length are included, until the number is low enough.
    let Some(longest) = excess.checked_sub(1).map(|last| gaps[last]) else {
        return;
    };
    for ranges in by_region {
        ranges.dedup_by(|next, last| {
            let join = excess > 0 && next.start - last.end <= longest;
            if join {
                last.end = next.end;
                excess -= 1;
            }
            join
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn regions() -> Vec<Slot> {
        vec![
            Slot { gpa: 0, len: 3 * GIB, host_addr: 0x10_0000_0000 },
            Slot { gpa: 4 * GIB, len: 13 * GIB, host_addr: 0x70_0000_0000 },
        ]
    }

    /// The slots cover each region exactly, at the right host address.
    fn assert_covers(slots: &[Slot], regions: &[Slot]) {
        let mut slots = slots.iter();
        for region in regions {
            let mut gpa = region.gpa;
            while gpa < region.gpa + region.len {
                let slot = slots.next().unwrap();
                assert_eq!(slot.gpa, gpa);
                assert_eq!(slot.host_addr, region.host_addr + (gpa - region.gpa));
                assert!(slot.len.is_multiple_of(LARGE_PAGE_BYTES));
                gpa += slot.len;
            }
            assert_eq!(gpa, region.gpa + region.len);
        }
        assert!(slots.next().is_none());
    }

    #[test]
    fn first_ranges_are_widened_and_the_rest_cut() {
        let (slots, is_first) = split(&regions(), &[4096..8192, 17 * GIB - 4096..17 * GIB]);
        assert_covers(&slots, &regions());
        let first: Vec<_> = slots
            .iter()
            .zip(&is_first)
            .filter(|(_, first)| **first)
            .map(|(p, _)| p.gpa..p.gpa + p.len)
            .collect();
        assert_eq!(first, [0..2 * MIB, 17 * GIB - 2 * MIB..17 * GIB]);
        assert!(slots.iter().all(|p| p.len <= GIB));
    }

    #[test]
    fn many_first_ranges_become_few_slots() {
        let first: Vec<_> = (0..400).map(|i| i * 40 * MIB..i * 40 * MIB + 4096).collect();
        let (slots, is_first) = split(&regions(), &first);
        assert_covers(&slots, &regions());
        assert!(is_first.iter().filter(|first| **first).count() <= FIRST_SLOTS_MAX);
        for range in first.iter().filter(|r| !(3 * GIB..4 * GIB).contains(&r.start)) {
            let slot = slots.partition_point(|p| p.gpa <= range.start) - 1;
            assert!(is_first[slot], "{range:x?} is not registered");
        }
    }

    #[test]
    fn a_terabyte_is_not_a_thousand_slots() {
        let regions = [
            Slot { gpa: 0, len: 3 * GIB, host_addr: 0x10_0000_0000 },
            Slot { gpa: 4 * GIB, len: 1021 * GIB, host_addr: 0x70_0000_0000 },
        ];
        let (slots, _) = split(&regions, &[0..4096]);
        assert_covers(&slots, &regions);
        assert!(slots.len() <= 2 * LATE_SLOTS_MAX as usize);
    }

    #[test]
    fn ranges_outside_of_ram_are_dropped() {
        let (slots, is_first) = split(&regions(), &[3 * GIB..4 * GIB, u64::MAX - 5..u64::MAX]);
        assert_covers(&slots, &regions());
        assert!(!is_first.contains(&true));
    }
}
