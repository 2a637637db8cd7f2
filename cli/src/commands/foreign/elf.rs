//! ELF core dumps of guest memory, for analysis tools.
//!
//! Shaped like those of QEMU's `dump-guest-memory` (`dump/dump.c`): ELF64, type `ET_CORE`, first a
//! `PT_NOTE`, here empty, then one `PT_LOAD` a region with its guest-physical address as both
//! `p_paddr` and `p_vaddr`, so that gdb doesn't load regions over each other. `p_align` is 0, by
//! which crash (`netdump.c`) tells dumps with several regions from the flat netdump.

use snapfmt::MemoryRegion;
use snapfmt::layout::PAGE_BYTES;

use super::firecracker::Arch;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const READ_WRITE_EXECUTE: u32 = 7;

/// The bytes in front of memory, which follows in source order: a multiple of 4096.
pub(crate) fn headers(regions: &[MemoryRegion], arch: Arch) -> Vec<u8> {
    let used = HEADER_BYTES + (regions.len() + 1) * PROGRAM_HEADER_BYTES;
    let memory_offset = used.next_multiple_of(PAGE_BYTES);
    let mut bytes = Vec::with_capacity(memory_offset);
    let machine = match arch {
        Arch::X86_64 => EM_X86_64,
        Arch::Aarch64 => EM_AARCH64,
    };
    // e_ident: magic, 64 bits, little-endian, version 1, ABI and padding 0.
    bytes.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    bytes.extend_from_slice(&ET_CORE.to_le_bytes());
    bytes.extend_from_slice(&machine.to_le_bytes());
    bytes.extend_from_slice(&1u32.to_le_bytes());
    let [entry, sections] = [0u64; 2];
    for field in [entry, HEADER_BYTES as u64, sections] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    let flags = 0u32;
    bytes.extend_from_slice(&flags.to_le_bytes());
    // A snapshot has at most 1024 regions.
    let count = (regions.len() + 1) as u16;
    for field in [HEADER_BYTES as u16, PROGRAM_HEADER_BYTES as u16, count, 0, 0, 0] {
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
    bytes.resize(memory_offset, 0);
    bytes
}
