//! A file of guest memory: which of its bytes are which of the source space, and which are holes.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{MemoryRegion, ReadAt};
use snapvm::StableFile;

/// A part of the source space that lies in one piece in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) source_offset: u64,
    pub(crate) file_offset: u64,
    pub(crate) len: u64,
}

/// How a file of memory is laid out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// By guest address, what touches joined.
    pub(crate) regions: Vec<MemoryRegion>,
    /// By source offset; they fill the source space.
    extents: Vec<Extent>,
}

impl Layout {
    /// Guest-physical ranges that follow each other in the file, in any order of addresses.
    pub(crate) fn new(in_file: &[Range<u64>]) -> Result<Self> {
        let page = PAGE_BYTES as u64;
        let mut file_offset = 0u64;
        let mut placed = Vec::with_capacity(in_file.len());
        for range in in_file {
            let Range { start, end } = *range;
            if start == end {
                bail!("the memory range at {start:#x} is empty");
            }
            if !start.is_multiple_of(page) || !end.is_multiple_of(page) || start > end {
                bail!("the memory range {start:#x}..{end:#x} is not whole pages of {page} bytes");
            }
            placed.push((range.clone(), file_offset));
            file_offset = file_offset
                .checked_add(range.end - range.start)
                .context("the memory ranges have more than 2^64 bytes")?;
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
                    bail!("two memory ranges overlap at gpa {:#x}", range.start);
                }
                Some(last) if range.start == last.gpa + last.len => last.len += len,
                _ => regions.push(MemoryRegion { gpa: range.start, len, source_offset }),
            }
            source_offset += len;
        }
        Ok(Self { regions, extents })
    }

    /// The source space as it is, from `file_offset` on.
    pub(crate) fn linear(regions: &[MemoryRegion], file_offset: u64) -> Self {
        let len = regions.iter().map(|region| region.len).sum();
        let extents = vec![Extent { source_offset: 0, file_offset, len }];
        Self { regions: regions.to_vec(), extents }
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// Where the file ends.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.file_offset + extent.len).max().unwrap_or(0)
    }

    /// Cuts a range of the source space into its parts in the file: (offset, length), in order.
    fn parts(&self, source: Range<u64>) -> impl Iterator<Item = (u64, usize)> + '_ {
        let first = self.extents.partition_point(|e| e.source_offset + e.len <= source.start);
        let end = source.end;
        self.extents[first..].iter().take_while(move |e| e.source_offset < end).map(move |e| {
            let start = source.start.max(e.source_offset);
            let stop = source.end.min(e.source_offset + e.len);
            (e.file_offset + (start - e.source_offset), (stop - start) as usize)
        })
    }

    /// Writes bytes of the source space to their place in the file.
    pub(crate) fn write(&self, file: &File, source_offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        for (offset, len) in self.parts(source_offset..source_offset + bytes.len() as u64) {
            let (now, later) = rest.split_at(len);
            file.write_all_at(now, offset)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

/// A file of memory and its layout: the source space to read from.
pub(crate) struct MemoryFile {
    file: StableFile,
    layout: Layout,
}

impl MemoryFile {
    /// The file must be as long as its layout says.
    pub(crate) fn new(file: File, path: &Path, layout: Layout) -> Result<Self> {
        let named = || path.display().to_string();
        let (found, expected) = (file.metadata().with_context(named)?.len(), layout.memory_bytes());
        if found < expected {
            bail!("{} is {found} bytes long, expected {expected}: it was cut short", named());
        }
        if found > expected {
            bail!("{} is {found} bytes long, expected {expected}", named());
        }
        Ok(Self { file: StableFile::new(file).with_context(named)?, layout })
    }

    pub(crate) fn metadata(&self) -> Result<Metadata> {
        self.file.file().metadata().context("cannot look at the memory file")
    }

    pub(crate) fn regions(&self) -> &[MemoryRegion] {
        &self.layout.regions
    }

    /// The parts of the source space that are no holes of the file (lseek(2), `SEEK_DATA`).
    pub(crate) fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let mut data = Vec::new();
        for extent in &self.layout.extents {
            let end = extent.file_offset + extent.len;
            let to_source = |offset: u64| extent.source_offset + (offset - extent.file_offset);
            let mut at = extent.file_offset;
            while at < end {
                let start = match rustix::fs::seek(self.file.file(), SeekFrom::Data(at)) {
                    Ok(start) if start < end => start,
                    // No data from there on, or not before the end.
                    Ok(_) | Err(Errno::NXIO) => break,
                    Err(error) => return Err(error.into()),
                };
                at = rustix::fs::seek(self.file.file(), SeekFrom::Hole(start))?.min(end);
                data.push(to_source(start)..to_source(at));
            }
        }
        Ok(data)
    }
}

impl ReadAt for MemoryFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buf;
        for (at, len) in self.layout.parts(offset..offset + rest.len() as u64) {
            let (now, later) = rest.split_at_mut(len);
            self.file.read_exact_at(now, at)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.layout.memory_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;

    #[test]
    fn ranges_in_any_order_are_sorted_and_joined() {
        // In the file: the upper GiB first, then the lower memory in two halves.
        let file = [8 * PAGE..9 * PAGE, 2 * PAGE..4 * PAGE, 0..2 * PAGE];
        let layout = Layout::new(&file).unwrap();
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
            assert!(Layout::new(bad).is_err(), "{bad:x?}");
        }
    }

    #[test]
    fn a_permuted_file_reads_and_writes_alike() {
        let file = tempfile::tempfile().unwrap();
        let layout = || Layout::new(&[4 * PAGE..6 * PAGE, 0..2 * PAGE]).unwrap();
        let bytes: Vec<u8> = (0..4 * PAGE).map(|at| (at / 100) as u8).collect();
        layout().write(&file, 0, &bytes).unwrap();
        let memory = MemoryFile::new(file, Path::new("m"), layout()).unwrap();
        let mut found = vec![0; bytes.len()];
        memory.read_exact_at(&mut found, 0).unwrap();
        assert!(found == bytes);
        let mut first = [0; 8];
        memory.file.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first[..], bytes[2 * PAGE as usize..][..8]);
        assert!(memory.read_exact_at(&mut found, PAGE).is_err());
    }

    /// What is imported is one memory, not parts of two.
    #[test]
    fn a_file_that_was_written_to_meanwhile_is_not_read() {
        let file = tempfile::tempfile().unwrap();
        let layout = Layout::new(&[0..2 * PAGE]).unwrap();
        layout.write(&file, 0, &[7; 2 * PAGE_BYTES]).unwrap();
        let memory = MemoryFile::new(file.try_clone().unwrap(), Path::new("m"), layout).unwrap();
        let mut found = [0; PAGE_BYTES];
        memory.read_exact_at(&mut found, 0).unwrap();
        file.write_all_at(&[8], PAGE).unwrap();
        assert!(memory.read_exact_at(&mut found, PAGE).is_err());
    }
}
