//! Write protection: a thread that writes to a protected page waits until the protection is taken away.
//!
//! Protection changes no content and removes no page. So its operations are safe, as long as they do not register memory
//! for missing faults: what they can do to a program is to let its writes wait.

use super::abi;
use super::descriptor::Uffd;
use super::errno::Errno;

impl Uffd {
    /// Registers `len` bytes at `host_addr` for write protection only (`UFFDIO_REGISTER`). Nothing is protected yet. If
    /// this userfaultfd served missing pages there, it does so no longer, as after [`Uffd::unregister`].
    ///
    /// # Errors
    /// `EBUSY`: registered with another userfaultfd. `EINVAL`: not mapped, misaligned, or memory of a kind that cannot be
    /// protected in this way, such as a mapping of a file; or a kernel without it.
    pub(crate) fn register_protection(&self, host_addr: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: without missing faults, no page gets content from this userfaultfd.
        unsafe { self.register_mode(host_addr, len, abi::UFFDIO_REGISTER_MODE_WP) }
    }

    /// As [`Uffd::register_protection`], but the memory is also registered for missing faults.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As [`Uffd::register`].
    pub(crate) unsafe fn register_with_protection(
        &self,
        host_addr: u64,
        len: u64,
    ) -> Result<(), Errno> {
        let mode = abi::UFFDIO_REGISTER_MODE_MISSING | abi::UFFDIO_REGISTER_MODE_WP;
        // SAFETY: the contract is the same.
        unsafe { self.register_mode(host_addr, len, mode) }
    }

    /// # Safety
    /// If `mode` has missing faults: as [`Uffd::register`].
    unsafe fn register_mode(&self, host_addr: u64, len: u64, mode: u32) -> Result<(), Errno> {
        let mut argument = abi::uffdio_register {
            range: abi::uffdio_range { start: host_addr, len },
            mode: u64::from(mode),
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes a `uffdio_register`. Registering for write protection changes no content, and
        // the contract of this function covers missing faults.
        unsafe { self.ioctl(abi::UFFDIO_REGISTER, &mut argument) }?;
        match argument.ioctls & abi::WRITEPROTECT_IOCTL_BIT {
            0 => Err(Errno(libc::EINVAL)),
            _ => Ok(()),
        }
    }

    /// Protects the pages of a range from writes, or takes the protection away and wakes the threads that wait there
    /// (`UFFDIO_WRITEPROTECT`). Pages that are not there are left out, unless
    /// [`Features::WRITE_PROTECT_UNPOPULATED`](super::Features) was granted or the memory is shared.
    ///
    /// # Errors
    /// `EAGAIN`: an event is queued, and has to be read first. `ENOENT`: the range is not registered for it.
    pub(crate) fn write_protect(&self, host_addr: u64, len: u64, on: bool) -> Result<(), Errno> {
        let mut argument = abi::uffdio_writeprotect {
            range: abi::uffdio_range { start: host_addr, len },
            mode: if on { abi::UFFDIO_WRITEPROTECT_MODE_WP } else { 0 },
        };
        // SAFETY: UFFDIO_WRITEPROTECT takes a `uffdio_writeprotect`. It changes no content.
        unsafe { self.ioctl(abi::UFFDIO_WRITEPROTECT, &mut argument) }
    }
}
