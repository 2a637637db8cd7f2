//! What is new in every restored or reset guest, so that two clones of one snapshot do not draw the same random numbers:
//! the generation id, 16 random bytes in guest memory (Microsoft, "Virtual Machine Generation ID"), and the generation
//! counter of the [`vm_clock`].

use std::io;

use kvm_ioctls::VmFd;
use rustix::rand::GetRandomFlags;

use crate::arch::GENERATION_IRQ;
use crate::error::{KvmError, NameCall};
use crate::memory_slots::MemorySlots;
use crate::vm_clock;

/// Writes the first generation of a guest that has not run yet, with its id at `id_gpa`.
pub(crate) fn place(memory_slots: &MemorySlots, id_gpa: u64) -> io::Result<()> {
    memory_slots.write(id_gpa, &random::<16>()?)?;
    vm_clock::place(memory_slots, u64::from_le_bytes(random()?))
}

/// Writes a new generation. It uses system calls on guest memory, so that an unreadable page is an error here.
pub(crate) fn renew(memory_slots: &MemorySlots, id_gpa: u64) -> io::Result<()> {
    memory_slots.write(id_gpa, &random::<16>()?)?;
    // Random as well: a counter of restores would be the same in two clones of one snapshot. A value is never repeated,
    // up to a chance of 1 in 2^64.
    vm_clock::renew(memory_slots, u64::from_le_bytes(random()?))
}

/// The present id of the guest.
pub(crate) fn id(memory_slots: &MemorySlots, id_gpa: u64) -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    memory_slots.read(id_gpa, &mut id)?;
    Ok(id)
}

fn random<const BYTES: usize>() -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    // So few bytes come whole.
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes)
}

/// Notifies the guest, by the interrupt that its ACPI event device turns into notifications. It runs after
/// the interrupt controller is restored, because that would overwrite the request.
pub(crate) fn notify(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_irq_line(GENERATION_IRQ, true).call("KVM_IRQ_LINE")?;
    vm.set_irq_line(GENERATION_IRQ, false).call("KVM_IRQ_LINE")
}
