//! The trait that a source of pages implements.

use std::ops::Range;

use super::error::SourceError;
use super::load::PageReader;
use super::sequence::{PageByPage, PageSequence};

/// A source of pages, addressed by `source_offset` in bytes. All threads of the pager share it.
///
/// A source never does an ioctl and never touches the paged memory. It only returns bytes.
pub trait PageSource: Send + Sync {
    /// A reader for one thread, with its own buffers. Its pages have `page_bytes` bytes.
    ///
    /// # Errors
    /// A permanent [`SourceError`] for a page size that the source does not support.
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError>;

    /// The length in bytes. Every offset below it can be loaded.
    fn len_bytes(&self) -> u64;

    /// The most bytes of it that may not be zero, as far as that is known without reading. On a single CPU,
    /// [`crate::Populate::Auto`] loads what is left when five eighths of these are installed. The default is the length.
    fn data_bytes(&self) -> u64 {
        self.len_bytes()
    }

    /// A loader for pages that are known in advance: ranges of source offsets in bytes, in the order in which the pages
    /// are wanted. The prefetch and the population use it.
    ///
    /// The default loads page by page with a [`PageReader`]. Override it if the source can load many pages together in
    /// an order close to the wanted one.
    ///
    /// # Errors
    /// As [`PageSource::reader`].
    fn sequence(
        &self,
        page_bytes: usize,
        pages: Vec<Range<u64>>,
    ) -> Result<Box<dyn PageSequence>, SourceError> {
        Ok(Box::new(PageByPage::new(self.reader(page_bytes)?, page_bytes, pages)))
    }
}
