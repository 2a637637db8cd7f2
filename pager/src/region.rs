//! A region: a range of memory to be paged. Making one from memory of this process is the unsafe step.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// The smallest size of a page, in bytes. Pages of other sizes (hugetlbfs) are a power of two larger.
pub const PAGE_BYTES: usize = 4096;

/// Memory to be filled from `source_offset..source_offset + len_bytes` of the source.
///
/// The memory may be of any kind that userfaultfd supports for missing faults: anonymous memory, memfd (shared or
/// private), hugetlbfs.
#[derive(Clone)]
pub struct Region {
    host_addr: u64,
    len_bytes: u64,
    page_bytes: usize,
    source_offset: u64,
    /// The owner of the mapping. It is dropped after the userfaultfd is closed.
    owner: Option<Arc<dyn Any + Send + Sync>>,
    /// The memory belongs to another process.
    foreign: bool,
}

/// Why memory cannot be a region.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// The page size is not a power of two of at least [`PAGE_BYTES`].
    #[error("page size {page_bytes} is not a power of two of at least {PAGE_BYTES}")]
    PageSize {
        /// The given value.
        page_bytes: usize,
    },
    /// An address, length or offset is not a multiple of the page size.
    #[error("{what} {value:#x} is not a multiple of the page size {page_bytes:#x}")]
    Misaligned {
        /// Which value.
        what: &'static str,
        /// The given value.
        value: u64,
        /// The given value.
        page_bytes: usize,
    },
    /// The region is empty.
    #[error("the region at {host_addr:#x} is empty")]
    Empty {
        /// The given value.
        host_addr: u64,
    },
    /// The addresses or the offsets wrap around.
    #[error("{what} {value:#x} + {len_bytes:#x} is beyond 64 bits")]
    Overflow {
        /// Which value.
        what: &'static str,
        /// The given value.
        value: u64,
        /// The given value.
        len_bytes: u64,
    },
}

impl Region {
    /// The `len_bytes` bytes at `host_addr`, in pages of `page_bytes` bytes. That is the page size of the mapping:
    /// 4096, or the huge page size for hugetlbfs. The content is that of the source at `source_offset`, in bytes.
    ///
    /// # Errors
    /// [`RegionError`] if the region is empty, is not whole pages, or wraps around.
    ///
    /// # Safety
    /// From the start of the pager until it has stopped:
    /// - the range is mapped in this process, readable and writable, and the caller may decide about its content;
    /// - no Rust reference or slice points into it. Access is by volatile or atomic operations on raw pointers, by
    ///   system calls, or by a guest, because the content of a page appears without the knowledge of the compiler.
    pub unsafe fn new(
        host_addr: u64,
        len_bytes: u64,
        page_bytes: usize,
        source_offset: u64,
    ) -> Result<Region, RegionError> {
        Region::checked(host_addr, len_bytes, page_bytes, source_offset, false)
    }

    /// A region of another process, for [`crate::PagerBuilder::foreign`]. `host_addr` is an address in that process.
    /// This is safe, because a pager for memory of this process does not accept it.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn foreign(
        host_addr: u64,
        len_bytes: u64,
        page_bytes: usize,
        source_offset: u64,
    ) -> Result<Region, RegionError> {
        Region::checked(host_addr, len_bytes, page_bytes, source_offset, true)
    }

    fn checked(
        host_addr: u64,
        len_bytes: u64,
        page_bytes: usize,
        source_offset: u64,
        foreign: bool,
    ) -> Result<Region, RegionError> {
        if page_bytes < PAGE_BYTES || !page_bytes.is_power_of_two() {
            return Err(RegionError::PageSize { page_bytes });
        }
        if len_bytes == 0 {
            return Err(RegionError::Empty { host_addr });
        }
        let named =
            [("host address", host_addr), ("length", len_bytes), ("source offset", source_offset)];
        for (what, value) in named {
            if !value.is_multiple_of(page_bytes as u64) {
                return Err(RegionError::Misaligned { what, value, page_bytes });
            }
        }
        for (what, value) in [named[0], named[2]] {
            if value.checked_add(len_bytes).is_none() {
                return Err(RegionError::Overflow { what, value, len_bytes });
            }
        }
        Ok(Region { host_addr, len_bytes, page_bytes, source_offset, owner: None, foreign })
    }

    /// Keeps the owner of the mapping alive until the pager has closed its userfaultfds.
    #[must_use]
    pub fn keeping(mut self, owner: Arc<dyn Any + Send + Sync>) -> Region {
        self.owner = Some(owner);
        self
    }

    /// The regions of a guest memory, in pages of 4096 bytes. Each keeps the memory alive. `source_offset` gets the
    /// guest physical address of the start of each region, and returns the source offset of its content in bytes.
    ///
    /// This is safe, because vm-memory gives only volatile access to the memory that it maps.
    ///
    /// # Errors
    /// [`RegionError`] if a region or an offset is not whole pages.
    #[cfg(feature = "vm-memory")]
    pub fn of_guest_memory<B>(
        memory: &Arc<vm_memory::GuestMemoryMmap<B>>,
        mut source_offset: impl FnMut(vm_memory::GuestAddress) -> u64,
    ) -> Result<Vec<Region>, RegionError>
    where
        B: vm_memory::bitmap::NewBitmap + Send + Sync + 'static,
    {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

        memory
            .iter()
            .map(|mapped| {
                let offset = source_offset(mapped.start_addr());
                // SAFETY: the mapping belongs to `mapped` and lives as long as `memory`, which the region keeps alive.
                // vm-memory makes no reference into it, only volatile accesses.
                let region = unsafe {
                    Region::new(mapped.as_ptr() as u64, mapped.len(), PAGE_BYTES, offset)
                }?;
                Ok(region.keeping(Arc::clone(memory) as Arc<dyn Any + Send + Sync>))
            })
            .collect()
    }

    /// The address of the first byte, in the process that owns the memory.
    pub fn host_addr(&self) -> u64 {
        self.host_addr
    }

    /// The length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The page size in bytes.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Whether the memory belongs to another process.
    pub fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// The source offset of its content, in bytes.
    pub fn source_offset(&self) -> u64 {
        self.source_offset
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("host_addr", &format_args!("{:#x}", self.host_addr))
            .field("len_bytes", &format_args!("{:#x}", self.len_bytes))
            .field("page_bytes", &self.page_bytes)
            .field("source_offset", &format_args!("{:#x}", self.source_offset))
            .field("owner", &self.owner.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(host_addr: u64, len: u64, page: usize, offset: u64) -> Result<Region, RegionError> {
        // SAFETY: no pager is started with it.
        unsafe { Region::new(host_addr, len, page, offset) }
    }

    #[test]
    fn only_whole_pages_that_do_not_wrap() {
        assert!(region(0x1000, 0x2000, 4096, 0x3000).is_ok());
        assert_eq!(
            region(0x1000, 0x2000, 5000, 0).err(),
            Some(RegionError::PageSize { page_bytes: 5000 })
        );
        assert_eq!(
            region(0x1000, 0, 4096, 0).err(),
            Some(RegionError::Empty { host_addr: 0x1000 })
        );
        for (addr, len, offset, what) in [
            (1, 0x1000, 0, "host address"),
            (0, 0x1001, 0, "length"),
            (0, 0x1000, 7, "source offset"),
        ] {
            match region(addr, len, 4096, offset) {
                Err(RegionError::Misaligned { what: named, .. }) => assert_eq!(named, what),
                other => panic!("{other:?}"),
            }
        }
        let top = u64::MAX - 4095;
        assert!(matches!(region(top, 0x1000, 4096, 0), Err(RegionError::Overflow { .. })));
        assert!(matches!(region(0, 0x1000, 4096, top), Err(RegionError::Overflow { .. })));
    }
}
