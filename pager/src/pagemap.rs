//! The page tables of this process: /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use crate::region::PAGE_BYTES;

const ENTRY_BYTES: usize = 8;

/// Reads the page table entries of pages.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    entries_bytes: Vec<u8>,
}

/// The page table entry of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageTableEntry(u64);

impl PageTableEntry {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;

    /// The page is mapped, or swapped out.
    pub fn is_mapped(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) != 0
    }

    /// The page is mapped or swapped out, and this process has written it into a private mapping: it is neither a page
    /// of a file nor shared. Also a page that userfaultfd has filled with zeros and that was not written to: it is the
    /// kernel's zero page.
    pub fn is_private(self) -> bool {
        self.is_mapped() && self.0 & Self::OF_FILE == 0
    }
}

const PAGEMAP: &str = "/proc/self/pagemap";
/// The file, if it is kept open. It is only read at offsets.
static KEPT: OnceLock<File> = OnceLock::new();

impl Pagemap {
    /// The number of pages of which one call reads the entries at most: 64 KiB of entries, for 32 MiB of memory.
    pub const MAX_PAGES: usize = 8192;

    /// Opens `/proc/self/pagemap` and keeps it open, so that [`Pagemap::open`] opens no file from now on. A program does that
    /// before it changes its root folder. Without the file this has no effect.
    pub fn keep_open() {
        if let Ok(file) = File::open(PAGEMAP) {
            // A second descriptor is closed.
            let _ = KEPT.set(file);
        }
    }

    /// A reader of the page tables of this process.
    ///
    /// # Errors
    /// As open(2) of /proc/self/pagemap.
    pub fn open() -> io::Result<Pagemap> {
        let file = KEPT.get().map_or_else(|| File::open(PAGEMAP), File::try_clone)?;
        Ok(Pagemap { file, entries_bytes: vec![0; Self::MAX_PAGES * ENTRY_BYTES] })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The entries of the `pages` pages from `host_addr` on. `pages` is at most [`Pagemap::MAX_PAGES`].
    ///
    /// # Errors
    /// As pread(2) of /proc/self/pagemap; also if there are too many pages.
    pub fn entries(
        &mut self,
        host_addr: u64,
        pages: usize,
    ) -> io::Result<impl Iterator<Item = PageTableEntry>> {
        if pages > Self::MAX_PAGES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many pages at a time"));
        }
        let bytes = &mut self.entries_bytes[..pages * ENTRY_BYTES];
        self.file.read_exact_at(bytes, host_addr / PAGE_BYTES as u64 * ENTRY_BYTES as u64)?;
        let entries = bytes.as_chunks::<ENTRY_BYTES>().0.iter();
        Ok(entries.map(|entry| PageTableEntry(u64::from_ne_bytes(*entry))))
    }
}
