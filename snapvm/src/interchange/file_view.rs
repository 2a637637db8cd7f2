//! A file of an export that is read without being written: each byte comes from the snapshot when it is asked for.

use std::ops::Range;

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ChunkBuffer, PageIndex, ReadError, Snapshot};

use super::layout::ImageLayout;

/// The content of one file of an [`Export`](super::Export), to be read at any offset.
#[derive(Debug)]
pub struct FileView {
    name: &'static str,
    len_bytes: u64,
    /// Sorted by offset.
    parts: Vec<Part>,
    /// The ranges that may hold something other than zeros: sorted, with gaps between them.
    data: Vec<Range<u64>>,
}

#[derive(Debug)]
struct Part {
    offset: u64,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Bytes(Vec<u8>),
    /// Source offsets of guest memory.
    Memory(Range<u64>),
}

impl Part {
    fn range(&self) -> Range<u64> {
        let len = match &self.source {
            Source::Bytes(bytes) => bytes.len() as u64,
            Source::Memory(range) => range.end - range.start,
        };
        self.offset..self.offset + len
    }
}

impl FileView {
    pub(super) fn of_bytes(name: &'static str, bytes: Vec<u8>) -> Self {
        let len_bytes = bytes.len() as u64;
        Self::new(
            name,
            len_bytes,
            vec![Part { offset: 0, source: Source::Bytes(bytes) }],
            Vec::new(),
        )
    }

    /// A file with memory, and other bytes at their offsets.
    pub(super) fn of_memory(
        name: &'static str,
        others: &[(u64, Vec<u8>)],
        layout: &ImageLayout,
        len_bytes: u64,
        snapshot: &Snapshot,
    ) -> Self {
        let other = |(offset, bytes): &(u64, Vec<u8>)| Part {
            offset: *offset,
            source: Source::Bytes(bytes.clone()),
        };
        let mut parts: Vec<_> = others.iter().map(other).collect();
        parts.extend(layout.extents.iter().map(|extent| Part {
            offset: extent.file_offset,
            source: Source::Memory(extent.source_offset..extent.source_offset + extent.len),
        }));
        let populated = snapshot.populated().flat_map(|range| layout.parts(range));
        let data = populated.map(|(offset, len)| offset..offset + len as u64).collect();
        Self::new(name, len_bytes, parts, data)
    }

    fn new(
        name: &'static str,
        len_bytes: u64,
        mut parts: Vec<Part>,
        mut data: Vec<Range<u64>>,
    ) -> Self {
        parts.sort_by_key(|part| part.offset);
        let bytes = parts.iter().filter(|part| matches!(part.source, Source::Bytes(_)));
        data.extend(bytes.map(Part::range));
        data.sort_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in data {
            match joined.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => joined.push(range),
            }
        }
        Self { name, len_bytes, parts, data: joined }
    }

    /// The name that the file has in an export to a folder, or that [`Export::views`](super::Export::views) gives.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The length of the file.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether any of its bytes come from guest memory.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        self.parts.iter().any(|part| matches!(part.source, Source::Memory(_)))
    }

    /// The ranges of the file that may hold something other than zeros, in steps of 2 MiB of memory: ascending, with gaps
    /// between them.
    #[must_use]
    pub fn data(&self) -> &[Range<u64>] {
        &self.data
    }

    /// The first offset from `offset` on with data, as SEEK_DATA of lseek(2) returns it; `None` if there is none.
    #[must_use]
    pub fn next_data(&self, offset: u64) -> Option<u64> {
        let range = self.data.get(self.data.partition_point(|range| range.end <= offset))?;
        Some(range.start.max(offset))
    }

    /// The first offset from `offset` on without data, as SEEK_HOLE of lseek(2) returns it: the end of the file if no
    /// hole comes before it; `None` behind that.
    #[must_use]
    pub fn next_hole(&self, offset: u64) -> Option<u64> {
        let range = self.data.get(self.data.partition_point(|range| range.end <= offset));
        let hole = range.filter(|range| range.start <= offset).map_or(offset, |range| range.end);
        (offset < self.len_bytes).then_some(hole)
    }

    /// Where source offsets of guest memory are in the file, in order.
    pub fn places(&self, memory: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        self.parts.iter().filter_map(move |part| {
            let Source::Memory(range) = &part.source else { return None };
            let (start, end) = (memory.start.max(range.start), memory.end.min(range.end));
            (start < end).then(|| {
                let offset = part.offset + (start - range.start);
                offset..offset + (end - start)
            })
        })
    }

    /// Reads `out.len()` bytes from `offset` on, or fewer at the end of the file; returns how many. `snapshot` is the one
    /// that the export was made of.
    ///
    /// # Errors
    /// [`ReadError`] when a page is unreadable or damaged. The bytes before it are in `out`.
    pub fn read_at(
        &self,
        snapshot: &Snapshot,
        offset: u64,
        out: &mut [u8],
        buffer: &mut ChunkBuffer,
    ) -> Result<usize, ReadError> {
        let rest = self.len_bytes.saturating_sub(offset);
        let len = rest.min(out.len() as u64) as usize;
        let out = &mut out[..len];
        // Ranges of a foreign layout may leave gaps in their file.
        let mut done = 0;
        let first = self.parts.partition_point(|part| part.range().end <= offset);
        for part in &self.parts[first..] {
            let range = part.range();
            let end = offset + len as u64;
            if range.start >= end {
                break;
            }
            let start = range.start.max(offset);
            let (from, to) = ((start - offset) as usize, (range.end.min(end) - offset) as usize);
            out[done..from].fill(0);
            let within = start - range.start;
            match &part.source {
                Source::Bytes(bytes) => {
                    let within = within as usize;
                    out[from..to].copy_from_slice(&bytes[within..within + (to - from)]);
                }
                Source::Memory(memory) => {
                    read_memory(snapshot, memory.start + within, &mut out[from..to], buffer)?;
                }
            }
            done = to;
        }
        out[done..].fill(0);
        Ok(len)
    }
}

/// Reads guest memory at a source offset.
fn read_memory(
    snapshot: &Snapshot,
    source_offset: u64,
    out: &mut [u8],
    buffer: &mut ChunkBuffer,
) -> Result<(), ReadError> {
    let page_bytes = PAGE_BYTES as u64;
    let mut done = 0;
    while done < out.len() {
        let at = source_offset + done as u64;
        let within = (at % page_bytes) as usize;
        let now = (PAGE_BYTES - within).min(out.len() - done);
        let place = &mut out[done..done + now];
        // Memory has at most 2^32 pages.
        match snapshot.page(PageIndex((at / page_bytes) as u32), buffer)? {
            Some(bytes) => place.copy_from_slice(&bytes[within..within + now]),
            None => place.fill(0),
        }
        done += now;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::interchange::{Export, ExportFormat, Import, MemoryImage};

    /// 8 MiB of memory, of which the pages of the second and the last 2 MiB differ from zero and from each other.
    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 8 << 20];
        for (number, page) in bytes.chunks_mut(PAGE_BYTES).enumerate() {
            if matches!(number / 512, 1 | 3) && number % 3 != 0 {
                page.fill(number as u8 | 1);
                page[..8].copy_from_slice(&number.to_le_bytes());
            }
        }
        bytes
    }

    fn imported(image: &[u8]) -> Snapshot {
        let folder = tempfile::tempdir().unwrap();
        let (raw, snap) = (folder.path().join("raw"), folder.path().join("snap"));
        std::fs::write(&raw, image).unwrap();
        let (low, high) = (0..4 << 20, (1 << 32)..(1 << 32) + (4 << 20));
        let import = Import::raw(MemoryImage::open(&raw).unwrap(), Some(&[low, high])).unwrap();
        let go = |_| ControlFlow::Continue(());
        import.write(&snap, &snapfmt::WriteOptions::default(), &go).unwrap();
        Snapshot::open(&snap).unwrap()
    }

    #[test]
    fn any_range_has_the_bytes_of_the_export() {
        let image = image();
        let snapshot = imported(&image);
        for format in [ExportFormat::Raw, ExportFormat::Elf] {
            let export = Export::new(&snapshot, format).unwrap();
            let mut expected = Vec::new();
            export.stream(&mut expected, &|_| ControlFlow::Continue(())).unwrap();
            let views = export.views();
            let [view] = &views[..] else { panic!("one file") };
            assert_eq!(view.len_bytes(), expected.len() as u64);
            let mut buffer = ChunkBuffer::new();
            for (offset, len) in [
                (0, 100),
                (1, 70),
                (4095, 2),
                (4000, 9000),
                ((2 << 20) - 10, 3 << 20),
                ((4 << 20) - 1, (1 << 20) + 17),
                (expected.len() - 5, 100),
                (expected.len(), 10),
                (0, expected.len()),
            ] {
                let mut out = vec![0xee; len];
                let read = view.read_at(&snapshot, offset as u64, &mut out, &mut buffer).unwrap();
                let end = expected.len().min(offset + len);
                assert_eq!(read, end - offset, "{offset} {len}");
                assert!(out[..read] == expected[offset..end], "{offset} {len}");
            }
            // What is outside of its data is zero.
            let mut last = 0;
            for range in view.data() {
                let gap = &expected[last..range.start as usize];
                assert!(gap.iter().all(|byte| *byte == 0));
                last = range.end as usize;
            }
            assert!(expected[last..].iter().all(|byte| *byte == 0));
            assert_eq!(view.next_data(last as u64), None);
            for range in view.data() {
                assert_eq!(view.next_data(range.start), Some(range.start));
                assert_eq!(view.next_data(range.end - 1), Some(range.end - 1));
                assert_eq!(view.next_hole(range.start), Some(range.end));
                if range.end < view.len_bytes() {
                    assert_eq!(view.next_hole(range.end), Some(range.end));
                }
            }
            assert_eq!(view.next_hole(view.len_bytes()), None);
            let data: u64 = view.data().iter().map(|range| range.end - range.start).sum();
            assert!(data < view.len_bytes(), "holes are known");
        }
    }

    #[test]
    fn places_of_memory_are_found_in_the_file() {
        let snapshot = imported(&image());
        let export = Export::new(&snapshot, ExportFormat::Elf).unwrap();
        let view = export.views().remove(0);
        let head = view.len_bytes() - (8 << 20);
        let places: Vec<_> = view.places(4096..12288).collect();
        assert_eq!(places, [head + 4096..head + 12288]);
        assert_eq!(view.places(8 << 20..9 << 20).count(), 0);
    }
}
