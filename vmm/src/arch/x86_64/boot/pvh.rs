//! The PVH protocol: one structure has the addresses of everything. `Documentation/arch/x86/pvh.rst` of Linux,
//! `xen/include/public/arch-x86/hvm/start_info.h` of Xen.

use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::e820;
use super::entry::Entry;
use crate::boot::{LinuxError, Loaded};
use crate::layout::MemoryRange;

const START_INFO_GPA: u64 = 0x6000;
const MODULE_GPA: u64 = 0x6040;
const MEMORY_MAP_GPA: u64 = 0x6100;
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const START_INFO_VERSION: u32 = 1;

/// Writes the start info. Returns the first state of the boot CPU.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    ranges: &[MemoryRange],
    loaded: &Loaded,
    rsdp_gpa: u64,
    entry: u64,
) -> Result<Entry, LinuxError> {
    let map = e820::map(ranges);
    for (index, entry) in map.iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: entry.gpa,
            size: entry.len,
            type_: entry.kind,
            reserved: 0,
        };
        let at = MEMORY_MAP_GPA + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        memory.write_obj(entry, GuestAddress(at))?;
    }
    if let Some((paddr, size)) = loaded.initrd {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        memory.write_obj(module, GuestAddress(MODULE_GPA))?;
    }
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        nr_modules: loaded.initrd.is_some().into(),
        modlist_paddr: MODULE_GPA,
        cmdline_paddr: loaded.cmdline_gpa,
        rsdp_paddr: rsdp_gpa,
        memmap_paddr: MEMORY_MAP_GPA,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(START_INFO_GPA))?;
    Ok(Entry::Pvh { rip: entry, start_info_gpa: START_INFO_GPA })
}
