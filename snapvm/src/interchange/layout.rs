//! Translates between the source space and the bytes of a memory image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use snapfmt::MemoryRegion;
use snapfmt::layout::PAGE_BYTES;

use super::error::LayoutError;

/// A part of the source space that is contiguous in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) source_offset: u64,
    pub(super) file_offset: u64,
    pub(super) len: u64,
}

/// How a memory image is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ImageLayout {
    /// Sorted by guest address. Adjacent ranges are one region.
    pub(super) regions: Vec<MemoryRegion>,
    /// Sorted by source offset, without gaps.
    pub(super) extents: Vec<Extent>,
}

impl ImageLayout {
    /// The layout of guest-physical ranges that follow each other in the file. Their addresses may be in any order.
    pub(super) fn new(in_file: &[Range<u64>]) -> Result<Self, LayoutError> {
        let mut file_offset = 0u64;
        let mut placed = Vec::with_capacity(in_file.len());
        for range in in_file {
            placed.push((range.clone(), file_offset));
            // A range that ends before it starts is refused below.
            let len = range.end.saturating_sub(range.start);
            file_offset = file_offset.checked_add(len).ok_or(LayoutError::TooLong)?;
        }
        Self::placed(placed)
    }

    /// The layout of guest-physical ranges, each with its offset in the file. Their places in the file do not overlap.
    pub(super) fn placed(mut placed: Vec<(Range<u64>, u64)>) -> Result<Self, LayoutError> {
        let page = PAGE_BYTES as u64;
        for (Range { start, end }, _) in &placed {
            let (start, end) = (*start, *end);
            if start == end {
                return Err(LayoutError::Empty { gpa: start });
            }
            if !start.is_multiple_of(page) || !end.is_multiple_of(page) || start > end {
                return Err(LayoutError::NotPages { start, end });
            }
        }
        placed.sort_by_key(|(range, _)| range.start);

        let mut regions: Vec<MemoryRegion> = Vec::new();
        let mut extents = Vec::with_capacity(placed.len());
        let mut source_offset = 0;
        for (range, file_offset) in placed {
            let len = range.end - range.start;
            extents.push(Extent { source_offset, file_offset, len });
            match regions.last_mut() {
                Some(last) if range.start < last.gpa + last.len => {
                    return Err(LayoutError::Overlap { gpa: range.start });
                }
                Some(last) if range.start == last.gpa + last.len => last.len += len,
                _ => regions.push(MemoryRegion { gpa: range.start, len, source_offset }),
            }
            source_offset += len;
        }
        Ok(Self { regions, extents })
    }

    /// The layout of a file that contains the source space in its order, from `file_offset` on.
    pub(super) fn linear(regions: &[MemoryRegion], file_offset: u64) -> Self {
        let len = regions.iter().map(|region| region.len).sum();
        let extents = vec![Extent { source_offset: 0, file_offset, len }];
        Self { regions: regions.to_vec(), extents }
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// The length of the file.
    pub(super) fn file_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.file_offset + extent.len).max().unwrap_or(0)
    }

    /// Cuts a range of the source space into its parts in the file: (offset, length), in order.
    pub(super) fn parts(&self, source: Range<u64>) -> impl Iterator<Item = (u64, usize)> + '_ {
        let first = self.extents.partition_point(|e| e.source_offset + e.len <= source.start);
        let end = source.end;
        self.extents[first..].iter().take_while(move |e| e.source_offset < end).map(move |e| {
            let start = source.start.max(e.source_offset);
            let stop = source.end.min(e.source_offset + e.len);
            (e.file_offset + (start - e.source_offset), (stop - start) as usize)
        })
    }

    /// Writes bytes of the source space to their place in the file.
    pub(super) fn write(&self, file: &File, source_offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        for (offset, len) in self.parts(source_offset..source_offset + bytes.len() as u64) {
            let (now, later) = rest.split_at(len);
            file.write_all_at(now, offset)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;

    #[test]
    fn ranges_in_any_order_are_sorted_and_joined() {
        // The file contains the upper page first, then the lower memory in two halves.
        let file = [8 * PAGE..9 * PAGE, 2 * PAGE..4 * PAGE, 0..2 * PAGE];
        let layout = ImageLayout::new(&file).unwrap();
        let region = |gpa, len, source_offset| MemoryRegion { gpa, len, source_offset };
        assert_eq!(layout.regions, [region(0, 4 * PAGE, 0), region(8 * PAGE, PAGE, 4 * PAGE)]);
        let parts: Vec<_> = layout.parts(PAGE..5 * PAGE).collect();
        let page = PAGE_BYTES;
        assert_eq!(parts, [(4 * PAGE, page), (PAGE, 2 * page), (0, page)]);
        assert_eq!(layout.memory_bytes(), 5 * PAGE);
    }

    #[test]
    fn bad_ranges_are_refused() {
        for bad in [
            &[0..2 * PAGE, PAGE..3 * PAGE][..],
            &[0..100],
            &[PAGE..PAGE],
            &[1..PAGE],
            &[0..1 << 63, (1 << 63)..!0xfff, 0..PAGE],
        ] {
            assert!(ImageLayout::new(bad).is_err(), "{bad:x?}");
        }
    }
}
