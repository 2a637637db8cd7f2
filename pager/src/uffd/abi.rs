//! The numbers and structures of the kernel's userfaultfd interface.
//!
//! The structures come from `linux-raw-sys` (generated from the kernel's own headers). The ioctl
//! numbers are computed here, because that crate lacks some, and compared at compile time with the
//! ones it has. Source: `include/uapi/linux/userfaultfd.h`, `Documentation/admin-guide/mm/userfaultfd.rst`.

use std::mem::{offset_of, size_of};

use linux_raw_sys::general::{
    _UFFDIO_API, _UFFDIO_COPY, _UFFDIO_POISON, _UFFDIO_REGISTER, _UFFDIO_UNREGISTER, _UFFDIO_WAKE,
    _UFFDIO_WRITEPROTECT, _UFFDIO_ZEROPAGE, UFFDIO, uffd_msg,
};
pub(crate) use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE,
    UFFD_EVENT_UNMAP, UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE,
    UFFDIO_COPY_MODE_DONTWAKE, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, uffdio_api,
    uffdio_copy, uffdio_poison, uffdio_range, uffdio_register, uffdio_writeprotect,
    uffdio_zeropage,
};
use linux_raw_sys::ioctl;

/// Bytes of one message as `read(2)` returns it.
pub(crate) const MESSAGE_BYTES: usize = size_of::<uffd_msg>();

const WRITE: u32 = 1;
const READ: u32 = 2;

/// The generic `_IOC` encoding (x86, arm, riscv, s390).
const fn ioc(direction: u32, number: u32, size: usize) -> u32 {
    (direction << 30) | ((size as u32) << 16) | (UFFDIO << 8) | number
}

/// On `/dev/userfaultfd`: a new userfaultfd; the argument is its flags.
pub(crate) const USERFAULTFD_IOC_NEW: u32 = ioc(0, 0, 0);
pub(crate) const UFFDIO_API: u32 = ioc(READ | WRITE, _UFFDIO_API, size_of::<uffdio_api>());
pub(crate) const UFFDIO_REGISTER: u32 =
    ioc(READ | WRITE, _UFFDIO_REGISTER, size_of::<uffdio_register>());
pub(crate) const UFFDIO_UNREGISTER: u32 = ioc(READ, _UFFDIO_UNREGISTER, size_of::<uffdio_range>());
pub(crate) const UFFDIO_WAKE: u32 = ioc(READ, _UFFDIO_WAKE, size_of::<uffdio_range>());
pub(crate) const UFFDIO_COPY: u32 = ioc(READ | WRITE, _UFFDIO_COPY, size_of::<uffdio_copy>());
pub(crate) const UFFDIO_ZEROPAGE: u32 =
    ioc(READ | WRITE, _UFFDIO_ZEROPAGE, size_of::<uffdio_zeropage>());
pub(crate) const UFFDIO_WRITEPROTECT: u32 =
    ioc(READ | WRITE, _UFFDIO_WRITEPROTECT, size_of::<uffdio_writeprotect>());
pub(crate) const UFFDIO_POISON: u32 = ioc(READ | WRITE, _UFFDIO_POISON, size_of::<uffdio_poison>());

/// Of `UFFDIO_WRITEPROTECT`: protect; without it, take the protection away. `linux-raw-sys` lacks it.
pub(crate) const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;

/// The bit of `UFFDIO_ZEROPAGE` in the set of ioctls that `UFFDIO_REGISTER` answers.
pub(crate) const ZEROPAGE_IOCTL_BIT: u64 = 1 << _UFFDIO_ZEROPAGE;
/// The bit of `UFFDIO_WRITEPROTECT` there.
pub(crate) const WRITEPROTECT_IOCTL_BIT: u64 = 1 << _UFFDIO_WRITEPROTECT;

const _: () = {
    assert!(UFFDIO_API == ioctl::UFFDIO_API);
    assert!(UFFDIO_REGISTER == ioctl::UFFDIO_REGISTER);
    assert!(UFFDIO_UNREGISTER == ioctl::UFFDIO_UNREGISTER);
    assert!(UFFDIO_WAKE == ioctl::UFFDIO_WAKE);
    assert!(UFFDIO_COPY == ioctl::UFFDIO_COPY);
    assert!(UFFDIO_ZEROPAGE == ioctl::UFFDIO_ZEROPAGE);
    assert!(UFFDIO_WRITEPROTECT == ioctl::UFFDIO_WRITEPROTECT);
    assert!(UFFDIO_POISON == 0xc020_aa08);
    assert!(USERFAULTFD_IOC_NEW == 0xaa00);

    assert!(size_of::<uffdio_api>() == 24);
    assert!(size_of::<uffdio_range>() == 16);
    assert!(size_of::<uffdio_register>() == 32);
    assert!(size_of::<uffdio_copy>() == 40);
    assert!(size_of::<uffdio_zeropage>() == 32);
    assert!(size_of::<uffdio_poison>() == 32);
    assert!(size_of::<uffdio_writeprotect>() == 24);

    // `message.rs` reads the fields at these offsets.
    assert!(MESSAGE_BYTES == 32);
    assert!(offset_of!(uffd_msg, event) == 0);
    assert!(offset_of!(uffd_msg, arg) == 8);
};
