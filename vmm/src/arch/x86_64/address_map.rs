//! The map of the machine: guest physical addresses, I/O ports and interrupt lines, in one place.
//!
//! ```text
//! gpa            what                                   used by
//! 0x500          descriptor table                       64-bit boot protocol
//! 0x1000-0x9000  descriptor table, parameters, code,    programs without a kernel
//!                kernel stack
//! 0x6000         hvm_start_info, module, memory map     PVH
//! 0x7000         boot_params ("zero page")              64-bit boot protocol
//! 0x10000        page tables                            64-bit boot protocol, programs
//! 0x20000        command line                           both protocols
//! 0xe0000        ACPI tables (reserved)                 both protocols
//! 0xf0000        generation id (reserved)               ACPI
//! 0xf1000        VMClock (reserved)                     ACPI
//! 0x100000       kernel; the initrd is at the end of low memory
//! 0xc0000000     MMIO hole, up to 4 GiB
//! 0xd0000000     windows of virtio devices
//! 0xfec00000     I/O APIC
//! 0xfee00000     local APICs
//! 0xfffbd000     pages for KVM's real-mode emulation
//! ```

/// First guest physical address of the hole that belongs to devices.
pub const MMIO_HOLE_START: u64 = 3 << 30;
/// First guest physical address after the hole.
pub const MMIO_HOLE_END: u64 = 4 << 30;

/// First guest physical address of the first device's window.
pub const DEVICE_WINDOWS_GPA: u64 = 0xd000_0000;
/// Interrupt lines of the devices. They are ISA lines that no other device here uses, so that they exist
/// with the old interrupt controllers too.
pub(crate) const DEVICE_IRQS: [u32; 8] = [5, 6, 7, 10, 11, 12, 14, 15];

/// Where the kernel's command line is.
pub(crate) const CMDLINE_GPA: u64 = 0x2_0000;
/// Room for the command line, with its final zero.
pub(crate) const CMDLINE_MAX_BYTES: u32 = 0x1_0000;

/// First guest physical address of the firmware. Kernels search for the RSDP from here on.
pub(super) const FIRMWARE_START: u64 = 0xe_0000;
/// First guest physical address after the firmware.
pub(super) const FIRMWARE_END: u64 = 0x10_0000;
/// The 16 bytes that differ in every restored guest: Microsoft, "Virtual Machine Generation ID".
pub(crate) const GENERATION_ID_GPA: u64 = 0xf_0000;
/// The page of the VMClock. It is another one than that of the generation id, because programs in the guest can map it.
pub(crate) const VM_CLOCK_GPA: u64 = 0xf_1000;
/// The interrupt that announces a new generation: the first line that no PC device has.
pub(crate) const GENERATION_IRQ: u32 = 16;

/// The local APICs.
pub(super) const LOCAL_APIC_GPA: u32 = 0xfee0_0000;
/// The I/O APIC.
pub(super) const IO_APIC_GPA: u32 = 0xfec0_0000;
/// Three pages inside the MMIO hole, below the BIOS, that KVM's emulation of real mode on Intel needs.
pub(super) const TSS_ADDRESS: usize = 0xfffb_d000;

/// First I/O port of the serial port COM1.
pub(super) const COM1_PORT: u16 = 0x3f8;
/// Number of I/O ports of COM1.
pub(super) const COM1_PORTS: u16 = 8;
/// ISA interrupt of COM1.
pub(crate) const SERIAL_IRQ: u32 = 4;

/// The sleep control register of hardware-reduced ACPI, one byte.
pub(super) const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The sleep status register of hardware-reduced ACPI, one byte.
pub(super) const SLEEP_STATUS_PORT: u16 = 0x601;
/// The reset register of hardware-reduced ACPI, one byte.
pub(super) const RESET_PORT: u16 = 0x602;
