//! Guest memory that KVM itself reads and writes for the guest: its clock, stolen time, ends of interrupts.
//!
//! The guest writes the addresses of these pages to MSRs. KVM looks them up when such an MSR is set, so their
//! memory slots must be registered before: otherwise KVM refuses some of these MSRs and silently drops others.
//! A page of zeros, which a restore registers late, may be among them. `Documentation/virt/kvm/x86/msr.rst`.

use std::ops::Range;

use kvm_bindings::kvm_msr_entry;

use super::vcpu_state::VcpuState;
use crate::frozen::Frozen;

/// MSR_KVM_WALL_CLOCK and MSR_KVM_SYSTEM_TIME, their newer numbers, and MSR_KVM_ASYNC_PF_EN, _STEAL_TIME and
/// _PV_EOI_EN.
const MSRS: [u32; 7] =
    [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04];
/// The structures have at most 64 bytes. The low bits of an address are flags.
const STRUCTURE_BYTES: u64 = 64;

/// The guest physical addresses that a vCPU shares with KVM.
pub(crate) fn pages_shared_with_kvm(vcpu: &VcpuState) -> impl Iterator<Item = Range<u64>> + '_ {
    ranges(&vcpu.msrs)
}

fn ranges(msrs: &[Frozen<kvm_msr_entry>]) -> impl Iterator<Item = Range<u64>> + '_ {
    msrs.iter().filter(|msr| MSRS.contains(&msr.0.index) && msr.0.data != 0).filter_map(|msr| {
        let start = msr.0.data & !(STRUCTURE_BYTES - 1);
        Some(start..start.checked_add(STRUCTURE_BYTES)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_not_part_of_an_address() {
        let msr = |index, data| Frozen(kvm_msr_entry { index, data, ..Default::default() });
        let msrs = [
            msr(0x4b56_4d01, 0x1_2341),
            msr(0x4b56_4d03, 0),
            msr(0x10, 0x9999),
            msr(0x4b56_4d04, u64::MAX),
        ];
        assert_eq!(ranges(&msrs).collect::<Vec<_>>(), [0x1_2340..0x1_2380]);
    }
}
