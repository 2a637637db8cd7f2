//! Finds the RAM blocks in a mapped-ram file.
//!
//! ```text
//! "QEVM", version (u32)                                  all numbers are big-endian
//! configuration: 0x07, length (u32), machine type, names of capabilities
//! 0x01, section id (u32), 3, "ram", instance 0 (u32), version 4 (u32)
//! sum of the lengths of all blocks, with flag 0x04 (u64)
//! for each block:
//!   length of its name (u8), name, length (u64)
//!   page size of the host (u64), with postcopy
//!   guest-physical address (u64), with x-ignore-shared
//!   header: version 1 (u32), page size, offset of the bitmap, offset of the pages (u64 each)
//!   bitmap: one bit for each page, in little-endian words of 64 bits
//!   padding to the next MiB; pages
//! the rest of the stream: sections, each with a footer 0x7e, section id (u32); end (0x00); and for most machines
//! 0x06, length (u32), a description of the sections in JSON, which ends the file
//! ```

use std::ops::Range;

use snapfmt::ReadAt;
use snapfmt::layout::{MAX_STATE_BYTES, PAGE_BYTES};

use crate::interchange::mapped_ram_error::MappedRamError;

const MAGIC: &[u8] = b"QEVM";
/// The section `ram` begins in this part of the file. Only the configuration comes before it, and for some devices a state
/// that the destination needs early (virtio-mem).
const SEARCHED_BYTES: u64 = 1 << 20;
/// The name, the instance and the version of the section `ram`. QEMU has written version 4 since 2009.
const RAM_SECTION: &[u8] = b"\x03ram\0\0\0\0\0\0\0\x04";
/// `RAM_SAVE_FLAG_MEM_SIZE`
const FLAG_MEM_SIZE: u64 = 4;
const FLAGS: u64 = 0xfff;
/// `QEMU_VM_EOF`
const END: u8 = 0;
/// `QEMU_VM_SECTION_FOOTER`
const FOOTER: u8 = 0x7e;
/// `QEMU_VM_VMDESCRIPTION`
const DESCRIPTION: u8 = 6;
const HEADER_VERSION: u32 = 1;
const HEADER_BYTES: u64 = 28;
/// A guest has a dozen.
const MOST_BLOCKS: usize = 1024;
/// Of all blocks together, 2 TiB: their bitmaps are kept in a state section.
const MOST_BYTES: u64 = 2 << 40;
/// The name of main memory in QEMU's machines for PCs.
const PC_RAM: &str = "pc.ram";
/// The largest page size of a target of QEMU.
const MOST_PAGE_BYTES: u64 = 64 << 10;

/// A mapped-ram file.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct MappedRam {
    /// The machine type, as `pc-q35-10.0`.
    pub(in super::super) machine: String,
    /// The blocks that have pages in the file, in its order: at least one.
    pub(super) blocks: Vec<RamBlock>,
}

/// The place of a RAM block in the file. Both ranges are within the file, and no two ranges of a file overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RamBlock {
    pub(super) name: String,
    /// A multiple of the page size.
    pub(super) len_bytes: u64,
    /// The size of a page in the bitmap: a multiple of 4096.
    pub(super) page_bytes: u64,
    pub(super) bitmap_offset: u64,
    pub(super) pages_offset: u64,
}

impl RamBlock {
    fn bitmap_bytes(&self) -> u64 {
        (self.len_bytes / self.page_bytes).div_ceil(64) * 8
    }

    /// The place of its bitmap in the file.
    pub(super) fn bitmap(&self) -> Range<u64> {
        self.bitmap_offset..self.bitmap_offset + self.bitmap_bytes()
    }

    /// The place of its pages in the file.
    pub(super) fn pages(&self) -> Range<u64> {
        self.pages_offset..self.pages_offset + self.len_bytes
    }
}

/// Whether a file that begins with these bytes is a migration stream of QEMU.
pub(in super::super) fn is_stream(start: &[u8]) -> bool {
    start.starts_with(MAGIC)
}

impl MappedRam {
    /// Reads the list of blocks. Every length is checked against the length of the file.
    pub(in super::super) fn parse(file: &dyn ReadAt) -> Result<Self, MappedRamError> {
        let len_bytes = file.len_bytes().map_err(MappedRamError::Io)?;
        let mut head = vec![0; len_bytes.min(SEARCHED_BYTES) as usize];
        file.read_exact_at(&mut head, 0).map_err(MappedRamError::Io)?;
        let searched_bytes = head.len() as u64;
        let found = head.windows(RAM_SECTION.len()).position(|bytes| bytes == RAM_SECTION);
        // Before its name, the section has its type and its number.
        let found = found.filter(|at| *at > 5 && head[at - 5] == 1);
        let at = found.ok_or(MappedRamError::NoRam { searched_bytes })?;
        let capability = b"mapped-ram";
        if !head[..at].windows(capability.len()).any(|bytes| bytes == capability) {
            return Err(MappedRamError::NotMappedRam);
        }
        let mut cursor = Cursor { file, len_bytes, at: (at + RAM_SECTION.len()) as u64 };
        let blocks = cursor.blocks()?;
        if blocks.is_empty() {
            return Err(MappedRamError::NoPages);
        }
        cursor.check_end()?;
        Ok(Self { machine: machine(&head), blocks })
    }

    /// The block with main memory. QEMU sorts blocks by their length.
    pub(super) fn main(&self) -> usize {
        self.blocks.iter().position(|block| block.name == PC_RAM).unwrap_or(0)
    }
}

/// The machine type in the configuration; empty if there is none.
fn machine(head: &[u8]) -> String {
    let name = || {
        let (kind, rest) = head.get(8..)?.split_first()?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let name = rest.get(..u32::from_be_bytes(*len) as usize)?;
        let text = std::str::from_utf8(name).ok()?;
        let named =
            *kind == 7 && text.len() < 256 && text.bytes().all(|byte| byte.is_ascii_graphic());
        named.then(|| text.to_owned())
    };
    name().unwrap_or_default()
}

/// Reads fields one after the other.
struct Cursor<'a> {
    file: &'a dyn ReadAt,
    len_bytes: u64,
    at: u64,
}

impl Cursor<'_> {
    /// Checks that the file has the bytes before `end`; `None` is more than any file has.
    fn needs(&self, end: Option<u64>) -> Result<(), MappedRamError> {
        match end {
            Some(end) if end <= self.len_bytes => Ok(()),
            _ => {
                let needed_bytes = end.unwrap_or(u64::MAX);
                Err(MappedRamError::CutShort { len_bytes: self.len_bytes, needed_bytes })
            }
        }
    }

    fn take(&mut self, bytes: &mut [u8]) -> Result<(), MappedRamError> {
        let end = self.at.checked_add(bytes.len() as u64);
        self.needs(end)?;
        self.file.read_exact_at(bytes, self.at).map_err(MappedRamError::Io)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Checks that the stream ends where the file does. QEMU writes it from front to back, so a file that it has not
    /// finished lacks the end.
    fn check_end(&self) -> Result<(), MappedRamError> {
        let rest_bytes = (self.len_bytes - self.at).min(MAX_STATE_BYTES);
        let mut rest = vec![0; rest_bytes as usize];
        self.file
            .read_exact_at(&mut rest, self.len_bytes - rest_bytes)
            .map_err(MappedRamError::Io)?;
        let is_description = |(at, bytes): (usize, &[u8])| {
            let &[FOOTER, _, _, _, _, END, DESCRIPTION, a, b, c, d] = bytes else { return false };
            u64::from(u32::from_be_bytes([a, b, c, d])) == rest_bytes - (at + bytes.len()) as u64
        };
        let described = || rest.windows(11).enumerate().any(is_description);
        match matches!(rest[..], [.., FOOTER, _, _, _, _, END]) || described() {
            true => Ok(()),
            false => Err(MappedRamError::Unfinished),
        }
    }

    fn u64(&mut self) -> Result<u64, MappedRamError> {
        let mut bytes = [0; 8];
        self.take(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn blocks(&mut self) -> Result<Vec<RamBlock>, MappedRamError> {
        let offset = self.at;
        let total = self.u64()?;
        if total & FLAGS != FLAG_MEM_SIZE {
            let found = total;
            return Err(MappedRamError::Field {
                block: 0,
                field: "the sum of the lengths",
                found,
                offset,
            });
        }
        let total_bytes = total & !FLAGS;
        if total_bytes > MOST_BYTES {
            let (what, found) = ("bytes of memory", total_bytes);
            return Err(MappedRamError::TooMany { what, found, most: MOST_BYTES });
        }
        let (mut blocks, mut rest_bytes) = (Vec::new(), total_bytes);
        for number in 0.. {
            if rest_bytes == 0 {
                break;
            }
            if number == MOST_BLOCKS {
                let (what, found) = ("RAM blocks", number as u64 + 1);
                return Err(MappedRamError::TooMany { what, found, most: MOST_BLOCKS as u64 });
            }
            let (len_bytes, block) = self.block(number)?;
            rest_bytes =
                rest_bytes.checked_sub(len_bytes).ok_or(MappedRamError::Total { total_bytes })?;
            blocks.extend(block);
        }
        Ok(blocks)
    }

    /// The next block, and its length; without one if its pages were left out.
    fn block(&mut self, number: usize) -> Result<(u64, Option<RamBlock>), MappedRamError> {
        let start = self.at;
        let bad =
            |field, found| MappedRamError::Field { block: number, field, found, offset: start };
        let mut name_len = [0];
        self.take(&mut name_len)?;
        let mut name = vec![0; usize::from(name_len[0])];
        self.take(&mut name)?;
        let name = String::from_utf8(name).ok();
        let printable = |name: &String| name.bytes().all(|byte| byte.is_ascii_graphic());
        let name = name.filter(|name| !name.is_empty() && printable(name));
        let name =
            name.ok_or(bad("a name that is not printable; its length", name_len[0].into()))?;
        let len_bytes = self.u64()?;
        let (page_bytes, bitmap_offset, pages_offset) = self.header(number)?;
        if !page_bytes.is_power_of_two()
            || !(PAGE_BYTES as u64..=MOST_PAGE_BYTES).contains(&page_bytes)
        {
            return Err(bad("the page size", page_bytes));
        }
        if !len_bytes.is_multiple_of(page_bytes) {
            return Err(bad("its length", len_bytes));
        }
        if bitmap_offset == 0 || len_bytes == 0 {
            self.needs(Some(pages_offset))?;
            self.at = self.at.max(pages_offset);
            return Ok((len_bytes, None));
        }
        let block = RamBlock { name, len_bytes, page_bytes, bitmap_offset, pages_offset };
        self.needs(bitmap_offset.checked_add(block.bitmap_bytes()))?;
        if pages_offset < bitmap_offset + block.bitmap_bytes()
            || !pages_offset.is_multiple_of(PAGE_BYTES as u64)
        {
            return Err(bad("the offset of its pages", pages_offset));
        }
        self.needs(pages_offset.checked_add(len_bytes))?;
        self.at = block.pages().end;
        Ok((len_bytes, Some(block)))
    }

    /// The page size, the offset of the bitmap, which is the end of the header, and that of the pages. Both offsets are 0
    /// if the pages were left out. Which optional fields come before the header is not in the file: the header tells by
    /// its own offset.
    fn header(&mut self, number: usize) -> Result<(u64, u64, u64), MappedRamError> {
        let start = self.at;
        let mut found_bitmap = 0;
        for optional_bytes in [0, 8, 16] {
            self.at = start + optional_bytes;
            let mut version = [0; 4];
            self.take(&mut version)?;
            let (page_bytes, bitmap, pages) = (self.u64()?, self.u64()?, self.u64()?);
            let here = start + optional_bytes + HEADER_BYTES;
            let left_out = (bitmap, pages) == (0, 0) && page_bytes.is_power_of_two();
            if u32::from_be_bytes(version) == HEADER_VERSION && (bitmap == here || left_out) {
                return Ok((page_bytes, bitmap, pages));
            }
            if optional_bytes == 0 {
                found_bitmap = bitmap;
            }
        }
        let (field, found) = ("its header is unknown; the offset of its bitmap", found_bitmap);
        Err(MappedRamError::Field { block: number, field, found, offset: start })
    }
}
