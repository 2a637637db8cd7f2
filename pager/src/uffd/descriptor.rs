//! A userfaultfd, and its operations.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::abi;
use super::batch::MessageBatch;
use super::errno::{Errno, ioctl};
use super::features::Features;
use super::journal::Journal;

/// A userfaultfd after its handshake. It is non-blocking and close-on-exec, and serves faults of the kernel, too.
#[derive(Debug)]
pub struct Uffd {
    pub(super) file: File,
    pub(super) features: Features,
    /// Another process has the same open file, and can make it blocking again.
    pub(super) shared: bool,
}

/// The result of [`Uffd::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Messages can be read.
    Readable,
    /// The other end of the stop descriptor was closed or written to.
    Stop,
}

const BAD_REVENTS: &str = "the userfaultfd reports POLLERR, POLLHUP or POLLNVAL";

/// What a range supports after [`Uffd::register`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered {
    /// `UFFDIO_ZEROPAGE` works there (not for hugetlbfs).
    pub zeropage: bool,
}

impl Uffd {
    /// The features that were requested and granted.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Registers `len` bytes at `host_addr` for missing faults (`UFFDIO_REGISTER`). From now on, a thread that touches
    /// a page which is not in memory waits for this userfaultfd.
    ///
    /// # Errors
    /// `EBUSY`: registered with another userfaultfd. `EINVAL`: not mapped, misaligned, or memory of a kind that cannot
    /// be registered (a file). `EPERM`: a mapping that may not be written.
    ///
    /// # Safety
    /// `host_addr..host_addr + len` is mapped memory of this process that the caller may decide about, and no Rust
    /// reference into it exists while it is registered. Pages appear with the content that is copied in, may become
    /// poisoned (accesses raise SIGBUS), and read as zeros after the userfaultfd is closed.
    pub unsafe fn register(&self, host_addr: u64, len: u64) -> Result<Registered, Errno> {
        // SAFETY: the contract is the same.
        unsafe { self.register_with(host_addr, len, false) }
    }

    /// As [`Uffd::register`]. With `fault_around_off` the range is also registered for write protection, which is not
    /// used. In such a range the kernel maps no pages of a file around the faulting one (`should_fault_around` in
    /// `mm/memory.c`).
    ///
    /// # Errors
    /// As [`Uffd::register`]; with `fault_around_off`, `EINVAL` from a kernel before 5.19.
    ///
    /// # Safety
    /// As [`Uffd::register`].
    pub unsafe fn register_with(
        &self,
        host_addr: u64,
        len: u64,
        fault_around_off: bool,
    ) -> Result<Registered, Errno> {
        let protection = if fault_around_off { abi::UFFDIO_REGISTER_MODE_WP } else { 0 };
        let mut argument = abi::uffdio_register {
            range: abi::uffdio_range { start: host_addr, len },
            mode: u64::from(abi::UFFDIO_REGISTER_MODE_MISSING | protection),
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes a `uffdio_register`. The contract of this function covers the effect on memory.
        unsafe { self.ioctl(abi::UFFDIO_REGISTER, &mut argument) }?;
        Ok(Registered { zeropage: argument.ioctls & abi::ZEROPAGE_IOCTL_BIT != 0 })
    }

    /// Installs pages with the content of `bytes` at `host_addr` and wakes the threads that wait for them
    /// (`UFFDIO_COPY`). Returns how many bytes were installed: at least a page, maybe less than `bytes`.
    ///
    /// # Errors
    /// The errno if nothing was installed; see the table in `docs/pager.md`.
    ///
    /// # Safety
    /// The pages are in a range that was given to [`Uffd::register`] of this userfaultfd, and the contract there still
    /// holds. The kernel does not check this: it accepts memory that is registered with any userfaultfd of the process,
    /// such as that of a library which relies on the content of its memory.
    pub unsafe fn copy(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
        // SAFETY: the contract is the same.
        unsafe { self.copy_with(host_addr, bytes, 0) }
    }

    /// As [`Uffd::copy`], but wakes no thread: a thread that waits for one of the pages waits until [`Uffd::wake`].
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    ///
    /// # Safety
    /// As [`Uffd::copy`].
    pub unsafe fn copy_without_waking(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
        // SAFETY: the contract is the same.
        unsafe { self.copy_with(host_addr, bytes, u64::from(abi::UFFDIO_COPY_MODE_DONTWAKE)) }
    }

    /// # Safety
    /// As [`Uffd::copy`].
    unsafe fn copy_with(&self, host_addr: u64, bytes: &[u8], mode: u64) -> Result<usize, Errno> {
        let mut argument = abi::uffdio_copy {
            dst: host_addr,
            src: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
            mode,
            copy: 0,
        };
        // SAFETY: UFFDIO_COPY takes a `uffdio_copy`. It only reads `bytes`, and fills only pages that are not in memory
        // and that the contract covers.
        let outcome = unsafe { self.ioctl(abi::UFFDIO_COPY, &mut argument) };
        progress(outcome, argument.copy, bytes.len())
    }

    /// Installs zero pages and wakes the threads that wait for them (`UFFDIO_ZEROPAGE`). Returns as [`Uffd::copy`].
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    ///
    /// # Safety
    /// As [`Uffd::copy`].
    pub unsafe fn zero(&self, host_addr: u64, len: usize) -> Result<usize, Errno> {
        let mut argument = abi::uffdio_zeropage {
            range: abi::uffdio_range { start: host_addr, len: len as u64 },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE takes a `uffdio_zeropage`. The contract covers the pages.
        let outcome = unsafe { self.ioctl(abi::UFFDIO_ZEROPAGE, &mut argument) };
        progress(outcome, argument.zeropage, len)
    }

    /// Makes every access to missing pages raise SIGBUS, or `EFAULT` in a system call
    /// (`UFFDIO_POISON`, Linux 6.6). Returns as [`Uffd::copy`].
    ///
    /// # Errors
    /// As [`Uffd::copy`]; `EINVAL` from a kernel without it.
    ///
    /// # Safety
    /// As [`Uffd::copy`].
    pub unsafe fn poison(&self, host_addr: u64, len: usize) -> Result<usize, Errno> {
        let mut argument = abi::uffdio_poison {
            range: abi::uffdio_range { start: host_addr, len: len as u64 },
            mode: 0,
            updated: 0,
        };
        // SAFETY: UFFDIO_POISON takes a `uffdio_poison`. The contract covers the pages.
        let outcome = unsafe { self.ioctl(abi::UFFDIO_POISON, &mut argument) };
        progress(outcome, argument.updated, len)
    }

    /// Unregisters the range and wakes all threads that wait there (`UFFDIO_UNREGISTER`). From now on the kernel fills
    /// missing pages.
    ///
    /// # Errors
    /// `EINVAL` if nothing is mapped, or the mapping is not the one that was registered.
    pub fn unregister(&self, host_addr: u64, len: u64) -> Result<(), Errno> {
        let mut argument = abi::uffdio_range { start: host_addr, len };
        // SAFETY: UFFDIO_UNREGISTER takes a `uffdio_range`. It changes no content. Missing pages then read as zeros, as
        // after closing the userfaultfd.
        unsafe { self.ioctl(abi::UFFDIO_UNREGISTER, &mut argument) }
    }

    /// Whether messages can be read. An error counts as yes, because the next read returns it.
    pub fn readable(&self) -> bool {
        let mut fd = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one initialised `pollfd`.
        unsafe { libc::poll(&raw mut fd, 1, 0) != 0 }
    }

    /// Wakes the threads that wait for pages of the range (`UFFDIO_WAKE`). They try their access again.
    ///
    /// # Errors
    /// `EINVAL` for a misaligned range.
    pub fn wake(&self, host_addr: u64, len: usize) -> Result<(), Errno> {
        let mut argument = abi::uffdio_range { start: host_addr, len: len as u64 };
        // SAFETY: UFFDIO_WAKE takes a `uffdio_range` and touches no memory.
        unsafe { self.ioctl(abi::UFFDIO_WAKE, &mut argument) }
    }

    /// Reads the queued messages, as many as fit into the batch, without waiting. If the queue is empty, the batch is
    /// empty.
    ///
    /// # Errors
    /// As read(2).
    pub fn read(&self, batch: &mut MessageBatch) -> io::Result<()> {
        batch.set_filled(0);
        loop {
            let read = match batch.journal.clone() {
                None => {
                    let buffer = batch.buffer();
                    // SAFETY: the buffer is valid for writes of that many bytes, and borrowed.
                    unsafe { self.read_now(buffer.as_mut_ptr(), buffer.len()) }
                }
                Some(journal) => {
                    // SAFETY: `start` is valid for writes of that many bytes, and no reference into it exists.
                    let read = unsafe { self.read_now(journal.start(), Journal::BYTES) };
                    read.inspect(|&bytes| {
                        journal.copy_to(&mut batch.buffer()[..bytes.min(Journal::BYTES)])
                    })
                }
            };
            match read {
                Ok(bytes) => {
                    batch.set_filled(bytes);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// A read(2) that never waits, even if another process has made the open file blocking.
    ///
    /// # Safety
    /// `to` is valid for writes of `len` bytes, and no reference to them is used meanwhile.
    unsafe fn read_now(&self, to: *mut u8, len: usize) -> io::Result<usize> {
        let read = |flags: Option<i32>| {
            let fd = self.file.as_raw_fd();
            let read = match flags {
                // SAFETY: by the contract of this function.
                None => unsafe { libc::read(fd, to.cast(), len) },
                Some(flags) => {
                    let part = libc::iovec { iov_base: to.cast(), iov_len: len };
                    // SAFETY: by the contract of this function, with one part. The offset -1 means that of the file.
                    unsafe { libc::preadv2(fd, &raw const part, 1, -1, flags) }
                }
            };
            usize::try_from(read).map_err(|_| io::Error::last_os_error())
        };
        if !self.shared {
            return read(None);
        }
        match read(Some(libc::RWF_NOWAIT)) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            outcome => return outcome,
        }
        // A kernel before 6.10. If the file becomes blocking at this moment, the read waits.
        let mut fd = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one initialised `pollfd`.
        match unsafe { libc::poll(&raw mut fd, 1, 0) } {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            1 if fd.revents & libc::POLLIN != 0 => read(None),
            1 => Err(io::Error::other(BAD_REVENTS)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sleeps until messages can be read, or `stop` becomes readable or is hung up. `stop` has precedence.
    ///
    /// # Errors
    /// As poll(2), and an error for `POLLERR` or `POLLNVAL` of the userfaultfd.
    pub fn wait(&self, stop: BorrowedFd<'_>) -> io::Result<Wait> {
        self.wait_with(stop, None)
    }

    /// As [`Uffd::wait`]. Also returns [`Wait::Readable`] when `event` is readable.
    pub(crate) fn wait_with(
        &self,
        stop: BorrowedFd<'_>,
        event: Option<BorrowedFd<'_>>,
    ) -> io::Result<Wait> {
        let interest = |fd: BorrowedFd<'_>| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let last = event.unwrap_or(stop);
        let mut fds = [interest(self.file.as_fd()), interest(stop), interest(last)];
        let count = if event.is_some() { 3 } else { 2 };
        loop {
            // SAFETY: `fds` is an array of at least that many initialised `pollfd`.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), count, -1) };
            if ready < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            if fds[1].revents != 0 {
                return Ok(Wait::Stop);
            }
            if (fds[0].revents | fds[2].revents) & libc::POLLIN != 0 {
                return Ok(Wait::Readable);
            }
            if fds[0].revents != 0 {
                return Err(io::Error::other(BAD_REVENTS));
            }
        }
    }

    /// # Safety
    /// `request` is a userfaultfd ioctl whose argument is a `T`, and its effect on memory is sound.
    pub(super) unsafe fn ioctl<T>(&self, request: u32, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: the descriptor is open, and `argument` is valid for reads and writes of the type that `request` takes
        // by the contract of this function.
        unsafe { ioctl(self.file.as_fd(), request, argument) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Joins the two results of an ioctl that fills pages: the return value, and a field with either the bytes done (then
/// `EAGAIN` only means "less than requested") or a negative errno.
fn progress(outcome: Result<(), Errno>, field: i64, asked: usize) -> Result<usize, Errno> {
    match outcome {
        Ok(()) => Ok(asked),
        Err(Errno(libc::EAGAIN)) if field > 0 => Ok((field as usize).min(asked)),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The process that has sent a userfaultfd can make it blocking again.
    #[test]
    fn a_foreign_userfaultfd_is_read_without_waiting() {
        let Ok(uffd) = Uffd::open(Features::NONE, Features::NONE) else {
            assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "no userfaultfd");
            let line = b"SKIPPED a_foreign_one_is_read_without_waiting: no userfaultfd\n";
            return io::Write::write_all(&mut io::stderr(), line).expect("stderr");
        };
        let foreign = Uffd { shared: true, ..uffd };
        // SAFETY: takes numbers.
        let result = unsafe { libc::fcntl(foreign.file.as_raw_fd(), libc::F_SETFL, libc::O_RDWR) };
        assert_eq!(result, 0);
        let (read, reads) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut batch = MessageBatch::new();
            read.send(foreign.read(&mut batch).map(|()| batch.is_empty()))
        });
        let read = reads.recv_timeout(std::time::Duration::from_secs(60)).expect("it waits");
        // A kernel with RWF_NOWAIT returns an empty batch. An older one returns an error, because poll(2) fails on a
        // blocking userfaultfd.
        assert!(read.unwrap_or(true));
    }

    #[test]
    fn a_short_copy_is_progress_and_a_negative_field_is_not() {
        assert_eq!(progress(Ok(()), 8192, 8192), Ok(8192));
        assert_eq!(progress(Err(Errno(libc::EAGAIN)), 4096, 8192), Ok(4096));
        assert_eq!(
            progress(Err(Errno(libc::EAGAIN)), -i64::from(libc::EAGAIN), 8192),
            Err(Errno(libc::EAGAIN))
        );
        assert_eq!(
            progress(Err(Errno(libc::EEXIST)), -i64::from(libc::EEXIST), 8192),
            Err(Errno(libc::EEXIST))
        );
    }
}
