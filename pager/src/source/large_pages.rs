//! Builds large pages (hugetlbfs) from a source of small ones.

use std::sync::{Arc, Mutex, PoisonError};

use crate::source::error::SourceError;
use crate::source::load::{Load, LoadCost, LoadedPage, LoadedPages, PageReader, WhenReady};

/// A reader with large pages. It builds each of them from many loads of a reader with small pages.
pub(crate) struct LargePages {
    small: Box<dyn PageReader>,
    small_bytes: usize,
    page: Vec<u8>,
    /// Which small pages are loaded.
    filled: Vec<bool>,
    listed: [LoadedPage; 1],
}

/// The largest page size of any architecture.
const LARGEST_BYTES: usize = 1 << 30;

impl LargePages {
    pub(crate) fn of(
        small: Box<dyn PageReader>,
        small_bytes: usize,
        large_bytes: usize,
    ) -> Result<LargePages, SourceError> {
        if !large_bytes.is_multiple_of(small_bytes) || large_bytes > LARGEST_BYTES {
            let message = format!("no pages of {large_bytes} bytes from pages of {small_bytes}");
            return Err(SourceError::permanent(message));
        }
        Ok(LargePages {
            small,
            small_bytes,
            page: vec![0; large_bytes],
            filled: vec![false; large_bytes / small_bytes],
            listed: [LoadedPage { source_offset: 0, buffer_offset: 0 }],
        })
    }
}

impl LargePages {
    /// The offsets of the small pages of a large one.
    fn small_pages(&self, source_offset: u64) -> impl Iterator<Item = u64> + use<> {
        let end = source_offset.saturating_add(self.page.len() as u64);
        (source_offset..end).step_by(self.small_bytes)
    }
}

impl PageReader for LargePages {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        let LargePages { small, small_bytes, page, filled, listed } = self;
        let small_bytes = *small_bytes;
        let range = source_offset..source_offset.saturating_add(page.len() as u64);
        page.fill(0);
        filled.fill(false);
        let (mut cost, mut zero) = (LoadCost::default(), true);
        while let Some(next) = filled.iter().position(|filled| !filled) {
            match small.load(range.start + (next * small_bytes) as u64)? {
                Load::Zero { range: zeros } => {
                    let end = zeros.end.clamp(range.start, range.end) - range.start;
                    // At least the requested page, whatever the range is.
                    let end = (end as usize / small_bytes).max(next + 1);
                    filled[next..end].fill(true);
                }
                Load::Pages(loaded) => {
                    zero = false;
                    cost += loaded.cost;
                    for one in loaded.pages.iter().filter(|one| range.contains(&one.source_offset))
                    {
                        let at = (one.source_offset - range.start) as usize;
                        let from = one.buffer_offset;
                        let bytes = from
                            .checked_add(small_bytes)
                            .and_then(|end| loaded.bytes.get(from..end))
                            .ok_or_else(|| SourceError::permanent("a page beyond its buffer"))?;
                        page[at..at + small_bytes].copy_from_slice(bytes);
                        filled[at / small_bytes] = true;
                    }
                    if !filled[next] {
                        return Err(SourceError::permanent(
                            "the requested page is not in the answer",
                        ));
                    }
                }
                Load::InFile { .. } => {
                    return Err(SourceError::permanent("pages in a file have their own size"));
                }
            }
        }
        if zero {
            return Ok(Load::Zero { range });
        }
        listed[0].source_offset = source_offset;
        Ok(Load::Pages(LoadedPages { bytes: page, pages: listed, cost }))
    }

    fn would_wait(&mut self, source_offset: u64) -> bool {
        self.small_pages(source_offset).any(|offset| self.small.would_wait(offset))
    }

    /// All small pages that would wait are fetched at the same time.
    fn when_ready(&mut self, source_offset: u64, ready: WhenReady) {
        let mut awaited: Vec<u64> = self.small_pages(source_offset).collect();
        awaited.retain(|offset| self.small.would_wait(*offset));
        let all = Arc::new(All(Mutex::new(Some(ready))));
        for offset in awaited {
            let all = Arc::clone(&all);
            self.small.when_ready(offset, Box::new(move |result| all.one(result)));
        }
    }
}

/// Several waits. It is dropped when all of them have ended.
struct All(Mutex<Option<WhenReady>>);

impl All {
    /// One wait has ended. The first error ends all of them.
    fn one(&self, result: Result<(), SourceError>) {
        if result.is_err() {
            self.end(result);
        }
    }

    fn end(&self, result: Result<(), SourceError>) {
        let ready = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ready) = ready {
            ready(result);
        }
    }
}

impl Drop for All {
    fn drop(&mut self) {
        self.end(Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;
    use crate::{PageSource, VecSource};

    #[test]
    fn a_large_page_is_put_together_of_small_ones() {
        let mut bytes = vec![0; 3 << 20];
        bytes[(2 << 20) - 1] = 7;
        let source = VecSource::new(bytes, 64 << 10);
        let small = source.reader(4096).expect("it has such pages");
        let mut large = LargePages::of(small, 4096, 1 << 20).expect("a multiple");
        assert!(matches!(large.load(0), Ok(Load::Zero { range }) if range == (0..1 << 20)));
        match large.load(1 << 20).expect("it loads") {
            Load::Pages(loaded) => {
                let last = (1 << 20) - 1;
                assert_eq!(
                    (loaded.bytes.len(), loaded.bytes[last], loaded.bytes[last - 1]),
                    (1 << 20, 7, 0)
                );
                assert_eq!(loaded.pages, [LoadedPage { source_offset: 1 << 20, buffer_offset: 0 }]);
                assert_eq!(loaded.cost.bytes_read, 64 << 10);
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(large.load(2 << 20), Ok(Load::Zero { .. })));
        assert!(large.load(3 << 20).is_err());
    }

    /// The small pages from 512 on are on another host. The test ends the waits for them.
    struct Far(Sender<(u64, WhenReady)>);

    impl PageReader for Far {
        fn load(&mut self, _source_offset: u64) -> Result<Load<'_>, SourceError> {
            Err(SourceError::permanent("not in this test"))
        }

        fn would_wait(&mut self, source_offset: u64) -> bool {
            source_offset >= 512 * 4096
        }

        fn when_ready(&mut self, source_offset: u64, ready: WhenReady) {
            self.0.send((source_offset, ready)).expect("the test has the other end");
        }
    }

    #[test]
    fn a_large_page_waits_for_all_its_small_ones_together() {
        let (asked, waits) = channel();
        let mut large = LargePages::of(Box::new(Far(asked)), 4096, 1 << 20).expect("a multiple");
        assert!(!large.would_wait(1 << 20) && large.would_wait(2 << 20));
        for fails in [false, true] {
            let (sender, called) = channel();
            let ready = move |result: Result<(), SourceError>| {
                sender.send(result.is_ok()).expect("the test has the other end");
            };
            large.when_ready(2 << 20, Box::new(ready));
            let mut asked: Vec<_> = waits.try_iter().collect();
            assert!(asked.iter().map(|(at, _)| *at).eq((2 << 20..3 << 20).step_by(4096)));
            // The last page comes first.
            let (_, first) = asked.remove(0);
            asked.into_iter().rev().for_each(|(_, ready)| ready(Ok(())));
            assert!(called.try_recv().is_err());
            match fails {
                true => first(Err(SourceError::permanent("lost"))),
                false => first(Ok(())),
            }
            assert_eq!(called.try_iter().collect::<Vec<_>>(), [!fails]);
        }
    }

    #[test]
    fn odd_and_giant_pages_are_refused() {
        let source = VecSource::new(vec![0; 4096], 4096);
        for size in [6000, 1 << 40] {
            let small = source.reader(4096).expect("it has such pages");
            assert!(LargePages::of(small, 4096, size).is_err());
        }
    }
}
