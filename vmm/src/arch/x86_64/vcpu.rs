//! A vCPU: how a fresh one is created. `vcpu_state` saves and restores it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::boot::Entry;
use super::vcpu_state::VcpuError;
use super::{cpuid, msrs};
use crate::error::{KvmError, NameCall};

/// A vCPU that does not run.
pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    /// How often KVM_RUN has returned. The thread that runs the vCPU writes it.
    pub(crate) exits: Arc<AtomicU64>,
    pub(super) cpuid: CpuId,
}

impl Vcpu {
    /// A fresh vCPU, one of `count`. The first begins at `entry`. The others wait for a start-up interrupt,
    /// which is the state in which KVM creates them.
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
            msrs::set(&fd, &[msrs::MTRRS_ON]).map_err(|error| match error {
                VcpuError::Kvm(error) => error,
                _ => msrs::too_many(),
            })?;
        }
        Ok(Vcpu { fd, exits: Arc::default(), cpuid })
    }

    /// Notifies the guest that it has not run for a while, by a flag in its kvm-clock. Its kernel reads the flag before
    /// it reports a lockup, and clears it.
    pub(crate) fn notify_of_pause(&self) {
        // The only error is EINVAL, for a guest that has no kvm-clock.
        let _ = self.fd.kvmclock_ctrl();
    }
}

/// The address of the next instruction, if KVM returns it.
pub(crate) fn instruction_pointer(vcpu: &VcpuFd) -> Option<u64> {
    vcpu.get_regs().ok().map(|regs| regs.rip)
}
