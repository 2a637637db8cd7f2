//! What the CPUID instruction returns in a fresh guest, where it differs from what KVM supports on this host.
//!
//! Intel SDM volume 2A, "CPUID"; `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::kvm_cpuid_entry2;

/// Leaf 1: the features in ECX, the APIC id and the number of logical CPUs in EBX, HTT in EDX.
const LEAF_FEATURES: u32 = 0x1;
const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_HYPERVISOR: u32 = 1 << 31;
const FEATURE_HTT: u32 = 1 << 28;
/// Leaf 4: the caches, and in EAX bits 31:26 the number of cores less one.
const LEAF_CACHES: u32 = 0x4;
/// Leaves 0xb and 0x1f: the topology, a subleaf for each level.
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
/// Leaf of KVM's own features.
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
/// KVM_FEATURE_ASYNC_PF, _ASYNC_PF_VMEXIT and _ASYNC_PF_INT.
const KVM_ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// Adjusts one entry of KVM_GET_SUPPORTED_CPUID for the vCPU `index` of `count`.
pub(crate) fn adjust(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    let (index, count) = (u32::from(index), u32::from(count.max(1)));
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | index << 24 | count << 16;
            if count > 1 {
                entry.edx |= FEATURE_HTT;
            }
            // KVM supports it whenever it emulates the LAPIC, but the VMM has to set the bit. Guests without
            // a platform timer need it, because they cannot calibrate the LAPIC's timer.
            entry.ecx |= FEATURE_TSC_DEADLINE;
            // The VMM has to set this bit too. Without it Linux does not detect KVM and its clock.
            entry.ecx |= FEATURE_HYPERVISOR;
        }
        LEAF_CACHES if entry.eax & 0x1f != 0 => {
            // vCPUs share only the last level of cache. All vCPUs are cores of one package.
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | (count - 1).min(0x3f) << 26;
        }
        LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => topology(entry, index, count),
        // With this feature, KVM notifies the guest of a page that is missing on the host, and notifies it
        // again when the page is present. A snapshot between the two would lose the second notification.
        LEAF_KVM_FEATURES => entry.eax &= !KVM_ASYNC_PAGE_FAULTS,
        _ => {}
    }
}

/// Each vCPU is a core with one thread, and all cores are in one package. The host's topology does not matter.
fn topology(entry: &mut kvm_cpuid_entry2, index: u32, count: u32) {
    entry.edx = index;
    let (shift, number, kind) = match entry.index {
        0 => (0, 1, 1),
        1 => (count.next_power_of_two().trailing_zeros(), count, 2),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = number;
    entry.ecx = entry.index | kind << 8;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adjusted(entry: kvm_cpuid_entry2, index: u8, count: u8) -> kvm_cpuid_entry2 {
        let mut entry = entry;
        adjust(&mut entry, index, count);
        entry
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        let leaf = kvm_cpuid_entry2 { function: 1, ebx: 0xffff_1234, ..Default::default() };
        let found = adjusted(leaf, 2, 3);
        assert_eq!(found.ebx, 0x0203_1234);
        assert_eq!(found.edx & FEATURE_HTT, FEATURE_HTT);
        assert_eq!(found.ecx, FEATURE_TSC_DEADLINE | FEATURE_HYPERVISOR);
        let leaf = kvm_cpuid_entry2 { function: 0xb, index: 1, edx: 77, ..Default::default() };
        let found = adjusted(leaf, 2, 3);
        assert_eq!((found.eax, found.ebx, found.ecx, found.edx), (2, 3, 0x201, 2));
    }

    #[test]
    fn async_page_faults_are_hidden() {
        let leaf = kvm_cpuid_entry2 { function: 0x4000_0001, eax: !0, ..Default::default() };
        assert_eq!(adjusted(leaf, 0, 1).eax, !(1 << 4 | 1 << 10 | 1 << 14));
    }
}
