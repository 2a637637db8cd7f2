//! What a core dump of this process has.
//!
//! The mappings of guest memory are left out of core dumps by `MADV_DONTDUMP`. But pages of a guest are also in the heap
//! and on stacks: chunks that are decoded, copies for a live snapshot, bytes on their way between devices and the guest, and
//! what compressors keep. So all memory of the process is left out (core(5), "Controlling which mappings are written").

use std::io::ErrorKind;

use anyhow::{Context, Result, bail};

/// With the value 1, core dumps have what the kernel's filter says, and so pages of guests.
const WANTED: &str = "SNAP_CORE_DUMPS";
const FILTER: &str = "/proc/self/coredump_filter";
/// Bit 4: the ELF headers of mapped files. So a dump has the registers of all threads, which may hold some bytes of a page,
/// and says which files were mapped.
const HEADERS: &str = "0x10";

/// Leaves memory out of core dumps of this process, unless the user wants it in them.
///
/// # Errors
/// The filter cannot be set, or the variable has another value.
pub(crate) fn leave_memory_out() -> Result<()> {
    match std::env::var_os(WANTED) {
        Some(wanted) if wanted == "1" => return Ok(()),
        Some(wanted) if !wanted.is_empty() => {
            bail!("{WANTED} is {wanted:?}: expected 1 for memory in core dumps, or nothing")
        }
        _ => {}
    }
    match std::fs::write(FILTER, HEADERS) {
        // A kernel without core dumps, or no /proc: then most commands say so themselves.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        written => written.with_context(|| {
            format!("cannot leave memory out of core dumps: {FILTER} ({WANTED}=1 leaves it in)")
        }),
    }
}
