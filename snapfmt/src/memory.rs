//! A snapshot's memory as plain bytes, for flattening or exporting a chain.

use std::io;
use std::sync::{Mutex, PoisonError};

use crate::chunk::ChunkBuffer;
use crate::entry::PageIndex;
use crate::layout::PAGE_BYTES;
use crate::read_at::ReadAt;
use crate::snapshot::Snapshot;

/// The memory of a [`Snapshot`] by source offset, checked and decoded as it is read.
pub struct SnapshotMemory<'a, R> {
    snapshot: &'a Snapshot<R>,
    /// Buffers that no thread uses at the moment.
    buffers: Mutex<Vec<ChunkBuffer>>,
}

impl<R: ReadAt> Snapshot<R> {
    /// The snapshot's memory as plain bytes. A read that continues where the last one ended decodes nothing twice.
    pub fn memory(&self) -> SnapshotMemory<'_, R> {
        SnapshotMemory { snapshot: self, buffers: Mutex::default() }
    }
}

impl<R: ReadAt> ReadAt for SnapshotMemory<'_, R> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.snapshot.header().memory_bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let lock = || self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = lock().pop().unwrap_or_default();
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let within = (at % PAGE_BYTES as u64) as usize;
            let now = rest.len().min(PAGE_BYTES - within);
            let (part, later) = rest.split_at_mut(now);
            let page = PageIndex::containing(at).ok_or(io::ErrorKind::InvalidInput)?;
            match self.snapshot.page(page, &mut buffer).map_err(io::Error::other)? {
                Some(bytes) => part.copy_from_slice(&bytes[within..within + now]),
                None => part.fill(0),
            }
            rest = later;
            at += now as u64;
        }
        lock().push(buffer);
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.snapshot.header().memory_bytes)
    }
}
