//! Maps guest memory (anonymous, a raw image or a memfd), and reads and writes it by source offset.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::io::Errno;
use snapfmt::MemoryRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm::MemoryRange;

use crate::error::MemoryError;
use crate::memory_map::gpa_ranges;
use crate::room;
use crate::stable_file::StableFile;

type Result<T> = std::result::Result<T, MemoryError>;

/// Maps anonymous memory for a restored guest.
pub(crate) fn private(ranges: &[MemoryRange]) -> Result<Arc<GuestMemoryMmap>> {
    check_room(ranges)?;
    let regions: Vec<_> =
        ranges.iter().map(|range| (GuestAddress(range.gpa), range.len as usize)).collect();
    Ok(Arc::new(GuestMemoryMmap::from_ranges(&regions).map_err(MemoryError::map)?))
}

/// Maps a raw image privately. Its file offsets are source offsets. The kernel reads a page when it is touched, and the
/// guest's writes stay private. Nothing checks the image's content: see [`StableFile`].
pub(crate) fn image(
    path: &Path,
    ranges: &[MemoryRange],
) -> Result<(StableFile, Arc<GuestMemoryMmap>)> {
    let failed = |error| MemoryError::Image { path: path.to_owned(), error };
    let file = File::open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?.len();
    let expected: u64 = ranges.iter().map(|range| range.len).sum();
    // Touching a page beyond the end of the file would raise SIGBUS.
    if found != expected {
        return Err(MemoryError::ImageLength { path: path.to_owned(), found, expected });
    }
    let image = StableFile::new(file).map_err(failed)?;
    let mapped = map_privately(image.file(), ranges)?;
    Ok((image, mapped))
}

/// Maps a memfd privately, for a pager that records the touched pages.
pub(crate) fn recorded(ranges: &[MemoryRange]) -> Result<(File, Arc<GuestMemoryMmap>)> {
    let file: File = rustix::fs::memfd_create("recorded-memory", MemfdFlags::CLOEXEC)
        .map_err(|error| {
            MemoryError::system("cannot create a memfd for recorded memory")(error.into())
        })?
        .into();
    let memory_bytes = ranges.iter().map(|range| range.len).sum();
    file.set_len(memory_bytes)
        .map_err(MemoryError::system("cannot set the size of the recorded memory"))?;
    let memory = map_privately(&file, ranges)?;
    Ok((file, memory))
}

/// Checks the address space now, and not in the middle of the guest's work.
fn check_room(ranges: &[MemoryRange]) -> Result<()> {
    let memory_bytes = ranges.iter().map(|range| range.len).sum();
    room::check(room::of_guest(memory_bytes)).map_err(MemoryError::map)
}

fn map_privately(file: &File, ranges: &[MemoryRange]) -> Result<Arc<GuestMemoryMmap>> {
    check_room(ranges)?;
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    let map = |range: &MemoryRange| {
        let file = file.try_clone().map_err(MemoryError::map)?;
        let at = FileOffset::new(file, range.source_offset);
        let mapped = MmapRegion::build(Some(at), range.len as usize, prot, flags);
        let mapped = mapped.map_err(MemoryError::map)?;
        // `None`: the region ends beyond the last address.
        GuestRegionMmap::new(mapped, GuestAddress(range.gpa)).ok_or(MemoryError::Layout)
    };
    let regions = ranges.iter().map(map).collect::<Result<Vec<_>>>()?;
    let memory = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::map)?;
    Ok(Arc::new(memory))
}

/// A shared mapping of a memfd, in which a guest is booted. The file shows which parts of memory
/// were ever touched.
pub(crate) struct FileMemory {
    pub(crate) mapped: Arc<GuestMemoryMmap>,
    pub(crate) file: File,
}

impl FileMemory {
    pub(crate) fn new(ranges: &[MemoryRange]) -> Result<Self> {
        check_room(ranges)?;
        let memory_bytes = ranges.iter().map(|range| range.len).sum();
        let file: File = rustix::fs::memfd_create("guest-memory", MemfdFlags::CLOEXEC)
            .map_err(|error| {
                MemoryError::system("cannot create a memfd for guest memory")(error.into())
            })?
            .into();
        file.set_len(memory_bytes)
            .map_err(MemoryError::system("cannot set the size of guest memory"))?;
        let regions = ranges
            .iter()
            .map(|range| {
                let shared = file.try_clone()?;
                let file = Some(FileOffset::new(shared, range.source_offset));
                Ok((GuestAddress(range.gpa), range.len as usize, file))
            })
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(MemoryError::map)?;
        let mapped = GuestMemoryMmap::from_ranges_with_files(&regions).map_err(MemoryError::map)?;
        Ok(Self { mapped: Arc::new(mapped), file })
    }

    /// The bytes that the kernel has allocated for the file: all memory that was ever touched. A large page counts
    /// whole.
    pub(crate) fn touched_bytes(&self) -> Option<u64> {
        Some(rustix::fs::fstat(&self.file).ok()?.st_blocks.cast_unsigned() * 512)
    }

    /// The parts of memory that were ever touched, as source offsets. All other parts are holes
    /// of the file and read as zeros.
    pub(crate) fn touched(&self) -> Result<Vec<Range<u64>>> {
        let failed = |error: Errno| {
            MemoryError::system("cannot find the touched guest memory")(error.into())
        };
        let mut ranges = Vec::new();
        let mut at = 0;
        loop {
            let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // There is no data from there on.
                Err(Errno::NXIO) => return Ok(ranges),
                Err(error) => return Err(failed(error)),
            };
            at = rustix::fs::seek(&self.file, SeekFrom::Hole(start)).map_err(failed)?;
            ranges.push(start..at);
        }
    }
}

/// Guest memory by source offset, read through its mapping.
pub(crate) struct GuestBytes<'a> {
    pub(crate) memory: &'a GuestMemoryMmap,
    pub(crate) regions: &'a [MemoryRegion],
}

impl snapfmt::ReadAt for GuestBytes<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let mut rest = buf;
        for gpas in gpa_ranges(self.regions, offset..offset.saturating_add(rest.len() as u64)) {
            let (now, later) = rest.split_at_mut((gpas.end - gpas.start) as usize);
            let read = self.memory.read_slice(now, GuestAddress(gpas.start));
            read.map_err(std::io::Error::other)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
    }

    fn len_bytes(&self) -> std::io::Result<u64> {
        Ok(self.regions.iter().map(|region| region.len).sum())
    }
}

/// Guest memory by source offset, whose pages are loaded when they are touched, and may be damaged. The kernel copies
/// them into a scratch file. So a page that cannot be loaded is EFAULT, where a load instruction would raise SIGBUS.
pub struct ArrivingBytes<'a> {
    pub(crate) memory: &'a GuestMemoryMmap,
    pub(crate) regions: &'a [MemoryRegion],
}

impl snapfmt::ReadAt for ArrivingBytes<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let mut scratch: File =
            rustix::fs::memfd_create("read-memory", MemfdFlags::CLOEXEC)?.into();
        let len_bytes = buf.len() as u64;
        for gpas in gpa_ranges(self.regions, offset..offset.saturating_add(len_bytes)) {
            let (at, len) = (GuestAddress(gpas.start), (gpas.end - gpas.start) as usize);
            let written = self.memory.write_all_volatile_to(at, &mut scratch, len);
            written.map_err(|error| {
                let what = format!("cannot read guest memory at gpa {:#x}: {error}", gpas.start);
                std::io::Error::other(what)
            })?;
        }
        snapfmt::ReadAt::read_exact_at(&scratch, buf, 0)
    }

    fn len_bytes(&self) -> std::io::Result<u64> {
        Ok(self.regions.iter().map(|region| region.len).sum())
    }
}

/// Writes bytes of the source space into guest memory.
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    regions: &[MemoryRegion],
    source_offset: u64,
    mut bytes: &[u8],
) -> Result<()> {
    for gpas in gpa_ranges(regions, source_offset..source_offset + bytes.len() as u64) {
        let (now, later) = bytes.split_at((gpas.end - gpas.start) as usize);
        write_at(memory, gpas.start, now)?;
        bytes = later;
    }
    Ok(())
}

pub(crate) fn read_at(memory: &GuestMemoryMmap, gpa: u64, buf: &mut [u8]) -> Result<()> {
    let read = memory.read_slice(buf, GuestAddress(gpa));
    read.map_err(|error| MemoryError::Read { gpa, error: Box::new(error) })
}

pub(crate) fn write_at(memory: &GuestMemoryMmap, gpa: u64, bytes: &[u8]) -> Result<()> {
    let written = memory.write_slice(bytes, GuestAddress(gpa));
    written.map_err(|error| MemoryError::Write { gpa, error: Box::new(error) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_touched_memory_is_found() {
        let ranges = vmm::memory_layout(4 << 30).unwrap();
        let memory = FileMemory::new(&ranges).unwrap();
        assert!(memory.touched().unwrap().is_empty());
        memory.mapped.write_slice(&[1], GuestAddress(4096 * 5)).unwrap();
        memory.mapped.write_slice(&[1], GuestAddress((4 << 30) + 4096)).unwrap();
        let touched = memory.touched().unwrap();
        // Above the hole at 3 GiB, guest addresses and source offsets differ by 1 GiB.
        for offset in [4096 * 5, (3 << 30) + 4096] {
            assert!(touched.iter().any(|range| range.contains(&offset)));
        }
        let bytes: u64 = touched.iter().map(|range| range.end - range.start).sum();
        assert!(bytes <= 4 << 20, "{touched:?}");
    }
}
