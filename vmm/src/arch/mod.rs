//! The seam between this crate and a CPU architecture.
//!
//! One folder holds everything that belongs to one architecture. The rest of the crate uses only what this
//! module exports, by the path `crate::arch`. A second architecture is a second folder with the same items.
//!
//! The one list of what an architecture provides:
//!
//! | item | meaning |
//! |---|---|
//! | **addresses** | |
//! | `MMIO_HOLE_START`, `MMIO_HOLE_END` | the guest physical addresses that are never RAM |
//! | `DEVICE_WINDOWS_GPA`, `DEVICE_IRQS` | where virtio devices are, and which interrupt line each of them has |
//! | `SERIAL_IRQ` | the interrupt line of the serial port |
//! | `GENERATION_ID_GPA`, `VM_CLOCK_GPA`, `GENERATION_IRQ` | the places of the generation id and of the VMClock, and the interrupt that announces a new generation |
//! | `CMDLINE_GPA`, `CMDLINE_MAX_BYTES` | the place of a kernel's command line, and the room for it |
//! | **state** | |
//! | `STATE_KIND` | the tag of a stored state of this architecture |
//! | `VcpuState` | the registers of one vCPU as KVM structures, serializable; `validate` checks decoded ones |
//! | `IrqchipState` | the devices that KVM emulates in the kernel, serializable |
//! | `RtcState` | the real-time clock, serializable |
//! | **machine** | |
//! | `create_irqchip` | creates the devices that KVM emulates in the kernel |
//! | `IrqchipState::{save, restore}` | reads and sets their state |
//! | `Vcpu::{boot, restore, save}` | a fresh vCPU, a vCPU of a saved state, and the state of a paused vCPU |
//! | `Vcpu::notify_of_pause` | notifies the guest that it has not run for a while |
//! | `VcpuError` | why a vCPU cannot be restored |
//! | `pages_shared_with_kvm` | the guest memory that KVM itself accesses while a vCPU is restored |
//! | `instruction_pointer` | the address of the next instruction of a vCPU, for error messages |
//! | `IoPorts` | the devices at I/O ports: serial port, real-time clock, power and reset registers |
//! | `SNAPSHOT_TRIGGER_PORT` | the port by which a guest requests a snapshot |
//! | **host** | |
//! | `HostCpu` | the identity of the host's CPU |
//! | `missing_features` | the CPU features that a saved vCPU uses and the host does not have |
//! | **boot** | |
//! | `Kernel::{load, cmdline_max, initrd_room, write_boot_data}` | the kernel file formats and boot protocols |
//! | `KernelError` | why a kernel file cannot be booted |
//! | `Entry` | the registers at the first instruction; `Entry::Program` is a program without a kernel |
//! | `load_program`, `Mapping` | a program without a kernel, and the memory that is mapped for it |
//! | `PROGRAM_MAX_BYTES`, `PROGRAM_PARAMS_GPA`, `MAPPED_GIB_MAX` | the limits and the parameters of such a program |
//! | `demo_guest_code` | the machine code of the demo guest |

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{
    CMDLINE_GPA, CMDLINE_MAX_BYTES, DEVICE_IRQS, Entry, GENERATION_ID_GPA, GENERATION_IRQ, IoPorts,
    Kernel, MAPPED_GIB_MAX, Mapping, PROGRAM_MAX_BYTES, PROGRAM_PARAMS_GPA, SERIAL_IRQ,
    VM_CLOCK_GPA, Vcpu, create_irqchip, demo_guest_code, instruction_pointer, load_program,
    missing_features, pages_shared_with_kvm,
};
#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    DEVICE_WINDOWS_GPA, HostCpu, IrqchipState, KernelError, MMIO_HOLE_END, MMIO_HOLE_START,
    RtcState, SNAPSHOT_TRIGGER_PORT, STATE_KIND, VcpuError, VcpuState,
};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("vmm supports x86_64 only: src/arch/mod.rs lists what another architecture needs");
