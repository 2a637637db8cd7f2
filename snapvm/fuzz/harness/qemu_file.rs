//! Writes mapped-ram files of QEMU, from the description of the format.

use std::fs::File;
use std::os::unix::fs::FileExt;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const MIB: u64 = 1 << 20;

/// A RAM block of a file.
pub(crate) struct Block {
    pub(crate) name: &'static str,
    pub(crate) len_bytes: u64,
    pub(crate) page_bytes: u64,
    /// Optional fields before the header.
    pub(crate) optional: Vec<u8>,
    /// Pages of 4096 bytes by number, and whether their bits are set.
    pub(crate) pages: Vec<(u64, u8, bool)>,
}

impl Block {
    pub(crate) fn new(name: &'static str, len_bytes: u64, pages: &[(u64, u8)]) -> Self {
        let pages = pages.iter().map(|(page, byte)| (*page, *byte, true)).collect();
        Self { name, len_bytes, page_bytes: PAGE, optional: Vec::new(), pages }
    }
}

/// The start of a stream, up to the list of RAM blocks.
pub(crate) fn head(machine: &str, capability: &str) -> Vec<u8> {
    let mut head = b"QEVM\0\0\0\x03\x07".to_vec();
    head.extend((machine.len() as u32).to_be_bytes());
    head.extend(machine.as_bytes());
    head.extend(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01");
    head.push(capability.len() as u8);
    head.extend(capability.as_bytes());
    head.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    head
}

/// What comes after the pages.
pub(crate) const REST: &[u8] =
    b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x04device state\x7e\0\0\0\x03\0\x06\0\0\0\x02{}";

/// Where things are in a file.
pub(crate) struct Places {
    /// Offsets of (header, pages) of each block.
    pub(crate) blocks: Vec<(u64, u64)>,
    /// The offset of what comes after the pages.
    pub(crate) rest: u64,
}

/// Fills an empty file, which stays sparse, as QEMU does.
pub(crate) fn write(file: &File, machine: &str, blocks: &[Block]) -> Places {
    let mut at = 0;
    let put = |at: &mut u64, bytes: &[u8]| {
        file.write_all_at(bytes, *at).expect("it is written");
        *at += bytes.len() as u64;
    };
    put(&mut at, &head(machine, "mapped-ram"));
    let total: u64 = blocks.iter().map(|block| block.len_bytes).sum();
    put(&mut at, &(total | 4).to_be_bytes());
    let mut places = Vec::new();
    for block in blocks {
        put(&mut at, &[block.name.len() as u8]);
        put(&mut at, block.name.as_bytes());
        put(&mut at, &block.len_bytes.to_be_bytes());
        put(&mut at, &block.optional);
        let bitmap = at + 28;
        let words = (block.len_bytes / block.page_bytes).div_ceil(64);
        let pages = (bitmap + words * 8).next_multiple_of(MIB);
        places.push((at, pages));
        put(&mut at, &1u32.to_be_bytes());
        for field in [block.page_bytes, bitmap, pages] {
            put(&mut at, &field.to_be_bytes());
        }
        let mut bits = vec![0u64; words as usize];
        for (page, byte, is_set) in &block.pages {
            let target = page * PAGE / block.page_bytes;
            if *is_set {
                bits[(target / 64) as usize] |= 1 << (target % 64);
            }
            put(&mut (pages + page * PAGE), &[*byte; PAGE as usize]);
        }
        for (number, word) in bits.iter().enumerate().filter(|(_, word)| **word != 0) {
            put(&mut (bitmap + number as u64 * 8), &word.to_le_bytes());
        }
        at = pages + block.len_bytes;
    }
    let rest = at;
    put(&mut at, REST);
    Places { blocks: places, rest }
}
