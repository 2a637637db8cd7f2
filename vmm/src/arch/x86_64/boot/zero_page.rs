//! The 64-bit boot protocol's parameters, `boot_params`: `Documentation/arch/x86/zero-page.rst` and
//! `boot.rst`, whose offsets these are.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::e820;
use super::entry::{self, Entry};
use super::kernel::Kernel;
use crate::boot::{LinuxError, Loaded};
use crate::layout::{MemoryRange, PAGE_BYTES};

const ZERO_PAGE_GPA: u64 = 0x7000;
const ACPI_RSDP_ADDR: usize = 0x70;
const EXT_RAMDISK_IMAGE: usize = 0xc0;
const E820_ENTRIES: usize = 0x1e8;
const SETUP_HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const TYPE_OF_LOADER: usize = 0x210;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
/// The number of boot loaders that have no assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the parameters, and the tables that 64-bit mode needs. Returns the first state of the boot CPU.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    ranges: &[MemoryRange],
    loaded: &Loaded,
    rsdp_gpa: u64,
    kernel: &Kernel,
) -> Result<Entry, LinuxError> {
    entry::write_tables(memory)?;
    let page = zero_page(ranges, loaded, rsdp_gpa, &kernel.setup_header);
    memory.write_slice(&page, GuestAddress(ZERO_PAGE_GPA))?;
    Ok(Entry::Linux64 { rip: kernel.entry, zero_page_gpa: ZERO_PAGE_GPA })
}

fn zero_page(
    ranges: &[MemoryRange],
    loaded: &Loaded,
    rsdp_gpa: u64,
    setup_header: &[u8],
) -> Vec<u8> {
    let mut page = vec![0u8; PAGE_BYTES as usize];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(SETUP_HEADER, setup_header);
    put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
    put(HEADER_MAGIC, b"HdrS");
    put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(ACPI_RSDP_ADDR, &rsdp_gpa.to_le_bytes());
    put(CMD_LINE_PTR, &(loaded.cmdline_gpa as u32).to_le_bytes());
    if let Some((gpa, len)) = loaded.initrd {
        // Both are below 4 GiB: the initrd is in low memory.
        put(RAMDISK_IMAGE, &(gpa as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(len as u32).to_le_bytes());
        put(EXT_RAMDISK_IMAGE, &[0; 8]);
    }
    let map = e820::map(ranges);
    put(E820_ENTRIES, &[map.len() as u8]);
    for (index, entry) in map.iter().enumerate() {
        let at = E820_TABLE + index * 20;
        put(at, &entry.gpa.to_le_bytes());
        put(at + 8, &entry.len.to_le_bytes());
        put(at + 16, &entry.kind.to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::memory_layout;

    #[test]
    fn the_fields_are_where_the_kernel_looks() {
        let loaded = Loaded { cmdline_gpa: 0x2_0000, initrd: Some((0x3f0_0000, 5)) };
        let header = [7u8; 0x7b];
        let page = zero_page(&memory_layout(64 << 20).unwrap(), &loaded, 0xe_0000, &header);
        let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
        assert_eq!((page[0x1f1], page[0x210], page[0x1e8]), (7, 0xff, 3));
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!((word(0x70), word(0x228)), (0xe_0000, 0x2_0000));
        assert_eq!((word(0x218), word(0x21c)), (0x3f0_0000, 5));
        // Third entry of the memory map: from 1 MiB to the end.
        let third = 0x2d0 + 40;
        assert_eq!((word(third), word(third + 8), word(third + 16)), (1 << 20, 63 << 20, 1));
    }
}
