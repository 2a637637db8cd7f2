//! The identity of the host's CPU.

use std::arch::x86_64::__cpuid;

use serde::{Deserialize, Serialize};

/// Identity of a CPU, as its CPUID instruction reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HostCpu {
    /// "GenuineIntel", "AuthenticAMD".
    pub vendor: String,
    /// Display family: base plus extended.
    pub family: u32,
    /// Display model: base plus extended.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// The marketing name.
    pub brand: String,
}

impl HostCpu {
    /// The CPU that this program runs on.
    #[must_use]
    pub fn current() -> HostCpu {
        let leaf0 = __cpuid(0);
        let vendor = text(&[leaf0.ebx, leaf0.edx, leaf0.ecx]);
        let (family, model, stepping) = signature(__cpuid(1).eax);
        let brand = if __cpuid(0x8000_0000).eax >= 0x8000_0004 {
            let words: Vec<u32> = (0x8000_0002..=0x8000_0004)
                .map(__cpuid)
                .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
                .collect();
            text(&words)
        } else {
            String::new()
        };
        HostCpu { vendor, family, model, stepping, brand }
    }
}

/// Family, model and stepping from CPUID leaf 1 EAX (Intel SDM volume 2A, "CPUID", and AMD APM 3).
fn signature(eax: u32) -> (u32, u32, u32) {
    let field = |shift: u32, bits: u32| (eax >> shift) & ((1 << bits) - 1);
    let (base_family, base_model) = (field(8, 4), field(4, 4));
    let family = if base_family == 0xf { base_family + field(20, 8) } else { base_family };
    let model =
        if matches!(base_family, 0x6 | 0xf) { field(16, 4) << 4 | base_model } else { base_model };
    (family, model, field(0, 4))
}

pub(super) fn text(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_of_known_cpus() {
        // EPYC 9354 (Genoa), Xeon 8375C (Ice Lake), Pentium III.
        assert_eq!(signature(0x00a1_0f11), (25, 17, 1));
        assert_eq!(signature(0x0006_06a6), (6, 106, 6));
        assert_eq!(signature(0x0000_0683), (6, 8, 3));
    }

    #[test]
    fn this_cpu_has_a_vendor() {
        let cpu = HostCpu::current();
        assert_eq!(cpu.vendor.len(), 12, "{cpu:?}");
        assert!(!cpu.vendor.contains('\0') && !cpu.brand.contains('\0'));
    }
}
