//! Where a snapshot's bytes, or the memory to be stored, come from.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::Advice;

/// Storage that can be read at any offset from several threads at once.
///
/// A file, bytes in memory, an object behind ranged requests, or a fake that injects faults.
pub trait ReadAt: Send + Sync {
    /// Fills `buf` with the bytes at `offset`.
    ///
    /// # Errors
    /// Whatever the storage reports; `UnexpectedEof` when it ends before `buf` is full.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Length of the storage in bytes.
    ///
    /// # Errors
    /// Whatever the storage reports.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Says that these bytes will soon be read, so that storage which takes its time may begin. Does nothing unless it is
    /// overridden.
    fn expect(&self, _bytes: Range<u64>) {}
}

impl ReadAt for File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn expect(&self, bytes: Range<u64>) {
        let len = bytes.end.checked_sub(bytes.start).and_then(NonZeroU64::new);
        if let Some(len) = len {
            // Where that is not possible, it takes its time.
            let _ = rustix::fs::fadvise(self, bytes.start, Some(len), Advice::WillNeed);
        }
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buf.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.as_slice().read_exact_at(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        (**self).len_bytes()
    }

    fn expect(&self, bytes: Range<u64>) {
        (**self).expect(bytes);
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Arc<T> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        (**self).len_bytes()
    }

    fn expect(&self, bytes: Range<u64>) {
        (**self).expect(bytes);
    }
}
