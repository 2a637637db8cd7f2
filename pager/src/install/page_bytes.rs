//! One byte for each page, first zero. Creating them costs the same for any size of memory.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use crate::mapping::Mapping;

/// The bytes of `pages` pages.
#[derive(Debug)]
pub(crate) struct PageBytes {
    mapping: Arc<Mapping>,
    offset: usize,
    pages: usize,
}

impl PageBytes {
    /// Maps the memory and does not fill it: only the parts that are read become resident (4096 bytes for 16 MiB of
    /// guest memory). An allocator might return reused memory and clear it.
    ///
    /// # Errors
    /// As mmap(2).
    pub(crate) fn zeros(pages: usize) -> io::Result<PageBytes> {
        let mapping = Arc::new(Mapping::anonymous(pages.max(1))?);
        Ok(PageBytes { mapping, offset: 0, pages })
    }

    /// The bytes that are in the mapping at `offset`.
    #[cfg(feature = "serve")]
    pub(crate) fn within(mapping: Arc<Mapping>, offset: usize, pages: usize) -> PageBytes {
        mapping.at(offset, pages);
        PageBytes { mapping, offset, pages }
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn at(&self, page: u64) -> &AtomicU8 {
        let page = page as usize;
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let byte = self.mapping.at(self.offset + page, 1).cast::<AtomicU8>();
        // SAFETY: the byte is mapped, readable and writable as long as `self` lives. All bit patterns are valid for an
        // AtomicU8, and the byte is accessed as nothing else.
        unsafe { byte.as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "page 5 of 5")]
    fn a_page_outside_is_refused() {
        PageBytes::zeros(5).expect("5 bytes can be mapped").at(5);
    }
}
