//! The devices that KVM emulates in the kernel: interrupt controllers, PIT, and the guest's kvm-clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::address_map::TSS_ADDRESS;
use crate::error::{KvmError, NameCall};
use crate::frozen::Frozen;

/// The state of the devices that KVM emulates in the kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct IrqchipState {
    /// First 8259A interrupt controller.
    pub pic_master: Frozen<kvm_irqchip>,
    /// Second 8259A interrupt controller.
    pub pic_slave: Frozen<kvm_irqchip>,
    /// I/O APIC.
    pub ioapic: Frozen<kvm_irqchip>,
    /// 8254 timer.
    pub pit: Frozen<kvm_pit_state2>,
    /// The guest's kvm-clock.
    pub clock: Frozen<kvm_clock_data>,
}

// The encoding depends on these sizes, as in `vcpu_state`.
const _: () = {
    assert!(size_of::<kvm_irqchip>() == 520);
    assert!(size_of::<kvm_pit_state2>() == 112);
    assert!(size_of::<kvm_clock_data>() == 48);
};

/// Creates the devices. It runs after the first memory slots are set: on some hosts a slot that is set later
/// costs 7 ms instead of 0.07 ms. It runs before the vCPUs are created: only then do they get LAPICs.
pub(crate) fn create_irqchip(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_tss_address(TSS_ADDRESS).call("KVM_SET_TSS_ADDR")?;
    vm.create_irq_chip().call("KVM_CREATE_IRQCHIP")?;
    // With this flag the kernel answers port 0x61, which guests poll for the timer's output.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).call("KVM_CREATE_PIT2")
}

impl IrqchipState {
    /// Reads the state from KVM.
    pub(crate) fn save(vm: &VmFd) -> Result<IrqchipState, KvmError> {
        let irqchip = |chip_id: u32| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).call("KVM_GET_IRQCHIP")?;
            Ok::<_, KvmError>(Frozen(chip))
        };
        Ok(IrqchipState {
            pic_master: irqchip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: irqchip(KVM_IRQCHIP_IOAPIC)?,
            pit: Frozen(vm.get_pit2().call("KVM_GET_PIT2")?),
            clock: Frozen(vm.get_clock().call("KVM_GET_CLOCK")?),
        })
    }

    /// Sets the state in KVM. It runs after the LAPICs of the vCPUs are restored: KVM delivers an interrupt
    /// that the I/O APIC holds pending as soon as the I/O APIC is set.
    pub(crate) fn restore(&self, vm: &VmFd, slept_ns: u64) -> Result<(), KvmError> {
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            vm.set_irqchip(&chip.0).call("KVM_SET_IRQCHIP")?;
        }
        // After the interrupt controllers: the timer starts immediately, and it may interrupt.
        vm.set_pit2(&self.pit.0).call("KVM_SET_PIT2")?;
        // The guest's clock continues from the moment of the save, plus the time that it slept. The flags that
        // KVM_GET_CLOCK reports are not valid for KVM_SET_CLOCK.
        let mut clock = self.clock.0;
        clock.flags = 0;
        clock.clock = clock.clock.saturating_add(slept_ns);
        vm.set_clock(&clock).call("KVM_SET_CLOCK")
    }
}
