//! A list of pages that will probably be needed, and how much work it may cause.

use std::ops::Range;

/// The limit of decoded bytes: this many for each byte of the listed pages (one chunk of 16 pages for each page), plus
/// `DECODED_ANYHOW`.
const DECODED_PER_LISTED: u64 = 16;
const DECODED_ANYHOW: u64 = 64 << 20;

/// Returns the pages as ranges of source offsets in bytes. Called on the thread that prefetches.
pub(crate) type PageList = Box<dyn FnOnce() -> Vec<Range<u64>> + Send>;

/// Called on that thread before the first install. It may wait.
pub(crate) type Ready = Box<dyn FnOnce() + Send>;

/// The parts of the ranges that are within the source, and how many bytes may be decoded for them.
pub(crate) fn within(mut ranges: Vec<Range<u64>>, len_bytes: u64) -> (Vec<Range<u64>>, u64) {
    for range in &mut ranges {
        range.end = range.end.min(len_bytes);
    }
    ranges.retain(|range| range.start < range.end);
    let listed = ranges.iter().fold(0u64, |sum, range| sum.saturating_add(range.end - range.start));
    (ranges, listed.saturating_mul(DECODED_PER_LISTED).saturating_add(DECODED_ANYHOW))
}
