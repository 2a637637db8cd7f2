//! Reading and setting the model-specific registers of a vCPU.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::vcpu_state::VcpuError;
use crate::error::{KvmError, NameCall};
use crate::frozen::Frozen;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_MTRR_DEF_TYPE, as firmware leaves it: memory is cached (type 6) except in ranges with another type. When MTRRs
/// are off, Linux does not use page attributes either.
pub(super) const MTRRS_ON: Frozen<kvm_msr_entry> =
    Frozen(kvm_msr_entry { index: 0x2ff, reserved: 0, data: 1 << 11 | 6 });

/// All MSRs that KVM lists as the state of a vCPU, in the order in which they are to be set.
pub(super) fn read(kvm: &Kvm, fd: &VcpuFd) -> Result<Vec<Frozen<kvm_msr_entry>>, KvmError> {
    let mut indices = kvm.get_msr_index_list().call("KVM_GET_MSR_INDEX_LIST")?.as_slice().to_vec();
    // The TSC is near the end, so that the clock of the restored guest loses little time while the others are
    // set. The deadline comes after it, because KVM converts it to a host timer with the TSC of that moment.
    indices.sort_by_key(|&index| match index {
        MSR_IA32_TSC => 1,
        MSR_IA32_TSC_DEADLINE => 2,
        _ => 0,
    });
    let mut entries = Vec::with_capacity(indices.len());
    let mut rest = indices.as_slice();
    while !rest.is_empty() {
        let query: Vec<kvm_msr_entry> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut query = Msrs::from_entries(&query).map_err(|_| too_many())?;
        // KVM stops at the first register that it cannot read. Such a register is listed although this
        // vCPU's CPUID hides it. It has no value, so the loop continues after it.
        let read = fd.get_msrs(&mut query).call("KVM_GET_MSRS")?;
        entries.extend(query.as_slice()[..read].iter().copied().map(Frozen));
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(entries)
}

/// The MSRs with the time stamp counter after a sleep. The deadline stays: if it has passed, its interrupt comes
/// immediately.
pub(super) fn advance_tsc(
    msrs: &[Frozen<kvm_msr_entry>],
    slept_ns: u64,
    tsc_khz: u32,
) -> Vec<Frozen<kvm_msr_entry>> {
    let ticks = (u128::from(slept_ns) * u128::from(tsc_khz) / 1_000_000) as u64;
    let mut msrs = msrs.to_vec();
    for msr in msrs.iter_mut().filter(|msr| msr.0.index == MSR_IA32_TSC) {
        msr.0.data = msr.0.data.wrapping_add(ticks);
    }
    msrs
}

/// The time stamp counter alone, with a value that is more than a second from the one of [`advance_tsc`], and from any that
/// a guest reaches.
pub(super) fn far_from_now(
    msrs: &[Frozen<kvm_msr_entry>],
    slept_ns: u64,
    tsc_khz: u32,
) -> Vec<Frozen<kvm_msr_entry>> {
    let mut msrs = advance_tsc(msrs, slept_ns, tsc_khz);
    msrs.retain(|msr| msr.0.index == MSR_IA32_TSC);
    msrs.iter_mut().for_each(|msr| msr.0.data ^= 1 << 62);
    msrs
}

pub(super) fn too_many() -> KvmError {
    KvmError { call: "KVM_GET_MSRS", source: std::io::Error::from_raw_os_error(libc::E2BIG) }
}

pub(super) fn set(fd: &VcpuFd, msrs: &[Frozen<kvm_msr_entry>]) -> Result<(), VcpuError> {
    let entries: Vec<kvm_msr_entry> = msrs.iter().map(|entry| entry.0).collect();
    if entries.is_empty() {
        return Ok(());
    }
    let list = Msrs::from_entries(&entries).map_err(|_| VcpuError::TooMany { what: "MSRs" })?;
    let set = fd.set_msrs(&list).call("KVM_SET_MSRS")?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(VcpuError::Msr { index: refused.index, value: refused.data }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_time_stamp_counter_moves() {
        let msr = |index, data| Frozen(kvm_msr_entry { index, data, ..Default::default() });
        let msrs = [msr(0x11, 5), msr(MSR_IA32_TSC, 1000), msr(MSR_IA32_TSC_DEADLINE, 2000)];
        // Half a second at 2 GHz.
        let found: Vec<u64> =
            advance_tsc(&msrs, 500_000_000, 2_000_000).iter().map(|msr| msr.0.data).collect();
        assert_eq!(found, [5, 1_000_001_000, 2000]);
    }
}
