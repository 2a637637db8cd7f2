//! What this kernel can enforce.
#![allow(unsafe_code)]

use std::ptr;

use libc::{SECCOMP_GET_ACTION_AVAIL, SECCOMP_RET_TRAP, c_long};

/// LANDLOCK_CREATE_RULESET_VERSION of linux/landlock.h: the call returns the version of the interface.
const RULESET_VERSION: c_long = 1;

/// What this kernel can enforce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Support {
    /// Filters of system calls, with the action that the jail uses. The jail needs them.
    pub seccomp: bool,
    /// The version of Landlock's interface, from 1 on; 0 where the kernel has no Landlock, or it is switched off.
    pub landlock_abi: u32,
}

/// Asks the kernel. This changes nothing in this process.
#[must_use]
pub fn support() -> Support {
    let action: u32 = SECCOMP_RET_TRAP;
    let no_flags: c_long = 0;
    // SAFETY: the kernel reads 4 bytes, which `action` has, and writes nothing.
    let seccomp = unsafe {
        libc::syscall(libc::SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, no_flags, &raw const action)
    };
    let (no_attributes, no_bytes) = (ptr::null::<u8>(), 0_usize);
    // SAFETY: with this flag the kernel takes no attributes and only returns a number.
    let abi = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, no_attributes, no_bytes, RULESET_VERSION)
    };
    Support { seccomp: seccomp == 0, landlock_abi: u32::try_from(abi).unwrap_or(0) }
}
