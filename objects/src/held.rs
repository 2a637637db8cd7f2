//! Bytes of an object that are kept in memory while it is open: its header, which answers are compared with, and what a
//! name has of its end.

use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use snapfmt::layout::HEADER_BYTES;

/// The kept bytes. The cache may drop its own copy of them.
#[derive(Debug, Default)]
pub(crate) struct Held(RwLock<Parts>);

#[derive(Debug, Default)]
struct Parts {
    /// Empty: not known.
    header: Bytes,
    /// The offset of the tail, and the tail.
    tail: (u64, Bytes),
}

impl Held {
    /// Keeps the header of an object that begins with these bytes, unless one is kept already.
    pub(crate) fn keep_header(&self, front: &[u8]) {
        let mut parts = self.write();
        if parts.header.is_empty() {
            // A copy: a part of a block would keep the whole block.
            parts.header = Bytes::copy_from_slice(&front[..front.len().min(HEADER_BYTES)]);
        }
    }

    /// Keeps the bytes from an offset up to the end of the object.
    pub(crate) fn keep_tail(&self, offset: u64, bytes: Bytes) {
        self.write().tail = (offset, bytes);
    }

    /// Drops what the tail has before this offset.
    pub(crate) fn drop_tail_before(&self, offset: u64) {
        let (start, tail) = &mut self.write().tail;
        let extra = offset.saturating_sub(*start).min(tail.len() as u64);
        *tail = tail.slice(extra as usize..);
        *start += extra;
    }

    /// Drops the header or the tail, if it has one of these bytes: they are damaged.
    pub(crate) fn drop_damaged(&self, bytes: &Range<u64>) {
        let mut parts = self.write();
        if bytes.start < parts.header.len() as u64 {
            parts.header = Bytes::new();
        }
        let (start, tail) = &parts.tail;
        if bytes.start < start + tail.len() as u64 && *start < bytes.end {
            parts.tail = Default::default();
        }
    }

    /// The header. `None`: it is not known.
    pub(crate) fn header(&self) -> Option<Bytes> {
        let header = self.parts().header.clone();
        (!header.is_empty()).then_some(header)
    }

    /// Whether all of these bytes are kept.
    pub(crate) fn has(&self, bytes: &Range<u64>) -> bool {
        self.parts().find(bytes).is_some()
    }

    /// Fills `buf` with the bytes at `offset`. Returns `false` if some are not kept.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> bool {
        let Some(end) = offset.checked_add(buf.len() as u64) else { return false };
        match self.parts().find(&(offset..end)) {
            Some(found) => {
                buf.copy_from_slice(found);
                true
            }
            None => false,
        }
    }

    fn parts(&self) -> RwLockReadGuard<'_, Parts> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Parts> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parts {
    fn find(&self, bytes: &Range<u64>) -> Option<&[u8]> {
        let (start, tail) = &self.tail;
        let of = |kept: &'_ Bytes, start: u64| {
            let (from, to) = (bytes.start.checked_sub(start)?, bytes.end.checked_sub(start)?);
            (from < to && to <= kept.len() as u64).then_some(from as usize..to as usize)
        };
        match of(&self.header, 0) {
            Some(range) => Some(&self.header[range]),
            None => of(tail, *start).map(|range| &tail[range]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_until_it_is_dropped() {
        let held = Held::default();
        assert_eq!(held.header(), None);
        let front: Vec<u8> = (0..5000).map(|at| (at % 251) as u8).collect();
        held.keep_header(&front);
        held.keep_header(&[9; 5000]);
        assert_eq!(held.header().expect("it is kept"), &front[..HEADER_BYTES]);
        held.keep_tail(10_000, Bytes::from_static(b"0123456789"));
        let mut bytes = [0; 4];
        assert!(held.read(10_003, &mut bytes) && bytes == *b"3456");
        assert!(held.read(4092, &mut bytes) && bytes == front[4092..4096]);
        for outside in [4093, 9_999, 10_007, u64::MAX - 1] {
            assert!(!held.read(outside, &mut bytes), "{outside}");
        }
        held.drop_tail_before(10_004);
        assert!(!held.has(&(10_003..10_005)) && held.has(&(10_004..10_010)));
        assert!(held.read(10_006, &mut bytes) && bytes == *b"6789");
        held.drop_damaged(&(5000..10_004));
        assert!(held.has(&(0..4096)) && held.has(&(10_004..10_010)));
        held.drop_damaged(&(10_009..10_010));
        assert!(!held.has(&(10_004..10_005)) && held.header().is_some());
        held.drop_damaged(&(0..1));
        assert_eq!(held.header(), None);
    }
}
