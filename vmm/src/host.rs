//! What this host offers: the KVM device, and the CPU's identity.

use std::arch::x86_64::__cpuid;
use std::io;

use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};

/// The device that KVM is reached through.
pub const KVM_DEVICE: &str = "/dev/kvm";
/// The one stable version of the KVM API (KVM API documentation, "KVM_GET_API_VERSION").
const KVM_API_VERSION: i32 = 12;

/// A host that can run guests.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HostReport {
    /// Its CPU.
    pub cpu: HostCpu,
    /// Memory slots a VM may have.
    pub memory_slots: usize,
    /// vCPUs a VM should have at most.
    pub recommended_vcpus: usize,
}

/// A host that cannot run guests.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The device does not open.
    #[error("cannot open {KVM_DEVICE}: {}", advice(source))]
    Open {
        /// What open(2) said.
        #[source]
        source: io::Error,
    },
    /// KVM, but not as every Linux since 2007 has it.
    #[error("{KVM_DEVICE} speaks API version {found}, expected {KVM_API_VERSION}")]
    ApiVersion {
        /// The version found.
        found: i32,
    },
    /// The device opens and gives no VM.
    #[error("{KVM_DEVICE} opens, but KVM_CREATE_VM failed: {}", advice_on_vm(source))]
    CreateVm {
        /// What KVM_CREATE_VM said.
        #[source]
        source: io::Error,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            "no permission; add yourself to the group that owns it: usermod -aG kvm $USER, then log in again"
        }
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
            "the device is not there; enable virtualization in the firmware (or nested virtualization in \
             the hypervisor) and load the module: modprobe kvm_intel or kvm_amd"
        }
        errno => advice_on_limits(errno).unwrap_or("the system refused"),
    }
}

fn advice_on_vm(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        // The CPU is in virtual-machine mode already (vmx_hardware_enable, svm_hardware_enable).
        Some(libc::EBUSY) => {
            "another hypervisor uses the CPU's virtualization (VirtualBox, VMware): end its guests"
        }
        errno => advice_on_limits(errno).unwrap_or("the kernel's log may tell more (dmesg)"),
    }
}

/// What to do where a limit of this process or of the host is reached, whatever was asked for.
fn advice_on_limits(errno: Option<i32>) -> Option<&'static str> {
    Some(match errno? {
        libc::EMFILE => {
            "this process may not have more open files: raise its limit (`ulimit -n`, in systemd LimitNOFILE=)"
        }
        libc::ENFILE => {
            "this host may not have more open files: raise its limit (`sysctl fs.file-max`)"
        }
        libc::ENOMEM => {
            "the host, or the control group of this process, has no memory left: free some, or raise the limit"
        }
        _ => return None,
    })
}

/// Checks that guests can run here: opens the device, checks the API version, creates a VM and drops it.
///
/// # Errors
/// [`ProbeError`] names the device, what failed, and what to do about it.
pub fn probe() -> Result<HostReport, ProbeError> {
    let kvm = open_kvm()?;
    create_vm(&kvm)?;
    Ok(HostReport {
        cpu: HostCpu::current(),
        memory_slots: kvm.get_nr_memslots(),
        recommended_vcpus: kvm.get_nr_vcpus(),
    })
}

pub(crate) fn open_kvm() -> Result<Kvm, ProbeError> {
    let kvm = Kvm::new().map_err(|errno| ProbeError::Open { source: errno.into() })?;
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        found => Err(ProbeError::ApiVersion { found }),
    }
}

pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, ProbeError> {
    // KVM_CREATE_VM takes every lock of the process' memory map (mm_take_all_locks), and gives up when a
    // signal comes meanwhile. A signal is no reason not to have a VM: whoever handles it says so elsewhere.
    unless_interrupted(|| kvm.create_vm())
        .map_err(|errno| ProbeError::CreateVm { source: errno.into() })
}

/// Makes a call again for as long as signals interrupt it.
fn unless_interrupted<T>(
    mut call: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    loop {
        match call() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
}

/// Identity of a CPU, as its CPUID instruction tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpu {
    /// "GenuineIntel", "AuthenticAMD".
    pub vendor: String,
    /// Display family: base plus extended.
    pub family: u32,
    /// Display model: base plus extended.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// The name on the box.
    pub brand: String,
}

impl HostCpu {
    /// The CPU this runs on.
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

pub(crate) fn text(words: &[u32]) -> String {
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
    fn a_signal_during_a_call_is_not_its_result() {
        let mut results = [Err(libc::EINTR), Err(libc::EINTR), Ok(7), Ok(8)].into_iter();
        let mut call = || results.next().unwrap().map_err(kvm_ioctls::Error::new);
        assert_eq!(unless_interrupted(&mut call), Ok(7));
        let mut refused = || Err::<(), _>(kvm_ioctls::Error::new(libc::ENOMEM));
        assert_eq!(unless_interrupted(&mut refused).unwrap_err().errno(), libc::ENOMEM);
    }

    #[test]
    fn this_cpu_has_a_vendor() {
        let cpu = HostCpu::current();
        assert_eq!(cpu.vendor.len(), 12, "{cpu:?}");
        assert!(!cpu.vendor.contains('\0') && !cpu.brand.contains('\0'));
    }

    #[test]
    fn errors_say_what_to_do() {
        let error = |errno| ProbeError::Open { source: io::Error::from_raw_os_error(errno) };
        assert!(error(libc::EACCES).to_string().contains("usermod -aG kvm"));
        assert!(error(libc::ENOENT).to_string().contains("modprobe kvm"));
        assert!(error(libc::EMFILE).to_string().contains("ulimit -n"));
    }

    #[test]
    fn a_vm_that_is_refused_is_told_by_its_cause() {
        let told = |errno| {
            ProbeError::CreateVm { source: io::Error::from_raw_os_error(errno) }.to_string()
        };
        assert!(told(libc::EBUSY).contains("another hypervisor"));
        for (errno, advice) in
            [(libc::EMFILE, "ulimit -n"), (libc::ENFILE, "fs.file-max"), (libc::EIO, "dmesg")]
        {
            let text = told(errno);
            assert!(text.contains(advice) && !text.contains("another hypervisor"), "{text}");
        }
    }
}
