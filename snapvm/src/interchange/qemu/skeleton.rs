//! A mapped-ram file without its pages: everything that an export needs beside memory.
//!
//! ```text
//! length of the file (u64), number of ranges (u32), number of kept parts (u32)      all numbers are little-endian
//! main memory: offset and length of its bitmap in the file, and of its pages (u64 each)
//! for each range of memory: guest-physical address, length, offset in the file (u64 each)
//! for each kept part: offset in the file, length (u64 each)
//! the bytes of the kept parts
//! ```

use std::io;
use std::ops::Range;

use snapfmt::layout::{MAX_STATE_BYTES, PAGE_BYTES};
use snapfmt::{ReadAt, StateBlob};

use super::stream::MappedRam;
use crate::interchange::foreign_file::ForeignFile;

/// The skeleton of a mapped-ram file of QEMU.
pub const MAPPED_RAM: ForeignFile = ForeignFile {
    name: "migration",
    tag: u32::from_le_bytes(*b"QEmr"),
    what: "mapped-ram file of QEMU",
};

/// What is kept of a mapped-ram file.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Skeleton {
    pub(in super::super) file_bytes: u64,
    /// The place of the bitmap of main memory in the file.
    main_bitmap: Range<u64>,
    /// The place of the pages of main memory in the file.
    pub(in super::super) main_pages: Range<u64>,
    /// Each range of guest-physical addresses with its offset in the file.
    pub(in super::super) memory: Vec<(Range<u64>, u64)>,
    /// Bytes of the file with their offset: ascending. Everything else outside of memory is zero.
    pub(in super::super) kept: Vec<(u64, Vec<u8>)>,
}

const FIXED_BYTES: usize = 48;
const RANGE_BYTES: usize = 24;
const PART_BYTES: usize = 16;

impl Skeleton {
    /// Reads everything but the pages. `data` gives the parts of a range of the file that are not holes.
    ///
    /// Returns `None` if a state section cannot take it.
    pub(in super::super) fn read(
        file: &dyn ReadAt,
        mapped: &MappedRam,
        memory: Vec<(Range<u64>, u64)>,
        data: impl Fn(Range<u64>) -> io::Result<Vec<Range<u64>>>,
    ) -> io::Result<Option<Self>> {
        let file_bytes = file.len_bytes()?;
        let ends = mapped.blocks.iter().map(|block| block.pages().end);
        let starts = mapped.blocks.iter().map(|block| block.pages_offset).chain([file_bytes]);
        let mut kept = Vec::<(u64, Vec<u8>)>::new();
        let fixed = FIXED_BYTES + memory.len() * RANGE_BYTES;
        let mut room = (MAX_STATE_BYTES as usize).saturating_sub(fixed);
        let mut block = [0; PAGE_BYTES];
        for (start, end) in [0].into_iter().chain(ends).zip(starts) {
            for data in data(start..end)? {
                let mut at = data.start;
                while at < data.end {
                    let len = (data.end - at).min(PAGE_BYTES as u64) as usize;
                    let bytes = &mut block[..len];
                    file.read_exact_at(bytes, at)?;
                    if bytes.iter().any(|byte| *byte != 0) {
                        let taken = match kept.last_mut() {
                            Some((from, last)) if *from + last.len() as u64 == at => {
                                last.extend_from_slice(bytes);
                                len
                            }
                            _ => {
                                kept.push((at, bytes.to_vec()));
                                len + PART_BYTES
                            }
                        };
                        match room.checked_sub(taken) {
                            Some(rest) => room = rest,
                            None => return Ok(None),
                        }
                    }
                    at += len as u64;
                }
            }
        }
        let main = &mapped.blocks[mapped.main()];
        let (main_bitmap, main_pages) = (main.bitmap(), main.pages());
        Ok(Some(Self { file_bytes, main_bitmap, main_pages, memory, kept }))
    }

    /// The kept bytes of a file in which no page of main memory is written: QEMU leaves main memory as it is.
    pub(in super::super) fn without_main(&self) -> Vec<(u64, Vec<u8>)> {
        let mut kept = self.kept.clone();
        for (offset, bytes) in &mut kept {
            let (from, to) = (self.main_bitmap.start, self.main_bitmap.end);
            let within = |at: u64| (at.max(*offset) - *offset).min(bytes.len() as u64) as usize;
            let cleared = within(from)..within(to);
            bytes[cleared].fill(0);
        }
        kept
    }

    pub(in super::super) fn encode(&self) -> StateBlob {
        let mut bytes = self.file_bytes.to_le_bytes().to_vec();
        bytes.extend((self.memory.len() as u32).to_le_bytes());
        bytes.extend((self.kept.len() as u32).to_le_bytes());
        for range in [&self.main_bitmap, &self.main_pages] {
            let fields = [range.start, range.end - range.start];
            bytes.extend(fields.into_iter().flat_map(u64::to_le_bytes));
        }
        for (range, offset) in &self.memory {
            let fields = [range.start, range.end - range.start, *offset];
            bytes.extend(fields.into_iter().flat_map(u64::to_le_bytes));
        }
        for (offset, kept) in &self.kept {
            bytes.extend([*offset, kept.len() as u64].into_iter().flat_map(u64::to_le_bytes));
        }
        bytes.extend(self.kept.iter().flat_map(|(_, kept)| kept));
        MAPPED_RAM.blob(bytes)
    }

    /// The skeleton in the bytes of a section, of any content. `None`: it is none.
    pub(in super::super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (fixed, rest) = bytes.split_first_chunk::<FIXED_BYTES>()?;
        let file_bytes = u64_at(fixed, 0);
        let count = |at: usize| u64_at(fixed, 8) >> (at * 32) & u64::from(u32::MAX);
        let (ranges, rest) = table(rest, count(0), RANGE_BYTES)?;
        let (parts, mut rest) = table(rest, count(1), PART_BYTES)?;
        let place =
            |at| Some(u64_at(fixed, at)..u64_at(fixed, at).checked_add(u64_at(fixed, at + 8))?);
        let (main_bitmap, main_pages) = (place(16)?, place(32)?);
        let (mut memory, mut kept, mut taken) = (Vec::new(), Vec::new(), Vec::new());
        for range in ranges {
            let (gpa, len, offset) = (u64_at(range, 0), u64_at(range, 8), u64_at(range, 16));
            if !offset.is_multiple_of(PAGE_BYTES as u64) {
                return None;
            }
            memory.push((gpa..gpa.checked_add(len)?, offset));
            taken.push(offset..offset.checked_add(len)?);
        }
        for part in parts {
            let (offset, len) = (u64_at(part, 0), u64_at(part, 8));
            if len == 0 {
                return None;
            }
            let (now, later) = rest.split_at_checked(usize::try_from(len).ok()?)?;
            kept.push((offset, now.to_vec()));
            taken.push(offset..offset.checked_add(len)?);
            rest = later;
        }
        taken.sort_by_key(|range| range.start);
        let apart = taken.windows(2).all(|pair| pair[0].end <= pair[1].start);
        // The length of a file is at most 2^63 - 1.
        let whole = rest.is_empty()
            && i64::try_from(file_bytes).is_ok()
            && taken.last().is_none_or(|last| last.end <= file_bytes);
        (apart && whole && kept.is_sorted_by_key(|part| part.0)).then_some(Self {
            file_bytes,
            main_bitmap,
            main_pages,
            memory,
            kept,
        })
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Splits off a table of `count` records.
fn table(
    bytes: &[u8],
    count: u64,
    record: usize,
) -> Option<(std::slice::ChunksExact<'_, u8>, &[u8])> {
    let len = usize::try_from(count).ok()?.checked_mul(record)?;
    let (table, rest) = bytes.split_at_checked(len)?;
    Some((table.chunks_exact(record), rest))
}
