//! Whether this host's CPU has the features of the CPU that a guest was saved on.
//!
//! A guest keeps using the features that it found when it booted. If the new host lacks one of them, the guest
//! gets an illegal instruction at some later time. So the features are compared before the restore.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::host_cpu::text;
use super::vcpu_state::VcpuState;
use crate::error::{KvmError, NameCall};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Registers of CPUID whose bits are features: leaf, subleaf, register, and the bits that do not depend on the
/// host. Intel SDM volume 2A, "CPUID"; AMD APM volume 3, appendix E.
const REGISTERS: [(u32, u32, Register, u32); 13] = [
    // TSC deadline (KVM's LAPIC always has it), OSXSAVE (a copy of CR4), "a hypervisor".
    (0x1, 0, Register::Ecx, 1 << 24 | 1 << 27 | 1 << 31),
    // HTT: more than one vCPU.
    (0x1, 0, Register::Edx, 1 << 28),
    (0x7, 0, Register::Ebx, 0),
    // OSPKE: a copy of CR4.
    (0x7, 0, Register::Ecx, 1 << 4),
    (0x7, 0, Register::Edx, 0),
    (0x7, 1, Register::Eax, 0),
    (0x7, 1, Register::Edx, 0),
    // Parts of the XSAVE area, and forms of XSAVE.
    (0xd, 0, Register::Eax, 0),
    (0xd, 1, Register::Eax, 0),
    (0x8000_0001, 0, Register::Ecx, 0),
    (0x8000_0001, 0, Register::Edx, 0),
    (0x8000_0008, 0, Register::Ebx, 0),
    (0x4000_0001, 0, Register::Eax, 0),
];

/// Names of the features that often differ between CPUs.
const NAMES: [(u32, u32, Register, u32, &str); 16] = [
    (0x1, 0, Register::Ecx, 12, "fma"),
    (0x1, 0, Register::Ecx, 13, "cx16"),
    (0x1, 0, Register::Ecx, 17, "pcid"),
    (0x1, 0, Register::Ecx, 20, "sse4_2"),
    (0x1, 0, Register::Ecx, 25, "aes"),
    (0x1, 0, Register::Ecx, 26, "xsave"),
    (0x1, 0, Register::Ecx, 28, "avx"),
    (0x7, 0, Register::Ebx, 5, "avx2"),
    (0x7, 0, Register::Ebx, 8, "bmi2"),
    (0x7, 0, Register::Ebx, 16, "avx512f"),
    (0x7, 0, Register::Ebx, 20, "smap"),
    (0x7, 0, Register::Ecx, 3, "pku"),
    (0x7, 0, Register::Ecx, 16, "la57"),
    (0xd, 1, Register::Eax, 3, "xsaves"),
    (0x8000_0001, 0, Register::Edx, 26, "pdpe1gb"),
    (0x8000_0001, 0, Register::Edx, 27, "rdtscp"),
];

/// Features that the saved vCPU has and this host does not have.
pub(crate) fn missing_features(kvm: &Kvm, vcpu: &VcpuState) -> Result<Vec<String>, KvmError> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).call("KVM_GET_SUPPORTED_CPUID")?;
    let saved: Vec<kvm_cpuid_entry2> = vcpu.cpuid.iter().map(|entry| entry.0).collect();
    Ok(missing(&saved, supported.as_slice()))
}

fn missing(saved: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    let vendor = |entries| entry(entries, 0, 0).map(|e| [e.ebx, e.edx, e.ecx]);
    if let (Some(saved), Some(host)) = (vendor(saved), vendor(supported))
        && saved != host
    {
        missing.push(format!("a CPU of {}", text(&saved)));
    }
    for (leaf, subleaf, register, ignored) in REGISTERS {
        let bits = |entries| entry(entries, leaf, subleaf).map_or(0, |e| value(&e, register));
        let lacking = bits(saved) & !bits(supported) & !ignored;
        let bits = (0..32).filter(|bit| lacking >> bit & 1 == 1);
        missing.extend(bits.map(|bit| name(leaf, subleaf, register, bit)));
    }
    missing
}

fn name(leaf: u32, subleaf: u32, register: Register, bit: u32) -> String {
    let place = (leaf, subleaf, register, bit);
    match NAMES.iter().find(|(leaf, subleaf, reg, bit, _)| (*leaf, *subleaf, *reg, *bit) == place) {
        Some((.., name)) => (*name).into(),
        None => format!("CPUID {leaf:#x}.{subleaf} {register:?} bit {bit}"),
    }
}

fn entry(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
    entries.iter().find(|e| (e.function, e.index) == (function, index)).copied()
}

fn value(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(ecx1: u32, ebx7: u32, vendor: u32) -> Vec<kvm_cpuid_entry2> {
        vec![
            kvm_cpuid_entry2 { ebx: vendor, ..Default::default() },
            kvm_cpuid_entry2 { function: 1, ecx: ecx1, ..Default::default() },
            kvm_cpuid_entry2 { function: 7, ebx: ebx7, ..Default::default() },
        ]
    }

    #[test]
    fn missing_features_are_named() {
        let saved = entries(1 << 28 | 1 << 31 | 1 << 24, 1 << 16 | 1 << 1, 0);
        assert!(missing(&saved, &saved).is_empty());
        let host = entries(0, 0, 0);
        assert_eq!(missing(&saved, &host), ["avx", "CPUID 0x7.0 Ebx bit 1", "avx512f"]);
        // Features that the guest does not know do no harm.
        assert!(missing(&host, &saved).is_empty());
    }

    #[test]
    fn another_vendor_is_missing_too() {
        let host = entries(0, 0, u32::from_le_bytes(*b"Genu"));
        let saved = entries(0, 0, u32::from_le_bytes(*b"Auth"));
        assert_eq!(missing(&saved, &host), ["a CPU of Auth"]);
    }
}
