//! ELF core dumps of guest memory, for analysis tools.
//!
//! They have the form of QEMU's `dump-guest-memory` (`dump/dump.c`): ELF64, type `ET_CORE`, an empty `PT_NOTE`, then
//! one `PT_LOAD` for each region. Its guest-physical address is both `p_paddr` and `p_vaddr`, so that gdb does not load
//! regions over each other. `p_align` is 0, by which crash (`netdump.c`) distinguishes dumps with several regions from
//! the flat netdump. If there are too many program headers for `e_phnum`, the first section header contains their
//! number (elf(5), `PN_XNUM`).

use snapfmt::MemoryRegion;
use snapfmt::layout::PAGE_BYTES;

use super::firecracker::GuestArch;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const READ_WRITE_EXECUTE: u32 = 7;
const SECTION_HEADER_BYTES: usize = 64;
/// The value of `e_phnum` if the number of program headers is in `sh_info` of section header 0.
const PN_XNUM: u16 = 0xffff;

/// The bytes before memory, which follows in source order. Their length is a multiple of 4096.
pub(super) fn headers(regions: &[MemoryRegion], arch: GuestArch) -> Vec<u8> {
    let count = regions.len() + 1;
    let sections_offset = HEADER_BYTES + count * PROGRAM_HEADER_BYTES;
    let counted = u16::try_from(count).ok().filter(|count| *count < PN_XNUM);
    let sections = u16::from(counted.is_none());
    let used = sections_offset + usize::from(sections) * SECTION_HEADER_BYTES;
    let memory_offset = used.next_multiple_of(PAGE_BYTES);
    let mut bytes = Vec::with_capacity(memory_offset);
    let machine = match arch {
        GuestArch::X86_64 => EM_X86_64,
        GuestArch::Aarch64 => EM_AARCH64,
    };
    // e_ident: magic, 64 bits, little-endian, version 1, ABI and padding 0.
    bytes.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    bytes.extend_from_slice(&ET_CORE.to_le_bytes());
    bytes.extend_from_slice(&machine.to_le_bytes());
    bytes.extend_from_slice(&1u32.to_le_bytes());
    let entry = 0;
    let sections_at = if sections > 0 { sections_offset as u64 } else { 0 };
    for field in [entry, HEADER_BYTES as u64, sections_at] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    let flags = 0u32;
    bytes.extend_from_slice(&flags.to_le_bytes());
    let [head, program, section] = [HEADER_BYTES, PROGRAM_HEADER_BYTES, SECTION_HEADER_BYTES];
    let [head, program, section] = [head as u16, program as u16, section as u16 * sections];
    for field in [head, program, counted.unwrap_or(PN_XNUM), section, sections, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }

    let mut program_header = |kind: u32, flags: u32, offset: u64, address: u64, len: u64| {
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        let align = 0;
        for field in [offset, address, address, len, len, align] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
    };
    program_header(PT_NOTE, 0, used as u64, 0, 0);
    for region in regions {
        let offset = memory_offset as u64 + region.source_offset;
        program_header(PT_LOAD, READ_WRITE_EXECUTE, offset, region.gpa, region.len);
    }
    if sections > 0 {
        // All fields are zero except the count, which fits: a snapshot has at most 2^23 regions.
        let mut header = [0; SECTION_HEADER_BYTES];
        header[44..48].copy_from_slice(&(count as u32).to_le_bytes());
        bytes.extend_from_slice(&header);
    }
    bytes.resize(memory_offset, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers_of(regions: u64) -> Vec<u8> {
        let page = PAGE_BYTES as u64;
        let region = |number| MemoryRegion {
            gpa: 2 * number * page,
            len: page,
            source_offset: number * page,
        };
        headers(&(0..regions).map(region).collect::<Vec<_>>(), GuestArch::X86_64)
    }

    fn u16_at(bytes: &[u8], at: usize) -> u16 {
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    }

    #[test]
    fn a_section_header_counts_too_many_program_headers() {
        // e_phnum, e_shentsize, e_shnum.
        let counts = |bytes: &[u8]| [56, 58, 60].map(|at| u16_at(bytes, at));
        assert_eq!(counts(&headers_of(2)), [3, 0, 0]);
        assert_eq!(counts(&headers_of(0xfffd)), [0xfffe, 0, 0]);
        let many = headers_of(0xfffe);
        assert_eq!(counts(&many), [PN_XNUM, 64, 1]);
        let section = HEADER_BYTES + 0xffff * PROGRAM_HEADER_BYTES;
        assert_eq!(many[40..48], (section as u64).to_le_bytes(), "e_shoff");
        assert_eq!(many[section + 44..][..4], 0xffff_u32.to_le_bytes(), "sh_info");
        assert!(many.len().is_multiple_of(PAGE_BYTES));
        // The last region is behind the headers and all other regions.
        let last = HEADER_BYTES + 0xfffe * PROGRAM_HEADER_BYTES;
        let offset = many.len() as u64 + 0xfffd * PAGE_BYTES as u64;
        assert_eq!(many[last + 8..][..8], offset.to_le_bytes());
    }
}
