//! Core dumps, which would have bytes of the guest's memory.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The value that the kernel gives to its own helpers: a dump is written neither to a file, for which a byte is too short,
/// nor to a program, to which a limit of 0 does not apply (`fs/coredump.c`).
const NONE_BYTES: u64 = 1;

/// Takes from this process, and from those that it starts, the right to leave a core dump. This cannot be undone.
///
/// A hard limit of 0 is not raised to 1, because only CAP_SYS_RESOURCE may: then a program that the host names in
/// `kernel.core_pattern` still gets dumps.
///
/// # Errors
/// As setrlimit(2).
pub fn forbid_core_dumps() -> io::Result<()> {
    if getrlimit(Resource::Core).maximum == Some(0) {
        return Ok(());
    }
    let none = Rlimit { current: Some(NONE_BYTES), maximum: Some(NONE_BYTES) };
    Ok(setrlimit(Resource::Core, none)?)
}
