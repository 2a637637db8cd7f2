//! A hash of guest memory, to compare guests by.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use snapfmt::ReadAt;
use snapfmt::layout::PAGE_BYTES;
use snapvm::VmMemory;

use crate::waits::Wait;

const PIECE_BYTES: usize = 256 << 10;
const ZERO_PAGE: &[u8] = &[0; PAGE_BYTES];

/// SHA-256 over the number and the bytes of every page that is not zero, in source order.
///
/// Pages that a lazy restore has not loaded are loaded by it.
pub(crate) fn sha256(memory: &VmMemory) -> Result<String> {
    let arriving = memory.reader();
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    let reading = Wait::new(|| "the guest's memory to be read, for its hash".into()).begin();
    for region in memory.regions() {
        for offset in (0..region.len).step_by(PIECE_BYTES) {
            let bytes = &mut piece[..(region.len - offset).min(PIECE_BYTES as u64) as usize];
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
