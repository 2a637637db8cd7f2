//! Where a snapshot's bytes, or the memory to be stored, come from.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};

use crate::guard::Stamp;

/// Called when bytes can be read without waiting: see [`ReadAt::when_here`].
pub type WhenHere = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Storage that several threads can read concurrently, at any offset.
///
/// For example a file, bytes in memory, an object that is read by ranged requests, or a test that injects faults.
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

    /// The file that the bytes are in, if it is one. The default is `None`.
    fn file(&self) -> Option<&File> {
        None
    }

    /// The file from which the kernel may copy the bytes to another file, so that this process does not read them. The
    /// default is `None`: there is no file, or each read has to be checked.
    fn file_to_copy(&self) -> Option<&File> {
        None
    }

    /// A stamp that changes when the storage is written to, without reading the content. The default is `None`: there
    /// is no such stamp.
    ///
    /// # Errors
    /// Whatever the storage reports.
    fn stamp(&self) -> io::Result<Option<Stamp>> {
        Ok(None)
    }

    /// Announces that these bytes will be read soon, so that slow storage can begin. The default does nothing.
    fn expect(&self, _bytes: Range<u64>) {}

    /// How many bytes ahead of its reads a reader should [announce](ReadAt::expect), if it can: what slow storage sends
    /// in the time of a request. The default is 0: what is convenient for the reader.
    fn ahead_bytes(&self) -> u64 {
        0
    }

    /// Announces that this handle will be read at random, so that storage should not read ahead of its reads. The default
    /// does nothing.
    fn expect_random(&self) {}

    /// Whether the byte at `offset` can be read without waiting for slower storage below, such as a disk under the page
    /// cache. The question itself may start a read. `None` means unknown, and is the default.
    fn is_cached(&self, _offset: u64) -> Option<bool> {
        None
    }

    /// Whether reads may wait for another host. Only then [`ReadAt::would_wait`] needs to be called. The default is
    /// `false`.
    fn is_remote(&self) -> bool {
        false
    }

    /// Whether a read of these bytes would wait for another host. A thread with other work should then call
    /// [`ReadAt::when_here`] instead. The answer itself must not wait. The default is `false`, also for files: whether a
    /// disk has to be read is not checked, because that costs a system call.
    fn would_wait(&self, _bytes: Range<u64>) -> bool {
        false
    }

    /// Starts to read these bytes and returns without waiting. `here` is called when a read of them would no longer
    /// wait, or with the error that the read would return. It may be called on any thread, also before this returns,
    /// and must not wait. The default calls it immediately.
    fn when_here(&self, _bytes: Range<u64>, here: WhenHere) {
        here(Ok(()));
    }

    /// Announces that these bytes will not be read again soon, so that a cache can release them. The default does
    /// nothing.
    fn release(&self, _bytes: Range<u64>) {}

    /// Another handle to the same bytes, for a thread that reads them in order while others read at random: storage
    /// with read-ahead may decide by the last read of a handle. The default is `None`: it makes no difference.
    fn in_order(&self) -> Option<Box<dyn ReadAt>> {
        None
    }

    /// The bytes that were read from here are damaged. If this is a copy of other storage, it is dropped, so that the
    /// next read fetches the bytes again; then the result is `true`. The default is `false`: another read gives the same
    /// bytes.
    fn refetch(&self, _bytes: Range<u64>) -> bool {
        false
    }
}

impl ReadAt for File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn file(&self) -> Option<&File> {
        Some(self)
    }

    fn file_to_copy(&self) -> Option<&File> {
        Some(self)
    }

    /// Size and times of the inode.
    fn stamp(&self) -> io::Result<Option<Stamp>> {
        let found = rustix::fs::fstat(self)?;
        let ns =
            |seconds: i64, ns: u64| (seconds as u64).wrapping_mul(1_000_000_000).wrapping_add(ns);
        Ok(Some(Stamp {
            len_bytes: found.st_size as u64,
            modified_ns: ns(found.st_mtime, found.st_mtime_nsec),
            changed_ns: ns(found.st_ctime, found.st_ctime_nsec),
        }))
    }

    fn expect(&self, bytes: Range<u64>) {
        let len = bytes.end.checked_sub(bytes.start).and_then(NonZeroU64::new);
        if let Some(len) = len {
            // If that is not possible, reads only take longer.
            let _ = rustix::fs::fadvise(self, bytes.start, Some(len), Advice::WillNeed);
        }
    }

    fn expect_random(&self) {
        // Where that is not possible, a read may wait for more bytes than it needs.
        let _ = rustix::fs::fadvise(self, 0, None, Advice::Random);
    }

    /// It uses `preadv2(RWF_NOWAIT)`. File systems without it give no answer.
    fn is_cached(&self, offset: u64) -> Option<bool> {
        let mut byte = [0];
        let into = &mut [IoSliceMut::new(&mut byte)];
        match rustix::io::preadv2(self, into, offset, ReadWriteFlags::NOWAIT) {
            Ok(len) => (len == 1).then_some(true),
            Err(Errno::AGAIN) => Some(false),
            Err(_) => None,
        }
    }

    fn release(&self, bytes: Range<u64>) {
        let len = bytes.end.checked_sub(bytes.start).and_then(NonZeroU64::new);
        if let Some(len) = len {
            // If that is not possible, the pages stay cached.
            let _ = rustix::fs::fadvise(self, bytes.start, Some(len), Advice::DontNeed);
        }
    }

    /// The kernel keeps the position of the last read, and the length of its read-ahead, for each open file (`struct
    /// file_ra_state`). This needs `/proc`, and the permission to open the file again.
    fn in_order(&self) -> Option<Box<dyn ReadAt>> {
        let again = File::open(format!("/proc/self/fd/{}", self.as_raw_fd())).ok()?;
        Some(Box::new(again))
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

    fn file(&self) -> Option<&File> {
        (**self).file()
    }

    fn file_to_copy(&self) -> Option<&File> {
        (**self).file_to_copy()
    }

    fn stamp(&self) -> io::Result<Option<Stamp>> {
        (**self).stamp()
    }

    fn expect(&self, bytes: Range<u64>) {
        (**self).expect(bytes);
    }

    fn ahead_bytes(&self) -> u64 {
        (**self).ahead_bytes()
    }

    fn expect_random(&self) {
        (**self).expect_random();
    }

    fn is_cached(&self, offset: u64) -> Option<bool> {
        (**self).is_cached(offset)
    }

    fn is_remote(&self) -> bool {
        (**self).is_remote()
    }

    fn would_wait(&self, bytes: Range<u64>) -> bool {
        (**self).would_wait(bytes)
    }

    fn when_here(&self, bytes: Range<u64>, here: WhenHere) {
        (**self).when_here(bytes, here);
    }

    fn release(&self, bytes: Range<u64>) {
        (**self).release(bytes);
    }

    fn in_order(&self) -> Option<Box<dyn ReadAt>> {
        (**self).in_order()
    }

    fn refetch(&self, bytes: Range<u64>) -> bool {
        (**self).refetch(bytes)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Arc<T> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        (**self).len_bytes()
    }

    fn file(&self) -> Option<&File> {
        (**self).file()
    }

    fn file_to_copy(&self) -> Option<&File> {
        (**self).file_to_copy()
    }

    fn stamp(&self) -> io::Result<Option<Stamp>> {
        (**self).stamp()
    }

    fn expect(&self, bytes: Range<u64>) {
        (**self).expect(bytes);
    }

    fn ahead_bytes(&self) -> u64 {
        (**self).ahead_bytes()
    }

    fn expect_random(&self) {
        (**self).expect_random();
    }

    fn is_cached(&self, offset: u64) -> Option<bool> {
        (**self).is_cached(offset)
    }

    fn is_remote(&self) -> bool {
        (**self).is_remote()
    }

    fn would_wait(&self, bytes: Range<u64>) -> bool {
        (**self).would_wait(bytes)
    }

    fn when_here(&self, bytes: Range<u64>, here: WhenHere) {
        (**self).when_here(bytes, here);
    }

    fn release(&self, bytes: Range<u64>) {
        (**self).release(bytes);
    }

    fn in_order(&self) -> Option<Box<dyn ReadAt>> {
        (**self).in_order()
    }

    fn refetch(&self, bytes: Range<u64>) -> bool {
        (**self).refetch(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_read_in_order_through_its_own_handle() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"0123456789").expect("it is written");
        let again = Arc::new(file).in_order().expect("there is /proc");
        let mut bytes = [0; 4];
        again.read_exact_at(&mut bytes, 3).expect("it is there");
        assert_eq!(&bytes, b"3456");
        assert_eq!(again.len_bytes().expect("it has a length"), 10);
        assert!(vec![0u8; 10].in_order().is_none());
    }
}
