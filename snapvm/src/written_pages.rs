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
        let zeros = snapshot.load_parts(&unknown, threads, &place).map_err(LoadError::Read)?;
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error.into());
        }
        // Pages without memory are zero.
        for range in &zeros {
            self.drop_pages(range)?;
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

pub(crate) fn len_bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}
