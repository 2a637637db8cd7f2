//! The ACPI tables: CPUs, interrupt controllers, devices, power off and reset, the generation id, the VMClock.
//!
//! Hardware-reduced ACPI (ACPI 6.5, 4.1): no power management timer, no system control interrupt, no
//! registers but one to sleep and one to reset. Events come through a Generic Event Device. RSDP, XSDT,
//! FADT, MADT and DSDT are in memory that the memory map marks as reserved.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE,
    Package, Path, ResourceTemplate, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{self, AccessSize, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::address_map::{
    COM1_PORT, COM1_PORTS, FIRMWARE_START, GENERATION_ID_GPA, GENERATION_IRQ, IO_APIC_GPA,
    LOCAL_APIC_GPA, RESET_PORT, SERIAL_IRQ, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, VM_CLOCK_GPA,
};
use crate::boot::{Board, LinuxError};
use crate::devices::{DEVICE_WINDOW_BYTES, device_window};
use crate::layout::PAGE_BYTES;

/// The value that resets the machine.
pub(super) const RESET_VALUE: u8 = 1;
/// The sleep type for "off" that the DSDT names, and the bit that means "now" (ACPI 6.5, 4.8.3.7).
const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;

/// `IAPC_BOOT_ARCH`: there is no VGA hardware to touch. (And no 8042, whose bit is clear.)
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const OEM: [u8; 6] = *b"SNAP  ";
const OEM_TABLE: [u8; 8] = *b"SNAPVMM ";
const OEM_REVISION: u32 = 1;
/// Length of a table's header, which the DSDT's code follows.
const HEADER_BYTES: u32 = 36;

/// Whether this value of the sleep control register powers the machine off.
pub(super) fn is_power_off(value: u8) -> bool {
    value == SLEEP_TYPE_OFF << 2 | SLEEP_ENABLE
}

/// Writes the tables. Returns the address of the first one, the RSDP.
pub(super) fn write(memory: &GuestMemoryMmap, board: Board) -> Result<u64, LinuxError> {
    let tables = tables(board);
    let (found, max) = (tables.len() as u64, GENERATION_ID_GPA - FIRMWARE_START);
    if found > max {
        return Err(LinuxError::Tables { found, max });
    }
    memory.write_slice(&tables, GuestAddress(FIRMWARE_START))?;
    Ok(FIRMWARE_START)
}

/// All tables in the order in which they are at [`FIRMWARE_START`], the RSDP first.
fn tables(board: Board) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len()];
    let mut add = |table: &[u8]| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let gpa = FIRMWARE_START + bytes.len() as u64;
        bytes.extend_from_slice(table);
        gpa
    };
    let dsdt = add(&dsdt(board));
    let fadt = add(&fadt(dsdt));
    let madt = add(&madt(board.cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = add(&aml_bytes(&xsdt));
    let rsdp = aml_bytes(&Rsdp::new(OEM, xsdt));
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    bytes
}

fn fadt(dsdt_gpa: u64) -> Vec<u8> {
    let register = |port: u16| {
        GAS::new(gas::AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt_gpa)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.reset_reg = register(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = register(SLEEP_STATUS_PORT);
    aml_bytes(&fadt.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC_GPA));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC_GPA, 0));
    aml_bytes(&madt)
}

fn dsdt(board: Board) -> Vec<u8> {
    let mut code = com1();
    code.extend(sleep_off());
    for index in 0..board.devices {
        code.extend(virtio_mmio(index));
    }
    code.extend(generation_id());
    code.extend(vm_clock());
    code.extend(event_device());
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&code);
    table.as_slice().to_vec()
}

fn com1() -> Vec<u8> {
    let hid = EISAName::new("PNP0501");
    aml_bytes(&Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &hid),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, SERIAL_IRQ),
                    &IO::new(COM1_PORT, COM1_PORT, 0, COM1_PORTS as u8),
                ]),
            ),
        ],
    ))
}

fn sleep_off() -> Vec<u8> {
    aml_bytes(&Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF])))
}

/// A virtio-mmio device: Linux, `drivers/virtio/virtio_mmio.c`.
fn virtio_mmio(index: usize) -> Vec<u8> {
    let Some((window, irq)) = device_window(index) else {
        return Vec::new();
    };
    // Windows are below 4 GiB.
    let (gpa, len) = (window.start as u32, DEVICE_WINDOW_BYTES as u32);
    aml_bytes(&Device::new(
        format!("_SB_.VIO{index}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(index as u8)),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, gpa, len),
                    &Interrupt::new(true, true, false, false, irq),
                ]),
            ),
        ],
    ))
}

/// The generation id: Linux, `drivers/virt/vmgenid.c`.
fn generation_id() -> Vec<u8> {
    // The id is below 4 GiB: the upper half of its address is zero.
    let low = GENERATION_ID_GPA as u32;
    aml_bytes(&Device::new(
        "_SB_.VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"SNAPVGEN"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &ZERO])),
        ],
    ))
}

/// The VMClock: Linux, `drivers/ptp/ptp_vmclock.c`.
fn vm_clock() -> Vec<u8> {
    aml_bytes(&Device::new(
        "_SB_.VCLK".into(),
        vec![
            &Name::new("_HID".into(), &"AMZNC10C"),
            &Name::new("_CID".into(), &"VMCLOCK"),
            &Name::new("_DDN".into(), &"VMCLOCK"),
            &Name::new(
                "_CRS".into(),
                // The page is below 4 GiB.
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    false,
                    VM_CLOCK_GPA as u32,
                    PAGE_BYTES as u32,
                )]),
            ),
        ],
    ))
}

/// Turns [`GENERATION_IRQ`] into notifications of the generation id's device and of the VMClock (ACPI 6.5, 5.6.9).
fn event_device() -> Vec<u8> {
    aml_bytes(&Device::new(
        "_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    GENERATION_IRQ,
                )]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(
                    &Equal::new(&Arg(0), &GENERATION_IRQ),
                    vec![
                        &Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8),
                        &Notify::new(&Path::new("\\_SB_.VCLK"), &0x80u8),
                    ],
                )],
            ),
        ],
    ))
}

fn aml_bytes(item: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    item.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    /// The table at an address, with the length that its header has.
    fn table(tables: &[u8], gpa: u64) -> &[u8] {
        let from = &tables[(gpa - FIRMWARE_START) as usize..];
        let len = u32::from_le_bytes(from[4..8].try_into().unwrap());
        &from[..len as usize]
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        let tables = tables(Board { cpus: 4, devices: 8 });
        assert!((tables.len() as u64) < GENERATION_ID_GPA - FIRMWARE_START);
        assert_eq!(&tables[..8], b"RSD PTR ");
        assert_eq!((sum(&tables[..20]), sum(&tables[..36])), (0, 0));
        let xsdt = table(&tables, word(&tables, 24));
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(&tables, word(xsdt, 36));
        let madt = table(&tables, word(xsdt, 44));
        let dsdt = table(&tables, word(fadt, 140));
        for (table, name) in [(xsdt, b"XSDT"), (fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
            assert_eq!((&table[..4], sum(table)), (&name[..], 0));
        }
        // Hardware-reduced, with a reset register.
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        // Four CPUs of 8 bytes, then the I/O APIC of 12.
        assert_eq!(madt.len(), 44 + 4 * 8 + 12);
        for name in ["COM1", "VIO0", "VIO7", "VGEN", "VCLK", "GED_"] {
            assert!(dsdt.windows(4).any(|at| at == name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn only_off_is_off() {
        assert!(is_power_off(0x34));
        assert!(!is_power_off(0x14) && !is_power_off(0x20) && !is_power_off(0));
    }
}
