//! The generation id: 16 random bytes in guest memory that are new in every restored guest, so that two clones
//! of one snapshot do not draw the same random numbers. Microsoft, "Virtual Machine Generation ID".

use std::fs::File;
use std::io::{self, Read};

use kvm_ioctls::VmFd;

use crate::arch::GENERATION_IRQ;
use crate::error::{KvmError, NameCall};
use crate::memory_slots::MemorySlots;

/// Writes a new id. It uses a system call on guest memory, so that an unreadable page is an error here.
pub(crate) fn renew(memory_slots: &MemorySlots, gpa: u64) -> io::Result<()> {
    let mut id = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut id)?;
    memory_slots.write(gpa, &id)
}

/// Notifies the guest, by the interrupt that its ACPI event device turns into a notification. It runs after
/// the interrupt controller is restored, because that would overwrite the request.
pub(crate) fn notify(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_irq_line(GENERATION_IRQ, true).call("KVM_IRQ_LINE")?;
    vm.set_irq_line(GENERATION_IRQ, false).call("KVM_IRQ_LINE")
}
