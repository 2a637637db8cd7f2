//! Guest memory in its two forms, and the way between a snapshot's source space and guest addresses.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::io::Errno;
use snapfmt::MemoryRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm::MemoryRange;

use crate::room;
use crate::watched::Watched;

/// Memory that is private to this process: what a guest is restored into.
pub(crate) fn private(ranges: &[MemoryRange]) -> Result<Arc<GuestMemoryMmap>> {
    check_room(ranges)?;
    let regions: Vec<_> =
        ranges.iter().map(|range| (GuestAddress(range.gpa), range.len as usize)).collect();
    Ok(Arc::new(GuestMemoryMmap::from_ranges(&regions).context("cannot map guest memory")?))
}

/// Memory that is a private mapping of a raw image, in which source offsets are file offsets: the
/// kernel reads a page when it is touched, and what the guest writes stays with it. The kernel checks nothing: whether
/// the image has stayed as it was is asked afterwards.
pub(crate) fn image(
    path: &Path,
    ranges: &[MemoryRange],
) -> Result<(Watched, Arc<GuestMemoryMmap>)> {
    let named = || path.display().to_string();
    let file = File::open(path).with_context(named)?;
    let found = file.metadata().with_context(named)?.len();
    let expected: u64 = ranges.iter().map(|range| range.len).sum();
    // A mapping of what is not there would be SIGBUS.
    if found != expected {
        bail!("{} is {found} bytes long, expected {expected}", named());
    }
    let watched = Watched::new(file).with_context(named)?;
    let mapped = map_privately(watched.file(), ranges);
    Ok((watched, mapped.with_context(|| format!("cannot map {}", named()))?))
}

/// Memory that is a private mapping of a file in memory, for a pager that records what is touched.
pub(crate) fn recorded(ranges: &[MemoryRange]) -> Result<(File, Arc<GuestMemoryMmap>)> {
    let file: File = rustix::fs::memfd_create("recorded-memory", MemfdFlags::CLOEXEC)
        .context("cannot create a memfd for recorded memory")?
        .into();
    let memory_bytes = ranges.iter().map(|range| range.len).sum();
    file.set_len(memory_bytes).context("cannot size the recorded memory")?;
    let memory = map_privately(&file, ranges)?;
    Ok((file, memory))
}

/// Now, not in the middle of the guest's work.
fn check_room(ranges: &[MemoryRange]) -> Result<()> {
    let memory_bytes = ranges.iter().map(|range| range.len).sum();
    room::check(room::of_guest(memory_bytes)).context("cannot map guest memory")
}

fn map_privately(file: &File, ranges: &[MemoryRange]) -> Result<Arc<GuestMemoryMmap>> {
    check_room(ranges)?;
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    let map = |range: &MemoryRange| {
        let at = FileOffset::new(file.try_clone()?, range.source_offset);
        let mapped = MmapRegion::build(Some(at), range.len as usize, prot, flags)?;
        GuestRegionMmap::new(mapped, GuestAddress(range.gpa))
            .with_context(|| format!("memory at gpa {:#x} has no end", range.gpa))
    };
    let regions = ranges.iter().map(map).collect::<Result<Vec<_>>>()?;
    let memory = GuestMemoryMmap::from_regions(regions).context("cannot map guest memory")?;
    Ok(Arc::new(memory))
}

/// Memory that is also a file (a memfd): what a guest is created in. The file tells which parts
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
            .context("cannot create a memfd for guest memory")?
            .into();
        file.set_len(memory_bytes).context("cannot size the guest's memory")?;
        let regions = ranges
            .iter()
            .map(|range| {
                let shared = file.try_clone()?;
                let file = Some(FileOffset::new(shared, range.source_offset));
                Ok((GuestAddress(range.gpa), range.len as usize, file))
            })
            .collect::<std::io::Result<Vec<_>>>()
            .context("cannot duplicate the guest memory's file")?;
        let mapped =
            GuestMemoryMmap::from_ranges_with_files(&regions).context("cannot map guest memory")?;
        Ok(Self { mapped: Arc::new(mapped), file })
    }

    /// How much of memory the kernel has given to the file: what was ever touched, of large pages all of each.
    pub(crate) fn touched_bytes(&self) -> Option<u64> {
        Some(rustix::fs::fstat(&self.file).ok()?.st_blocks.cast_unsigned() * 512)
    }

    /// The parts of memory that were ever touched, as source offsets: everything else is a hole
    /// of the file and reads as zeros.
    pub(crate) fn touched(&self) -> Result<Vec<Range<u64>>> {
        let mut ranges = Vec::new();
        let mut at = 0;
        loop {
            let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // No data from there on.
                Err(Errno::NXIO) => return Ok(ranges),
                Err(error) => return Err(error).context("cannot find the touched guest memory"),
            };
            at = rustix::fs::seek(&self.file, SeekFrom::Hole(start))
                .context("cannot find the touched guest memory")?;
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

/// Guest memory by source offset, with pages that come when they are touched, and may be damaged then: the kernel reads them, into
/// a scratch file. So a page that cannot be had is EFAULT, where a load instruction would get SIGBUS.
pub(crate) struct ArrivingBytes<'a> {
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

/// The guest-physical ranges of a range of the source space.
pub(crate) fn gpa_ranges(
    regions: &[MemoryRegion],
    source: Range<u64>,
) -> impl Iterator<Item = Range<u64>> + '_ {
    let first = regions.partition_point(|r| r.source_offset + r.len <= source.start);
    let in_source = regions[first..].iter().take_while(move |r| r.source_offset < source.end);
    in_source.filter_map(move |region| {
        let start = source.start.max(region.source_offset);
        let end = source.end.min(region.source_offset + region.len);
        let to_gpa = |offset: u64| region.gpa + (offset - region.source_offset);
        (start < end).then(|| to_gpa(start)..to_gpa(end))
    })
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
        memory
            .write_slice(now, GuestAddress(gpas.start))
            .with_context(|| format!("cannot write guest memory at gpa {:#x}", gpas.start))?;
        bytes = later;
    }
    Ok(())
}

/// The memory map of a snapshot in the words of the VMM, and back.
pub(crate) fn to_ranges(regions: &[MemoryRegion]) -> Vec<MemoryRange> {
    let to_range =
        |r: &MemoryRegion| MemoryRange { gpa: r.gpa, len: r.len, source_offset: r.source_offset };
    regions.iter().map(to_range).collect()
}

pub(crate) fn to_regions(ranges: &[MemoryRange]) -> Vec<MemoryRegion> {
    let to_region =
        |r: &MemoryRange| MemoryRegion { gpa: r.gpa, len: r.len, source_offset: r.source_offset };
    ranges.iter().map(to_region).collect()
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

    #[test]
    fn source_ranges_map_around_the_hole() {
        let regions = to_regions(&vmm::memory_layout(4 << 30).unwrap());
        let around: Vec<_> = gpa_ranges(&regions, (3 << 30) - 4096..(3 << 30) + 4096).collect();
        assert_eq!(around, [(3 << 30) - 4096..3 << 30, 4 << 30..(4 << 30) + 4096]);
    }
}
