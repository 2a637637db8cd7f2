//! What this host offers: the KVM device, and the features of its CPU.

use std::io;

use kvm_ioctls::{Kvm, VmFd};

use crate::arch::{self, HostCpu};
use crate::error::KvmError;
use crate::state::VmState;

/// The device file of KVM.
pub const KVM_DEVICE: &str = "/dev/kvm";
/// The one stable version of the KVM API (KVM API documentation, "KVM_GET_API_VERSION").
pub const KVM_API_VERSION: i32 = 12;

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
        /// The error of open(2).
        #[source]
        source: io::Error,
    },
    /// KVM has another API version than every Linux since 2007.
    #[error("{KVM_DEVICE} speaks API version {found}, expected {KVM_API_VERSION}")]
    ApiVersion {
        /// The version found.
        found: i32,
    },
    /// The device opens, but KVM does not create a VM.
    #[error("{KVM_DEVICE} opens, but KVM_CREATE_VM failed: {}", advice_on_vm(source))]
    CreateVm {
        /// The error of KVM_CREATE_VM.
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
            "the device does not exist; enable virtualization in the firmware (or nested virtualization in \
             the hypervisor) and load the module: modprobe kvm_intel or kvm_amd"
        }
        errno => advice_on_limits(errno).unwrap_or("the system call failed"),
    }
}

fn advice_on_vm(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        // The CPU is in virtual-machine mode already (vmx_hardware_enable, svm_hardware_enable).
        Some(libc::EBUSY) => {
            "another hypervisor uses the CPU's virtualization (VirtualBox, VMware): end its guests"
        }
        errno => {
            advice_on_limits(errno).unwrap_or("the kernel's log may have more details (dmesg)")
        }
    }
}

/// What to do when a limit of this process or of the host is reached.
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
    // KVM_CREATE_VM takes every lock of the process's memory map (mm_take_all_locks), and fails when a signal
    // arrives during that. A signal is not an error here: its handler deals with it.
    unless_interrupted(|| kvm.create_vm())
        .map_err(|errno| ProbeError::CreateVm { source: errno.into() })
}

/// Repeats a call as long as signals interrupt it.
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

/// The features of this host could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeaturesError {
    /// This host cannot run guests.
    #[error(transparent)]
    Host(#[from] ProbeError),
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// CPU features that the guest of `state` has and this host does not have; empty when the host has all.
///
/// The call takes half a millisecond (KVM_GET_SUPPORTED_CPUID). It is not needed when the host is known to be
/// the one that the guest was saved on.
///
/// # Errors
/// [`FeaturesError`] when this host cannot run guests or does not report its features.
pub fn missing_features(state: &VmState) -> Result<Vec<String>, FeaturesError> {
    let kvm = open_kvm()?;
    match state.vcpus().first() {
        Some(vcpu) => Ok(arch::missing_features(&kvm, vcpu)?),
        None => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_during_a_call_is_not_its_result() {
        let mut results = [Err(libc::EINTR), Err(libc::EINTR), Ok(7), Ok(8)].into_iter();
        let mut call = || results.next().unwrap().map_err(kvm_ioctls::Error::new);
        assert_eq!(unless_interrupted(&mut call), Ok(7));
        let mut refused = || Err::<(), _>(kvm_ioctls::Error::new(libc::ENOMEM));
        assert_eq!(unless_interrupted(&mut refused).unwrap_err().errno(), libc::ENOMEM);
    }

    #[test]
    fn errors_say_what_to_do() {
        let error = |errno| ProbeError::Open { source: io::Error::from_raw_os_error(errno) };
        assert!(error(libc::EACCES).to_string().contains("usermod -aG kvm"));
        assert!(error(libc::ENOENT).to_string().contains("modprobe kvm"));
        assert!(error(libc::EMFILE).to_string().contains("ulimit -n"));
    }

    #[test]
    fn the_advice_depends_on_why_the_vm_is_refused() {
        let text_of = |errno| {
            ProbeError::CreateVm { source: io::Error::from_raw_os_error(errno) }.to_string()
        };
        assert!(text_of(libc::EBUSY).contains("another hypervisor"));
        for (errno, advice) in
            [(libc::EMFILE, "ulimit -n"), (libc::ENFILE, "fs.file-max"), (libc::EIO, "dmesg")]
        {
            let text = text_of(errno);
            assert!(text.contains(advice) && !text.contains("another hypervisor"), "{text}");
        }
    }
}
