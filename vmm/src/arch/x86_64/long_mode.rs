//! 64-bit mode from the first instruction on: page tables, descriptor table, register state; and the programs
//! without a kernel that begin in it.
//!
//! Everything here is in the first 2 MiB of guest memory; [`layout`] has the addresses.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{LARGE_PAGE_BYTES, PAGE_BYTES};

/// Guest physical addresses inside the first 2 MiB.
pub(super) mod layout {
    pub(crate) const GDT: u64 = 0x1000;
    pub(crate) const PARAMS: u64 = 0x2000;
    pub(crate) const TSS: u64 = 0x3000;
    /// The room for code ends at the kernel stack.
    pub(crate) const CODE: u64 = 0x4000;
    /// The kernel stack grows down from here.
    pub(crate) const KERNEL_STACK_TOP: u64 = 0x9000;
    pub(crate) const PML4: u64 = 0x1_0000;
    pub(crate) const PDPT: u64 = 0x1_1000;
    /// One page directory for each gigabyte of addresses.
    pub(crate) const PAGE_DIRECTORIES: u64 = 0x1_2000;
}

/// Longest program that [`load_program`] takes.
pub(crate) const PROGRAM_MAX_BYTES: usize = 0x4000;
/// A page for the parameters of a program.
pub(crate) const PROGRAM_PARAMS_GPA: u64 = layout::PARAMS;
/// Addresses that the page tables can map, in gigabytes: page directories that fit behind the others.
pub(crate) const MAPPED_GIB_MAX: u64 = 65;

/// Segment selectors of the descriptor table.
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const TASK_STATE: u16 = 0x28;
/// Null; code and data for ring 0; data and code for ring 3; and a task state segment of two slots.
const GDT: [u64; 7] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    TSS_DESCRIPTOR,
    0,
];
/// Busy 64-bit task state segment at `layout::TSS`.
const TSS_DESCRIPTOR: u64 = 0x0000_8b00_0000_0000 | layout::TSS << 16 | TSS_LIMIT as u64;
/// Offset in the task state segment of the 16-bit offset of its I/O permission bitmap.
const TSS_IO_BITMAP_OFFSET: u64 = 0x66;
/// The bitmap follows the segment's fixed part.
const TSS_IO_BITMAP: u16 = 0x68;
/// One bit for each of the ports 0 to 0x3ff, and the byte of ones that ends the bitmap.
const TSS_LIMIT: u16 = TSS_IO_BITMAP + 0x400 / 8;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITE: u64 = 1 << 1;
const PTE_USER: u64 = 1 << 2;
const PTE_ACCESSED: u64 = 1 << 5;
const PTE_DIRTY: u64 = 1 << 6;
const PTE_LARGE: u64 = 1 << 7;

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// A run of guest virtual addresses, in whole large pages, readable and writable in every ring.
pub(crate) struct Mapping {
    pub(crate) virt: u64,
    pub(crate) gpa: u64,
    pub(crate) len: u64,
}

/// Writes a program, and the tables that it needs, into memory. It begins at its first byte, in ring 0.
pub(crate) fn load_program(
    memory: &GuestMemoryMmap,
    code: &[u8],
    mappings: &[Mapping],
) -> Result<(), GuestMemoryError> {
    write_tables(memory, mappings)?;
    memory.write_slice(code, GuestAddress(layout::CODE))
}

/// Writes page tables and descriptor table.
pub(super) fn write_tables(
    memory: &GuestMemoryMmap,
    mappings: &[Mapping],
) -> Result<(), GuestMemoryError> {
    // The accessed and dirty bits are set from the start, so that the CPU never writes to the tables.
    let table = PTE_PRESENT | PTE_WRITE | PTE_USER | PTE_ACCESSED;
    let large = table | PTE_DIRTY | PTE_LARGE;
    let write = |value: u64, gpa: u64| memory.write_obj(value, GuestAddress(gpa));

    for (index, descriptor) in GDT.into_iter().enumerate() {
        write(descriptor, layout::GDT + 8 * index as u64)?;
    }
    // Ring 3 may use ports 0 to 0x3ff: their bits are zeros, as fresh memory is. On a CPU, IOPL 3 is enough.
    // KVM backends that run ring 3 without hardware virtualization ignore it and read this bitmap.
    memory.write_obj(TSS_IO_BITMAP, GuestAddress(layout::TSS + TSS_IO_BITMAP_OFFSET))?;
    memory.write_obj(0xffu8, GuestAddress(layout::TSS + u64::from(TSS_LIMIT)))?;
    write(layout::PDPT | table, layout::PML4)?;
    for mapping in mappings {
        for offset in (0..mapping.len).step_by(LARGE_PAGE_BYTES as usize) {
            let virt = mapping.virt + offset;
            let directory = layout::PAGE_DIRECTORIES + (virt >> 30) * PAGE_BYTES;
            write(directory | table, layout::PDPT + (virt >> 30) * 8)?;
            let entry = directory + ((virt >> 21) & 0x1ff) * 8;
            write((mapping.gpa + offset) | large, entry)?;
        }
    }
    Ok(())
}

/// Turns the reset state of `sregs` into ring 0 of 64-bit mode. There is no interrupt table: any
/// exception is a triple fault, which stops the guest.
pub(super) fn enter_long_mode(sregs: &mut kvm_sregs) {
    let segment = |selector: u16, type_: u8, s: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { l: 1, ..segment(KERNEL_CODE, 0xb, 1) };
    let data = kvm_segment { db: 1, ..segment(KERNEL_DATA, 0x3, 1) };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    // Type 11, a busy 64-bit task state segment: VMX enters a guest with nothing else.
    sregs.tr = kvm_segment {
        base: layout::TSS,
        limit: TSS_LIMIT.into(),
        g: 0,
        ..segment(TASK_STATE, 0xb, 0)
    };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// Registers for the first instruction at [`layout::CODE`].
pub(super) fn entry_regs() -> kvm_regs {
    kvm_regs {
        rip: layout::CODE,
        rsp: layout::KERNEL_STACK_TOP,
        // Bit 1 is always set.
        rflags: 2,
        ..Default::default()
    }
}
