//! A `Vec<u8>` as a source, for examples, tests and small in-memory snapshots.

use std::sync::Arc;

use crate::source::error::SourceError;
use crate::source::load::{Load, LoadCost, LoadedPage, LoadedPages, PageReader};
use crate::source::page_source::PageSource;

/// Pages from a vector. A fault loads the whole aligned chunk around its page. A chunk of zeros is returned as
/// [`Load::Zero`].
///
/// ```
/// use pager::{Load, PageSource, VecSource};
///
/// let source = VecSource::new(vec![7; 8192], 4096);
/// let mut reader = source.reader(4096)?;
/// match reader.load(4096)? {
///     Load::Pages(loaded) => assert_eq!(loaded.bytes, [7; 4096]),
///     _ => unreachable!("the page is not zero"),
/// }
/// # Ok::<(), pager::SourceError>(())
/// ```
#[derive(Clone, Debug)]
pub struct VecSource {
    bytes: Arc<Vec<u8>>,
    /// Which chunks are all zeros. This is computed in advance: reading a chunk that is not in the cache costs as much
    /// as the rest of an answer.
    zero: Arc<[bool]>,
    chunk_bytes: usize,
}

impl VecSource {
    /// `bytes` in chunks of `chunk_bytes` bytes, a multiple of the page size of the paged memory. The last chunk is
    /// filled up with zeros.
    pub fn new(mut bytes: Vec<u8>, chunk_bytes: usize) -> VecSource {
        let chunk_bytes = chunk_bytes.max(1);
        bytes.resize(bytes.len().next_multiple_of(chunk_bytes), 0);
        let zero = bytes.chunks(chunk_bytes).map(|chunk| chunk.iter().all(|&byte| byte == 0));
        VecSource { zero: zero.collect(), bytes: Arc::new(bytes), chunk_bytes }
    }
}

impl PageSource for VecSource {
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        if page_bytes == 0 || !self.chunk_bytes.is_multiple_of(page_bytes) {
            return Err(SourceError::permanent(format!(
                "chunks of {} bytes do not hold whole pages of {page_bytes} bytes",
                self.chunk_bytes
            )));
        }
        let pages = Vec::with_capacity(self.chunk_bytes / page_bytes);
        Ok(Box::new(VecReader { source: self.clone(), page_bytes, pages }))
    }

    fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

struct VecReader {
    source: VecSource,
    page_bytes: usize,
    pages: Vec<LoadedPage>,
}

impl PageReader for VecReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        let chunk_bytes = self.source.chunk_bytes;
        let chunk = usize::try_from(source_offset).ok().and_then(|offset| {
            let start = offset - offset % chunk_bytes;
            Some((start, self.source.bytes.get(start..start.checked_add(chunk_bytes)?)?))
        });
        let Some((start, bytes)) = chunk else {
            return Err(SourceError::permanent(format!(
                "offset {source_offset:#x} is beyond the source's {:#x} bytes",
                self.source.bytes.len()
            )));
        };
        if self.source.zero[start / chunk_bytes] {
            return Ok(Load::Zero { range: start as u64..(start + chunk_bytes) as u64 });
        }
        self.pages.clear();
        self.pages.extend((0..chunk_bytes).step_by(self.page_bytes).map(|buffer_offset| {
            LoadedPage { source_offset: (start + buffer_offset) as u64, buffer_offset }
        }));
        let cost = LoadCost { bytes_read: chunk_bytes as u64, ..LoadCost::default() };
        Ok(Load::Pages(LoadedPages { bytes, pages: &self.pages, cost }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_comes_whole_and_zeros_are_said_to_be_zeros() {
        let mut bytes = vec![0; 3 * 8192];
        bytes[8192 + 4096] = 9;
        let source = VecSource::new(bytes, 8192);
        let mut reader = source.reader(4096).expect("4096 divides 8192");
        match reader.load(4096).expect("inside") {
            Load::Zero { range } => assert_eq!(range, 0..8192),
            other => panic!("{other:?}"),
        }
        match reader.load(8192).expect("inside") {
            Load::Pages(loaded) => {
                assert_eq!(loaded.bytes[4096], 9);
                assert_eq!(
                    loaded.pages.iter().map(|p| p.source_offset).collect::<Vec<_>>(),
                    [8192, 12288]
                );
            }
            other => panic!("{other:?}"),
        }
        assert!(reader.load(3 * 8192).is_err());
        assert!(reader.load(u64::MAX - 4095).is_err());
    }

    #[test]
    fn a_page_larger_than_a_chunk_is_refused() {
        assert!(VecSource::new(vec![1; 4096], 4096).reader(8192).is_err());
    }
}
