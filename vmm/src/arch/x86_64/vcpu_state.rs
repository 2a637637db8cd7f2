//! The state of a vCPU: what it is, how it is saved, and how it is restored.
//!
//! The order of the calls is part of the state's meaning; each step names its dependency. KVM API documentation;
//! `arch/x86/kvm/x86.c`.
#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};

use super::msrs;
use super::vcpu::Vcpu;
use crate::error::{KvmError, NameCall};
use crate::frozen::Frozen;
use crate::state::{StateError, count};

const CPUID_ENTRIES_MAX: usize = 256;
const MSRS_MAX: usize = 1024;

/// One vCPU. Each field is named after the KVM_GET_ call that gives it.
#[derive(Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VcpuState {
    /// What the guest's CPUID instruction answers (KVM_SET_CPUID2).
    pub cpuid: Vec<Frozen<kvm_cpuid_entry2>>,
    /// Frequency of the time stamp counter.
    pub tsc_khz: u32,
    /// Segments, control registers, descriptor tables.
    pub sregs: Frozen<kvm_sregs>,
    /// General registers, instruction pointer, flags.
    pub regs: Frozen<kvm_regs>,
    /// Extended control registers: which features XSAVE manages.
    pub xcrs: Frozen<kvm_xcrs>,
    /// x87, SSE and AVX state: the 4 KiB XSAVE area. A process must request features beyond it (AMX) with arch_prctl
    /// before a guest can use them, and this crate does not.
    pub xsave: Frozen<kvm_xsave>,
    /// Debug registers.
    pub debugregs: Frozen<kvm_debugregs>,
    /// The local APIC.
    pub lapic: Frozen<kvm_lapic_state>,
    /// Model-specific registers in the order in which they are to be set.
    pub msrs: Vec<Frozen<kvm_msr_entry>>,
    /// Whether it runs, is halted, or waits for a start-up interrupt.
    pub mp_state: Frozen<kvm_mp_state>,
    /// Exceptions, interrupts and NMIs that are being delivered.
    pub events: Frozen<kvm_vcpu_events>,
}

// The encoding depends on these sizes. The kernel never changes them, and a new version of the bindings must
// not change them either.
const _: () = {
    assert!(size_of::<kvm_cpuid_entry2>() == 40);
    assert!(size_of::<kvm_sregs>() == 312);
    assert!(size_of::<kvm_regs>() == 144);
    assert!(size_of::<kvm_xcrs>() == 392);
    assert!(size_of::<kvm_xsave>() == 4096);
    assert!(size_of::<kvm_debugregs>() == 128);
    assert!(size_of::<kvm_lapic_state>() == 1024);
    assert!(size_of::<kvm_msr_entry>() == 16);
    assert!(size_of::<kvm_mp_state>() == 4);
    assert!(size_of::<kvm_vcpu_events>() == 64);
};

/// A vCPU that could not be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// This host's CPU, or its KVM, does not accept the value of a model-specific register.
    #[error("KVM_SET_MSRS: this host refuses {value:#x} for MSR {index:#x}")]
    Msr {
        /// Number of the register.
        index: u32,
        /// Value that was to be set.
        value: u64,
    },
    /// The state has more entries than KVM accepts.
    #[error("the state has more {what} than KVM takes")]
    TooMany {
        /// Which entries.
        what: &'static str,
    },
}

impl VcpuState {
    /// Checks the lists of a decoded state.
    pub(crate) fn validate(&self) -> Result<(), StateError> {
        count("CPUID entries of a vCPU", self.cpuid.len(), 1, CPUID_ENTRIES_MAX)?;
        count("MSRs of a vCPU", self.msrs.len(), 0, MSRS_MAX)
    }
}

impl Vcpu {
    /// A vCPU with the saved `state`. Its time stamp counter is `slept_ns` later.
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
        // Before the TSC's value (an MSR), which is counted in this frequency. The call is made only if the
        // frequency differs, because a host that cannot scale refuses even its own frequency.
        if fd.get_tsc_khz().call("KVM_GET_TSC_KHZ")? != state.tsc_khz {
            fd.set_tsc_khz(state.tsc_khz).call("KVM_SET_TSC_KHZ")?;
        }
        let vcpu = Vcpu { fd, exits: Arc::default(), cpuid };
        vcpu.set(state, slept_ns)?;
        Ok(vcpu)
    }

    /// Puts the vCPU into a saved state of it. CPUID and the frequency stay: the guest cannot change them. `first`: it is
    /// the first of its guest's vCPUs that is put back.
    pub(crate) fn reset(
        &self,
        state: &VcpuState,
        slept_ns: u64,
        first: bool,
    ) -> Result<(), VcpuError> {
        // KVM takes a value near the present one (1 s) for an attempt to synchronize vCPUs, and keeps the present one. The
        // other vCPUs are then synchronized with the first, as in a new guest.
        if first {
            msrs::set(&self.fd, &msrs::far_from_now(&state.msrs, slept_ns, state.tsc_khz))?;
        }
        self.set(state, slept_ns)
    }

    fn set(&self, state: &VcpuState, slept_ns: u64) -> Result<(), VcpuError> {
        let fd = &self.fd;
        // Before the MSRs (EFER is in both, and CR0 and CR4 constrain it) and before the LAPIC,
        // whose base address and mode are in sregs.
        fd.set_sregs(&state.sregs.0).call("KVM_SET_SREGS")?;
        fd.set_regs(&state.regs.0).call("KVM_SET_REGS")?;
        // XCR0 before the XSAVE area: it decides which features KVM reads from the area.
        fd.set_xcrs(&state.xcrs.0).call("KVM_SET_XCRS")?;
        // SAFETY: KVM reads more than the 4 KiB of the structure only when the process has requested features beyond
        // them with arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which this crate does not.
        unsafe { fd.set_xsave(&state.xsave.0) }.call("KVM_SET_XSAVE")?;
        fd.set_debug_regs(&state.debugregs.0).call("KVM_SET_DEBUGREGS")?;
        // After sregs (see there), before the MSRs: KVM drops the deadline timer's MSR unless the
        // LAPIC's timer is in deadline mode.
        fd.set_lapic(&state.lapic.0).call("KVM_SET_LAPIC")?;
        msrs::set(fd, &msrs::advance_tsc(&state.msrs, slept_ns, state.tsc_khz))?;
        // After the LAPIC: a vCPU that waits for a start-up interrupt reads it.
        fd.set_mp_state(state.mp_state.0).call("KVM_SET_MP_STATE")?;
        // Last: KVM_SET_REGS drops a pending exception, KVM_SET_SREGS the interrupt being delivered.
        fd.set_vcpu_events(&state.events.0).call("KVM_SET_VCPU_EVENTS").map_err(VcpuError::Kvm)
    }

    /// The state of a vCPU whose pending I/O has been completed.
    pub(crate) fn save(&self, kvm: &Kvm) -> Result<VcpuState, KvmError> {
        let fd = &self.fd;
        // First: when it is read, KVM handles pending start-up and INIT interrupts, and they change the
        // rest of the state.
        let mp_state = fd.get_mp_state().call("KVM_GET_MP_STATE")?;
        Ok(VcpuState {
            mp_state: Frozen(mp_state),
            cpuid: self.cpuid.as_slice().iter().copied().map(Frozen).collect(),
            tsc_khz: fd.get_tsc_khz().call("KVM_GET_TSC_KHZ")?,
            regs: Frozen(fd.get_regs().call("KVM_GET_REGS")?),
            // KVM_GET_SREGS2 would add the page directory pointers of 32-bit PAE guests. Without it,
            // KVM reads them from guest memory again.
            sregs: Frozen(fd.get_sregs().call("KVM_GET_SREGS")?),
            xcrs: Frozen(fd.get_xcrs().call("KVM_GET_XCRS")?),
            xsave: Frozen(fd.get_xsave().call("KVM_GET_XSAVE")?),
            debugregs: Frozen(fd.get_debug_regs().call("KVM_GET_DEBUGREGS")?),
            // The MSRs before the LAPIC: when the MSR of an expired deadline timer is read, its interrupt
            // is delivered into the LAPIC.
            msrs: msrs::read(kvm, fd)?,
            lapic: Frozen(fd.get_lapic().call("KVM_GET_LAPIC")?),
            events: Frozen(fd.get_vcpu_events().call("KVM_GET_VCPU_EVENTS")?),
        })
    }
}
