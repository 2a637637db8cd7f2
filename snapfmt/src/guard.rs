//! Detects whether a file was overwritten since it was opened. `snap` replaces snapshots by renaming, but `cp`, `cat >`
//! and `rsync --inplace` overwrite a file from which a guest may be running.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Part, ReadError};
use crate::header::Header;
use crate::layout::{H_CRC, HEADER_BYTES, u32_at};
use crate::read_at::ReadAt;

/// A stamp of a storage's content, which is available without reading it and changes with a write.
///
/// Times are nanoseconds since 1970, modulo 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Its length in bytes.
    pub len_bytes: u64,
    /// When it was last written to. Programs may set this back (`cp -p`, `rsync -t`).
    pub modified_ns: u64,
    /// When it was last written to, or its name, mode, owner or times were changed. Programs cannot set this.
    pub changed_ns: u64,
}

impl Stamp {
    /// Whether it was written to between this stamp and the other one, unless its time was set back afterwards.
    pub(crate) fn before_a_write(&self, later: &Stamp) -> bool {
        (self.len_bytes, self.modified_ns) != (later.len_bytes, later.modified_ns)
    }
}

/// Keeps the stamp of a file from when it was opened.
pub(crate) struct Guard {
    opened: Stamp,
    header_crc: u32,
    /// The latest change time at which the content was found unchanged.
    changed_ns: AtomicU64,
}

impl Guard {
    /// `opened`: from before the header was read.
    pub(crate) fn new(opened: Stamp, header: &Header) -> Self {
        let changed_ns = AtomicU64::new(opened.changed_ns);
        Self { opened, header_crc: header.crc, changed_ns }
    }

    /// An error if the storage was written to since it was opened; then bytes that were read before this call must not
    /// be used. Otherwise they are the bytes of the opened file, because the kernel sets the times of a file before it
    /// writes to it.
    pub(crate) fn check(&self, storage: &dyn ReadAt) -> Result<(), ReadError> {
        let failed = |source| ReadError::io(Part::Header, 0, HEADER_BYTES as u64, source);
        let Some(found) = storage.stamp().map_err(failed)? else { return Ok(()) };
        if !self.opened.before_a_write(&found) {
            if found.changed_ns == self.changed_ns.load(Ordering::Relaxed) {
                return Ok(());
            }
            // It was renamed, linked, unlinked or got another mode; or it was overwritten completely and its
            // modification time was set back. In the second case it has another header.
            let mut header = [0; HEADER_BYTES];
            storage.read_exact_at(&mut header, 0).map_err(failed)?;
            let crc = crc32fast::hash(&header[..H_CRC]);
            if (crc, u32_at(&header, H_CRC)) == (self.header_crc, self.header_crc) {
                self.changed_ns.store(found.changed_ns, Ordering::Relaxed);
                return Ok(());
            }
        }
        Err(ReadError::Changed { opened: self.opened, found, source: None })
    }
}
