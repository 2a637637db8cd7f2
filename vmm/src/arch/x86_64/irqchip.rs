//! The devices that KVM emulates in the kernel: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    kvm_irqchip, kvm_pit_config,
};
use kvm_ioctls::VmFd;

use crate::error::{KvmError, NameCall};
use crate::frozen::Frozen;
use crate::state::ChipState;

/// Three pages inside the MMIO hole, below the BIOS, that Intel's real-mode emulation needs.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Creates the chips. After the first memory slots (with them in place a slot costs 7 ms instead of
/// 0.07 ms on some hosts), before the vCPUs (their LAPICs come into being only then).
pub(crate) fn create(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_tss_address(TSS_ADDRESS).call("KVM_SET_TSS_ADDR")?;
    vm.create_irq_chip().call("KVM_CREATE_IRQCHIP")?;
    // Port 0x61, which guests poll for the timer's output, is answered in the kernel then.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).call("KVM_CREATE_PIT2")
}

pub(crate) fn state(vm: &VmFd) -> Result<ChipState, KvmError> {
    let irqchip = |chip_id: u32| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).call("KVM_GET_IRQCHIP")?;
        Ok::<_, KvmError>(Frozen(chip))
    };
    Ok(ChipState {
        pic_master: irqchip(KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: irqchip(KVM_IRQCHIP_IOAPIC)?,
        pit: Frozen(vm.get_pit2().call("KVM_GET_PIT2")?),
        clock: Frozen(vm.get_clock().call("KVM_GET_CLOCK")?),
    })
}

/// After the vCPUs have their LAPICs back: an interrupt that the I/O APIC holds pending is
/// delivered to them as soon as it is set.
pub(crate) fn restore(vm: &VmFd, state: &ChipState, slept_ns: u64) -> Result<(), KvmError> {
    for chip in [&state.pic_master, &state.pic_slave, &state.ioapic] {
        vm.set_irqchip(&chip.0).call("KVM_SET_IRQCHIP")?;
    }
    // After the interrupt controllers: the timer starts to count, and may interrupt, at once.
    vm.set_pit2(&state.pit.0).call("KVM_SET_PIT2")?;
    // The guest's clock goes on from the moment it was saved, plus what it slept. The flags that KVM_GET_CLOCK reports are
    // not valid for KVM_SET_CLOCK.
    let mut clock = state.clock.0;
    clock.flags = 0;
    clock.clock = clock.clock.saturating_add(slept_ns);
    vm.set_clock(&clock).call("KVM_SET_CLOCK")
}
