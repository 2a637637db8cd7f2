//! A small binding of Linux userfaultfd: what a fault service needs, typed, and no more.
//!
//! [`Uffd::register`] is unsafe, because it makes memory subject to this userfaultfd; so are the ioctls
//! that fill pages, because the kernel fills pages that are registered with *another* userfaultfd of the
//! process just as well.
//!
//! Sources: `userfaultfd(2)`, `ioctl_userfaultfd(2)`, the kernel's
//! `Documentation/admin-guide/mm/userfaultfd.rst` and `mm/userfaultfd.c`.
#![allow(unsafe_code)]

mod abi;
mod foreign;
mod journal;
mod message;
mod open;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

pub use foreign::{ForeignUffd, ForeignUffdError};
pub(crate) use journal::Journal;
pub use message::{FaultKind, Message, MessageBatch};
pub use open::{Features, OpenError};

/// A userfaultfd with its handshake done: non-blocking, close-on-exec, kernel faults included.
#[derive(Debug)]
pub struct Uffd {
    file: File,
    features: Features,
    /// Another process has the same open file, and can make it a blocking one again.
    shared: bool,
}

/// The number of an error as the kernel returned it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

/// What [`Uffd::wait`] saw.
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
    /// The features that were asked for and granted.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Registers `len` bytes at `host_addr` for missing faults (`UFFDIO_REGISTER`): from now on a first
    /// touch of a page that is not there waits for this userfaultfd.
    ///
    /// # Errors
    /// `EBUSY` registered with another userfaultfd, `EINVAL` not mapped, misaligned, or memory of a
    /// kind that cannot be registered (a file), `EPERM` a mapping that may not be written.
    ///
    /// # Safety
    /// `host_addr..host_addr + len` is mapped memory of this process that the caller may decide about,
    /// and no Rust reference into it exists while it is registered: pages appear with whatever content
    /// is copied in, may turn into ones that raise SIGBUS, and read as zeros once the userfaultfd is closed.
    pub unsafe fn register(&self, host_addr: u64, len: u64) -> Result<Registered, Errno> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.register_with(host_addr, len, false) }
    }

    /// As [`Uffd::register`]. With `one_by_one` also for write protection, of which no use is made, but where it is the
    /// kernel maps no further pages of a file around one that is touched (`should_fault_around` in `mm/memory.c`).
    ///
    /// # Errors
    /// As [`Uffd::register`]; with `one_by_one`, `EINVAL` from a kernel before 5.19.
    ///
    /// # Safety
    /// As [`Uffd::register`].
    pub unsafe fn register_with(
        &self,
        host_addr: u64,
        len: u64,
        one_by_one: bool,
    ) -> Result<Registered, Errno> {
        let protection = if one_by_one { abi::UFFDIO_REGISTER_MODE_WP } else { 0 };
        let mut argument = abi::uffdio_register {
            range: abi::uffdio_range { start: host_addr, len },
            mode: u64::from(abi::UFFDIO_REGISTER_MODE_MISSING | protection),
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes a `uffdio_register`; the effect on the memory is answered for
        // by this function's own contract.
        unsafe { self.ioctl(abi::UFFDIO_REGISTER, &mut argument) }?;
        Ok(Registered { zeropage: argument.ioctls & abi::ZEROPAGE_IOCTL_BIT != 0 })
    }

    /// Installs pages with the content of `bytes` at `host_addr` and wakes who waits for them
    /// (`UFFDIO_COPY`). Answers how many bytes were installed: at least a page, maybe less than `bytes`.
    ///
    /// # Errors
    /// The errno when nothing was installed; see the table in `docs/pager.md`.
    ///
    /// # Safety
    /// The pages are of a range that was given to [`Uffd::register`] of this userfaultfd, and what was
    /// promised there still holds. The kernel does not check this: it takes memory that is registered with
    /// any userfaultfd of the process, such as that of a library which relies on what its memory holds.
    pub unsafe fn copy(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.copy_with(host_addr, bytes, 0) }
    }

    /// As [`Uffd::copy`], and wakes nobody: who waits for one of the pages goes on waiting until [`Uffd::wake`].
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    ///
    /// # Safety
    /// As [`Uffd::copy`].
    pub unsafe fn copy_without_waking(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
        // SAFETY: the caller's promise is the same.
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
        // SAFETY: UFFDIO_COPY takes a `uffdio_copy`; it only reads `bytes`, and fills only pages that
        // are not there and that the caller answers for.
        let outcome = unsafe { self.ioctl(abi::UFFDIO_COPY, &mut argument) };
        progress(outcome, argument.copy, bytes.len())
    }

    /// Installs zero pages and wakes who waits for them (`UFFDIO_ZEROPAGE`). Answers as [`Uffd::copy`].
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
        // SAFETY: UFFDIO_ZEROPAGE takes a `uffdio_zeropage`; for the pages the caller answers.
        let outcome = unsafe { self.ioctl(abi::UFFDIO_ZEROPAGE, &mut argument) };
        progress(outcome, argument.zeropage, len)
    }

    /// Makes every access to missing pages raise SIGBUS, or `EFAULT` in a system call
    /// (`UFFDIO_POISON`, Linux 6.6). Answers as [`Uffd::copy`].
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
        // SAFETY: UFFDIO_POISON takes a `uffdio_poison`; for the pages the caller answers.
        let outcome = unsafe { self.ioctl(abi::UFFDIO_POISON, &mut argument) };
        progress(outcome, argument.updated, len)
    }

    /// Takes the range out of this userfaultfd and wakes all who wait there (`UFFDIO_UNREGISTER`): what is not
    /// there is filled by the kernel from now on.
    ///
    /// # Errors
    /// `EINVAL` where nothing is mapped, or not what was registered.
    pub fn unregister(&self, host_addr: u64, len: u64) -> Result<(), Errno> {
        let mut argument = abi::uffdio_range { start: host_addr, len };
        // SAFETY: UFFDIO_UNREGISTER takes a `uffdio_range`; it changes no content, and the zeros that appear
        // later are those that closing the userfaultfd brings as well.
        unsafe { self.ioctl(abi::UFFDIO_UNREGISTER, &mut argument) }
    }

    /// Whether messages wait to be read. An error counts as yes: reading tells.
    pub fn readable(&self) -> bool {
        let mut fd = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one initialised `pollfd`.
        unsafe { libc::poll(&raw mut fd, 1, 0) != 0 }
    }

    /// Wakes the threads that wait for pages of the range (`UFFDIO_WAKE`): they try their access again.
    ///
    /// # Errors
    /// `EINVAL` for a misaligned range.
    pub fn wake(&self, host_addr: u64, len: usize) -> Result<(), Errno> {
        let mut argument = abi::uffdio_range { start: host_addr, len: len as u64 };
        // SAFETY: UFFDIO_WAKE takes a `uffdio_range` and touches no memory.
        unsafe { self.ioctl(abi::UFFDIO_WAKE, &mut argument) }
    }

    /// Reads the queued messages, as many as the batch holds, without waiting.
    ///
    /// # Errors
    /// What `read(2)` says, except that an empty queue is an empty batch.
    pub fn read(&self, batch: &mut MessageBatch) -> io::Result<()> {
        batch.set_filled(0);
        loop {
            let read = match batch.journal.clone() {
                None => {
                    let buffer = batch.buffer();
                    // SAFETY: valid for writes of that many bytes, and borrowed.
                    unsafe { self.read_now(buffer.as_mut_ptr(), buffer.len()) }
                }
                Some(journal) => journal.read(self, batch.buffer()),
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

    /// `read(2)` that never waits, whatever others have made of the open file.
    ///
    /// # Safety
    /// `to` is valid for writes of `len` bytes, and no reference to them is used meanwhile.
    unsafe fn read_now(&self, to: *mut u8, len: usize) -> io::Result<usize> {
        let read = |flags: Option<i32>| {
            let fd = self.file.as_raw_fd();
            let read = match flags {
                // SAFETY: by this function's contract.
                None => unsafe { libc::read(fd, to.cast(), len) },
                Some(flags) => {
                    let part = libc::iovec { iov_base: to.cast(), iov_len: len };
                    // SAFETY: by this function's contract; one part. The offset -1 is the file's own.
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
        // A kernel before 6.10. One that is made a blocking file just now is still waited for.
        let mut fd = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one initialised `pollfd`.
        match unsafe { libc::poll(&raw mut fd, 1, 0) } {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            1 if fd.revents & libc::POLLIN != 0 => read(None),
            1 => Err(io::Error::other(BAD_REVENTS)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sleeps until messages can be read or `stop` becomes readable or is hung up; `stop` counts first.
    ///
    /// # Errors
    /// What `poll(2)` says; `POLLERR` and `POLLNVAL` of the userfaultfd as an error of their own.
    pub fn wait(&self, stop: BorrowedFd<'_>) -> io::Result<Wait> {
        let interest = |fd: BorrowedFd<'_>| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [interest(self.file.as_fd()), interest(stop)];
        loop {
            // SAFETY: `fds` is an array of that many initialised `pollfd`.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
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
            if fds[0].revents & libc::POLLIN != 0 {
                return Ok(Wait::Readable);
            }
            if fds[0].revents != 0 {
                return Err(io::Error::other(BAD_REVENTS));
            }
        }
    }

    /// # Safety
    /// `request` is a userfaultfd ioctl whose argument is a `T`, and its effect on memory is sound.
    unsafe fn ioctl<T>(&self, request: u32, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: the descriptor is open, and `argument` is valid for reads and writes of the type the
        // caller promises `request` to take.
        unsafe { ioctl(self.file.as_fd(), request, argument) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// # Safety
/// `request` is an ioctl of `fd` whose argument is a pointer to `T`, and its effect on memory is sound.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u32, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: by this function's contract.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// Joins the two ways in which the filling ioctls report: the return value, and a field that holds
/// either the bytes done (then `EAGAIN` only means "less than asked") or a negative errno.
fn progress(outcome: Result<(), Errno>, field: i64, asked: usize) -> Result<usize, Errno> {
    match outcome {
        Ok(()) => Ok(asked),
        Err(Errno(libc::EAGAIN)) if field > 0 => Ok((field as usize).min(asked)),
        Err(errno) => Err(errno),
    }
}

impl Errno {
    fn last() -> Errno {
        Errno(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from(*self).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever has sent a userfaultfd can make its reads wait again.
    #[test]
    fn a_foreign_one_is_read_without_waiting_whatever_its_owner_does() {
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
        // A kernel that can read so says that there is nothing; an older one that this is no way to poll.
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
