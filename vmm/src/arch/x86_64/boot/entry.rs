//! The boot CPU's registers at the kernel's first instruction, for each protocol.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::arch::x86_64::long_mode::{self, Mapping};

/// The 64-bit protocol requires code at selector 0x10 and data at 0x18 of a descriptor table.
const GDT_GPA: u64 = 0x500;
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// A stack for the first instructions, below the boot parameters. Kernels set up their own stack immediately.
const STACK_TOP: u64 = 0x5000;
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;

/// The first state of the boot CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A program without a kernel, such as the demo guest: 64-bit mode, see [`long_mode`].
    Program,
    /// The 64-bit boot protocol: paging on, the boot parameters' address in RSI.
    Linux64 { rip: u64, zero_page_gpa: u64 },
    /// PVH: 32-bit protected mode, the start info's address in EBX.
    Pvh { rip: u64, start_info_gpa: u64 },
}

/// Writes what [`Entry::Linux64`] needs in memory.
pub(super) fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    long_mode::write_tables(memory, &[Mapping { virt: 0, gpa: 0, len: 1 << 30 }])?;
    for (index, descriptor) in GDT.into_iter().enumerate() {
        memory.write_obj(descriptor, GuestAddress(GDT_GPA + 8 * index as u64))?;
    }
    Ok(())
}

impl Entry {
    /// Changes the reset state of `sregs`, and returns the general registers.
    pub(crate) fn enter(self, sregs: &mut kvm_sregs) -> kvm_regs {
        // Bit 1 of the flags is always set; interrupts are off.
        let regs = kvm_regs { rflags: 2, rsp: STACK_TOP, ..Default::default() };
        match self {
            Entry::Program => {
                long_mode::enter_long_mode(sregs);
                long_mode::entry_regs()
            }
            Entry::Linux64 { rip, zero_page_gpa } => {
                long_mode::enter_long_mode(sregs);
                let code = sregs.cs;
                set_flat_segments(sregs, kvm_segment { selector: CODE_SELECTOR, ..code });
                sregs.gdt.base = GDT_GPA;
                sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
                kvm_regs { rip, rsi: zero_page_gpa, ..regs }
            }
            Entry::Pvh { rip, start_info_gpa } => {
                let code = kvm_segment {
                    selector: CODE_SELECTOR,
                    limit: 0xffff_ffff,
                    type_: 0xb,
                    present: 1,
                    db: 1,
                    s: 1,
                    g: 1,
                    ..Default::default()
                };
                set_flat_segments(sregs, code);
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
                kvm_regs { rip, rbx: start_info_gpa, ..regs }
            }
        }
    }
}

/// Data segments that match `code`, and a task state segment, which VMX needs to enter the guest.
fn set_flat_segments(sregs: &mut kvm_sregs, code: kvm_segment) {
    let data = kvm_segment { selector: DATA_SELECTOR, type_: 0x3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment { base: 0, limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
}
