//! Everything that is specific to x86-64: see [`crate::arch`] for what the rest of the crate uses.
//!
//! - `vcpu`, `vcpu_state`, `msrs`: creating a vCPU, and saving and restoring its state.
//! - `cpuid`, `cpu_features`, `host_cpu`: the result of the CPUID instruction in the guest and on the host.
//! - `irqchip`: interrupt controllers, PIT and kvm-clock.
//! - `paravirt`: the guest memory that a vCPU shares with KVM.
//! - `io_ports`, `rtc`: the devices at I/O ports.
//! - `address_map`: addresses, ports and interrupt lines of the machine.
//! - `acpi`: the ACPI tables.
//! - `boot`: kernel file formats and boot protocols.
//! - `long_mode`: page tables and registers of a guest that begins in 64-bit mode.
//! - `demo_guest`: the machine code of the demo guest.

mod acpi;
mod address_map;
mod boot;
mod cpu_features;
mod cpuid;
mod demo_guest;
mod host_cpu;
mod io_ports;
mod irqchip;
mod long_mode;
mod msrs;
mod paravirt;
mod rtc;
mod vcpu;
mod vcpu_state;

pub(crate) use address_map::{
    CMDLINE_GPA, CMDLINE_MAX_BYTES, DEVICE_IRQS, GENERATION_ID_GPA, GENERATION_IRQ, SERIAL_IRQ,
    VM_CLOCK_GPA,
};
pub use address_map::{DEVICE_WINDOWS_GPA, MMIO_HOLE_END, MMIO_HOLE_START};
pub use boot::KernelError;
pub(crate) use boot::{Entry, Kernel};
pub(crate) use cpu_features::missing_features;
pub(crate) use demo_guest::demo_guest_code;
pub use host_cpu::HostCpu;
pub(crate) use io_ports::IoPorts;
pub use io_ports::SNAPSHOT_TRIGGER_PORT;
pub use irqchip::IrqchipState;
pub(crate) use irqchip::create_irqchip;
pub(crate) use long_mode::{
    MAPPED_GIB_MAX, Mapping, PROGRAM_MAX_BYTES, PROGRAM_PARAMS_GPA, load_program,
};
pub(crate) use paravirt::pages_shared_with_kvm;
pub use rtc::RtcState;
pub(crate) use vcpu::{Vcpu, instruction_pointer};
pub use vcpu_state::{VcpuError, VcpuState};

/// Tag of an encoded [`VmState`](crate::VmState) among other kinds of state: "KVM" and the architecture, x86-64.
pub const STATE_KIND: u32 = u32::from_le_bytes(*b"KVMx");
