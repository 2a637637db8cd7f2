//! A hash of guest memory, to compare guests by.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use rustix::fs::MemfdFlags;
use sha2::{Digest, Sha256};
use snapfmt::MemoryRegion;
use snapfmt::layout::PAGE_BYTES;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PIECE_BYTES: usize = 64 << 10;
const ZERO_PAGE: &[u8] = &[0; PAGE_BYTES];

/// SHA-256 over the number and the bytes of every page that is not zero, in source order.
///
/// Pages that a lazy restore has not loaded are loaded by it. Memory is read by having the kernel
/// write it into a scratch file: so a page that cannot be had is EFAULT, where a load instruction
/// would get SIGBUS.
pub(crate) fn sha256(memory: &GuestMemoryMmap, regions: &[MemoryRegion]) -> Result<String> {
    let mut scratch: File = rustix::fs::memfd_create("memory-hash", MemfdFlags::CLOEXEC)
        .context("cannot create a memfd")?
        .into();
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    for region in regions {
        for offset in (0..region.len).step_by(PIECE_BYTES) {
            let bytes = &mut piece[..(region.len - offset).min(PIECE_BYTES as u64) as usize];
            let gpa = region.gpa + offset;
            scratch.seek(SeekFrom::Start(0)).context("cannot seek in a memfd")?;
            memory
                .write_all_volatile_to(GuestAddress(gpa), &mut scratch, bytes.len())
                .with_context(|| format!("cannot read guest memory at gpa {gpa:#x}"))?;
            scratch.read_exact_at(bytes, 0).context("cannot read a memfd")?;
            let first = (region.source_offset + offset) / PAGE_BYTES as u64;
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
