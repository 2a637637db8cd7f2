//! Puts back the pages that an eagerly restored guest has written to.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::thread;

use snapfmt::Snapshot;
use snapfmt::layout::PAGE_BYTES;

use crate::error::MemoryError;
use crate::guest_memory;
use crate::kept_pages::KeptPages;
use crate::memory::VmMemory;
use crate::memory_map::gpa_ranges;
use crate::restore::LoadError;
use crate::room;

/// Pages are looked up for this much memory at a time, because their list has 24 bytes for each.
const BATCH_BYTES: u64 = 256 << 20;

impl VmMemory {
    /// Puts back the pages of `written`, ranges of source offsets, and returns how many bytes these are.
    pub(crate) fn put_back_written(
        &self,
        snapshot: &Snapshot,
        kept: &Mutex<KeptPages>,
        written: &[Range<u64>],
    ) -> Result<u64, LoadError> {
        let mut known = kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unknown: Vec<Range<u64>> = Vec::new();
        for offset in written.iter().flat_map(|range| range.clone().step_by(PAGE_BYTES)) {
            match known.get(offset) {
                Some(bytes) => self.put(offset, bytes)?,
                None => match unknown.last_mut() {
                    Some(last) if last.end == offset => last.end += PAGE_BYTES as u64,
                    _ => unknown.push(offset..offset + PAGE_BYTES as u64),
                },
            }
        }
        let most = len_bytes(&unknown).min(known.room_bytes() as u64) as usize;
        let may_keep = most > 0 && room::check(room::of_kept_pages(most)).is_ok();
        let (known, failed) = (Mutex::new(&mut *known), Mutex::new(None::<MemoryError>));
        let place = |source_offset: u64, bytes: &[u8]| {
            if let Err(error) = self.put(source_offset, bytes) {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            } else if may_keep {
                known.lock().unwrap_or_else(PoisonError::into_inner).keep(source_offset, bytes);
            }
        };
        let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        for batch in batches(&unknown, BATCH_BYTES) {
            let zeros = snapshot.load_parts(&batch, threads, &place).map_err(LoadError::Read)?;
            // Pages without memory are zero.
            for range in &zeros {
                self.drop_pages(range)?;
            }
        }
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error.into());
        }
        Ok(len_bytes(written))
    }

    fn put(&self, source_offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        guest_memory::write(&self.mapped, &self.regions, source_offset, bytes)
    }

    /// Gives back the pages of a private mapping.
    pub(crate) fn drop_pages(&self, range: &Range<u64>) -> Result<(), MemoryError> {
        gpa_ranges(&self.regions, range.clone()).try_for_each(|gpas| {
            vmm::drop_private_pages(&self.mapped, gpas)
                .map_err(MemoryError::system("cannot drop the guest's pages"))
        })
    }
}

/// The same ranges in parts of `most_bytes` at most, which are whole pages.
fn batches(ranges: &[Range<u64>], most_bytes: u64) -> Vec<Vec<Range<u64>>> {
    let mut batches: Vec<Vec<Range<u64>>> = Vec::new();
    let mut room_bytes = 0;
    for range in ranges {
        let mut rest = range.clone();
        while !rest.is_empty() {
            if room_bytes == 0 {
                batches.push(Vec::new());
                room_bytes = most_bytes;
            }
            let part = rest.start..rest.end.min(rest.start.saturating_add(room_bytes));
            room_bytes -= part.end - part.start;
            rest.start = part.end;
            batches.last_mut().into_iter().for_each(|batch| batch.push(part.clone()));
        }
    }
    batches
}

pub(crate) fn len_bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_have_all_ranges_in_order() {
        let page = PAGE_BYTES as u64;
        let ranges = [0..page, 2 * page..7 * page, 9 * page..10 * page];
        let batches = batches(&ranges, 3 * page);
        let pages = |ranges: &[Range<u64>]| -> Vec<u64> {
            ranges.iter().flat_map(|range| range.clone().step_by(PAGE_BYTES)).collect()
        };
        assert_eq!(
            batches.iter().map(|batch| len_bytes(batch) / page).collect::<Vec<_>>(),
            [3, 3, 1]
        );
        assert_eq!(pages(&batches.concat()), pages(&ranges));
        assert!(super::batches(&[], page).is_empty());
    }
}
