//! One vCPU: creating it, saving and restoring its state.
//!
//! The order of the calls is part of the state's meaning; each step says what it depends on.
//! KVM API documentation; `arch/x86/kvm/x86.c`.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::boot::Entry;
use crate::cpuid;
use crate::error::{KvmError, NameCall};
use crate::frozen::Frozen;
use crate::state::VcpuState;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_MTRR_DEF_TYPE, as firmware leaves it: memory is cached (type 6) unless a range says otherwise.
/// Linux takes MTRRs that are off for a sign that it may not use page attributes either.
const MTRRS_ON: Frozen<kvm_msr_entry> =
    Frozen(kvm_msr_entry { index: 0x2ff, reserved: 0, data: 1 << 11 | 6 });

/// A vCPU that does not run.
pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    /// How often KVM_RUN has come back. Written by the thread that runs the vCPU.
    pub(crate) exits: Arc<AtomicU64>,
    cpuid: CpuId,
}

/// Restoring a vCPU went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// A call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// This host's CPU, or its KVM, does not take the value of a model-specific register.
    #[error("KVM_SET_MSRS: this host refuses {value:#x} for MSR {index:#x}")]
    Msr {
        /// Number of the register.
        index: u32,
        /// Value that was to be set.
        value: u64,
    },
    /// More entries than KVM takes.
    #[error("the state has more {what} than KVM takes")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
    },
}

impl Vcpu {
    /// A fresh vCPU, one of `count`. The first is about to run at `entry`; the others wait for its
    /// start-up interrupt, as KVM makes them.
    pub(crate) fn boot(
        kvm: &Kvm,
        vm: &VmFd,
        index: u8,
        count: u8,
        entry: Entry,
    ) -> Result<Vcpu, KvmError> {
        let fd = vm.create_vcpu(index.into()).call("KVM_CREATE_VCPU")?;
        let mut cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).call("KVM_GET_SUPPORTED_CPUID")?;
        for entry in cpuid.as_mut_slice() {
            cpuid::adjust(entry, index, count);
        }
        fd.set_cpuid2(&cpuid).call("KVM_SET_CPUID2")?;
        if index == 0 {
            let mut sregs = fd.get_sregs().call("KVM_GET_SREGS")?;
            let regs = entry.enter(&mut sregs);
            fd.set_sregs(&sregs).call("KVM_SET_SREGS")?;
            fd.set_regs(&regs).call("KVM_SET_REGS")?;
        }
        if entry != Entry::Program {
            set_msrs(&fd, &[MTRRS_ON]).map_err(|error| match error {
                VcpuError::Kvm(error) => error,
                _ => too_many_msrs(),
            })?;
        }
        Ok(Vcpu { fd, exits: Arc::default(), cpuid })
    }

    /// A vCPU as it was when `state` was saved, its time stamp counter `slept_ns` later.
    pub(crate) fn restore(
        vm: &VmFd,
        index: u8,
        state: &VcpuState,
        slept_ns: u64,
    ) -> Result<Vcpu, VcpuError> {
        let fd = vm.create_vcpu(index.into()).call("KVM_CREATE_VCPU")?;
        let entries: Vec<kvm_cpuid_entry2> = state.cpuid.iter().map(|entry| entry.0).collect();
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| VcpuError::TooMany { what: "CPUID entries" })?;
        // First: CPUID decides which bits of the control registers, which MSRs and which XSAVE
        // features the calls below accept.
        fd.set_cpuid2(&cpuid).call("KVM_SET_CPUID2")?;
        // Before the TSC's value (an MSR), which is counted in this frequency. Only where it differs:
        // a host that cannot scale refuses even its own.
        if fd.get_tsc_khz().call("KVM_GET_TSC_KHZ")? != state.tsc_khz {
            fd.set_tsc_khz(state.tsc_khz).call("KVM_SET_TSC_KHZ")?;
        }
        // Before the MSRs (EFER is in both, and CR0 and CR4 constrain it) and before the LAPIC,
        // whose base address and mode are in sregs.
        fd.set_sregs(&state.sregs.0).call("KVM_SET_SREGS")?;
        fd.set_regs(&state.regs.0).call("KVM_SET_REGS")?;
        // XCR0 first: it says which features the XSAVE area is read with.
        fd.set_xcrs(&state.xcrs.0).call("KVM_SET_XCRS")?;
        // SAFETY: KVM reads more than the 4 KiB of the structure only when the process has asked for
        // features beyond them with arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which this crate does not.
        unsafe { fd.set_xsave(&state.xsave.0) }.call("KVM_SET_XSAVE")?;
        fd.set_debug_regs(&state.debugregs.0).call("KVM_SET_DEBUGREGS")?;
        // After sregs (see there), before the MSRs: the deadline timer's MSR is dropped unless the
        // LAPIC's timer is in deadline mode.
        fd.set_lapic(&state.lapic.0).call("KVM_SET_LAPIC")?;
        set_msrs(&fd, &later(&state.msrs, slept_ns, state.tsc_khz))?;
        // After the LAPIC: a vCPU that waits for a start-up interrupt looks at it.
        fd.set_mp_state(state.mp_state.0).call("KVM_SET_MP_STATE")?;
        // Last: KVM_SET_REGS drops a pending exception, KVM_SET_SREGS the interrupt being delivered.
        fd.set_vcpu_events(&state.events.0).call("KVM_SET_VCPU_EVENTS")?;
        Ok(Vcpu { fd, exits: Arc::default(), cpuid })
    }

    /// Tells a guest that it has stood still: its kernel asks for that before it takes the time for a lockup of
    /// its own. By a flag in its kvm-clock, which it takes back.
    pub(crate) fn tell_of_pause(&self) {
        // It fails for a guest that has no such clock (EINVAL), and nothing else.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// The state of a vCPU whose pending I/O has been completed.
    pub(crate) fn state(&self, kvm: &Kvm) -> Result<VcpuState, KvmError> {
        let fd = &self.fd;
        // First: reading it makes KVM take up pending start-up and INIT interrupts, which change the
        // rest.
        let mp_state = fd.get_mp_state().call("KVM_GET_MP_STATE")?;
        Ok(VcpuState {
            mp_state: Frozen(mp_state),
            cpuid: self.cpuid.as_slice().iter().copied().map(Frozen).collect(),
            tsc_khz: fd.get_tsc_khz().call("KVM_GET_TSC_KHZ")?,
            regs: Frozen(fd.get_regs().call("KVM_GET_REGS")?),
            // KVM_GET_SREGS2 would add the page directory pointers of 32-bit PAE guests; without it
            // KVM reads them again from guest memory.
            sregs: Frozen(fd.get_sregs().call("KVM_GET_SREGS")?),
            xcrs: Frozen(fd.get_xcrs().call("KVM_GET_XCRS")?),
            xsave: Frozen(fd.get_xsave().call("KVM_GET_XSAVE")?),
            debugregs: Frozen(fd.get_debug_regs().call("KVM_GET_DEBUGREGS")?),
            // The MSRs before the LAPIC: an expired deadline timer is delivered into the LAPIC when
            // its MSR is read.
            msrs: msrs(kvm, fd)?,
            lapic: Frozen(fd.get_lapic().call("KVM_GET_LAPIC")?),
            events: Frozen(fd.get_vcpu_events().call("KVM_GET_VCPU_EVENTS")?),
        })
    }
}

/// All MSRs that KVM says make up a vCPU's state, in the order in which they are to be set.
fn msrs(kvm: &Kvm, fd: &VcpuFd) -> Result<Vec<Frozen<kvm_msr_entry>>, KvmError> {
    let mut indices = kvm.get_msr_index_list().call("KVM_GET_MSR_INDEX_LIST")?.as_slice().to_vec();
    // The TSC near the end, so that the clock of the restored guest loses little while the others are
    // set; the deadline after it, as KVM converts it to a host timer with the TSC of that moment.
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
        let mut query = Msrs::from_entries(&query).map_err(|_| too_many_msrs())?;
        // KVM stops at the first register it cannot read: one that is listed although this vCPU's
        // CPUID hides it. It has no value then; go on behind it.
        let read = fd.get_msrs(&mut query).call("KVM_GET_MSRS")?;
        entries.extend(query.as_slice()[..read].iter().copied().map(Frozen));
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(entries)
}

/// The MSRs with the time stamp counter as it is after a sleep. Its deadline stays: one that has passed
/// meanwhile raises its interrupt at once.
fn later(
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

fn too_many_msrs() -> KvmError {
    KvmError { call: "KVM_GET_MSRS", source: std::io::Error::from_raw_os_error(libc::E2BIG) }
}

fn set_msrs(fd: &VcpuFd, msrs: &[Frozen<kvm_msr_entry>]) -> Result<(), VcpuError> {
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
            later(&msrs, 500_000_000, 2_000_000).iter().map(|msr| msr.0.data).collect();
        assert_eq!(found, [5, 1_000_001_000, 2000]);
    }
}
