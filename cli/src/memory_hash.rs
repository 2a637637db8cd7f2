//! A hash of guest memory, to compare guests.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use snapfmt::ReadAt;
use snapfmt::layout::PAGE_BYTES;
use snapvm::VmMemory;

use crate::waits::Wait;

const BLOCK_BYTES: usize = 256 << 10;
const ZERO_PAGE: &[u8] = &[0; PAGE_BYTES];

/// SHA-256 over the number and the bytes of every page that is not zero, in source order.
///
/// It loads the pages that a lazy restore has not loaded.
pub(crate) fn sha256(memory: &VmMemory) -> Result<String> {
    let arriving = memory.reader();
    let mut hasher = Sha256::new();
    let mut block = vec![0; BLOCK_BYTES];
    let reading = Wait::new(|| "the guest's memory to be read, for its hash".into()).begin();
    for region in memory.regions() {
        for offset in (0..region.len).step_by(BLOCK_BYTES) {
            let bytes = &mut block[..(region.len - offset).min(BLOCK_BYTES as u64) as usize];
            let source_offset = region.source_offset + offset;
            reading.moved();
            arriving.read_exact_at(bytes, source_offset).context("cannot hash memory")?;
            let first = source_offset / PAGE_BYTES as u64;
            for (page, number) in bytes.chunks_exact(PAGE_BYTES).zip(first..) {
                if page != ZERO_PAGE {
                    hasher.update(number.to_le_bytes());
                    hasher.update(page);
                }
            }
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
