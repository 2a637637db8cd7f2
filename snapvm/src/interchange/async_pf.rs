//! Finds KVM's asynchronous page faults in a Firecracker vmstate, and switches them off.
//!
//! With them, KVM sends a guest "page not present" instead of letting its vCPU wait. The guest suspends the task and
//! halts until KVM sends "page ready". On a host without hardware paging that takes 2 to 9 ms, and loading the page 0.1
//! ms. (Linux, Documentation/virt/kvm/x86/msr.rst, `MSR_KVM_ASYNC_PF_EN`.)

use std::ops::Range;

use crc::{CRC_64_REDIS, Crc};
use snapfmt::{ReadError, Snapshot};

use super::error::ExportError;
use super::firecracker::{GuestArch, VMSTATE};

const MSR_KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
/// Bit 0 of the MSR's value switches asynchronous page faults on.
const ENABLED: u64 = 1;
/// The vmstate ends with the CRC-64 of all bytes before it.
const CRC_BYTES: usize = 8;

/// Whether a snapshot has a Firecracker vmstate in which a vCPU has asynchronous page faults switched on.
///
/// # Errors
/// [`ReadError`]: the vmstate cannot be read.
pub fn has_async_page_faults(snapshot: &Snapshot) -> Result<bool, ReadError> {
    Ok(snapshot.state(VMSTATE.tag())?.is_some_and(|vmstate| is_on(&vmstate.bytes)))
}

fn is_on(vmstate: &[u8]) -> bool {
    values(vmstate).into_iter().any(|value| read(vmstate, &value) & ENABLED != 0)
}

/// The vmstate with asynchronous page faults switched off, and a new checksum.
pub(super) fn switched_off(vmstate: &[u8]) -> Result<Vec<u8>, ExportError> {
    let crc = Crc::<u64>::new(&CRC_64_REDIS);
    let (body, found) =
        vmstate.split_last_chunk::<CRC_BYTES>().ok_or(ExportError::AsyncPageFaults)?;
    if GuestArch::of_vmstate(vmstate) != Some(GuestArch::X86_64)
        || crc.checksum(body).to_le_bytes() != *found
    {
        return Err(ExportError::AsyncPageFaults);
    }
    let mut changed = body.to_vec();
    for value in values(vmstate) {
        if read(body, &value) & ENABLED != 0 {
            changed[value].fill(0);
        }
    }
    changed.extend(crc.checksum(&changed).to_le_bytes());
    Ok(changed)
}

/// The places of that MSR's values: behind its index and four reserved bytes, as in `struct kvm_msr_entry`. None is in the
/// checksum.
fn values(vmstate: &[u8]) -> Vec<Range<usize>> {
    let body = &vmstate[..vmstate.len().saturating_sub(CRC_BYTES)];
    let mut entry = [0; 8];
    entry[..4].copy_from_slice(&MSR_KVM_ASYNC_PF_EN.to_le_bytes());
    let found = body.windows(16).enumerate().filter(|(_, window)| window.starts_with(&entry));
    found.map(|(at, _)| at + 8..at + 16).collect()
}

fn read(vmstate: &[u8], value: &Range<usize>) -> u64 {
    vmstate[value.clone()].try_into().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vmstate(value: u64) -> Vec<u8> {
        let mut bytes = 0x0710_1984_8664_0001_u64.to_le_bytes().to_vec();
        bytes.extend([7; 33]);
        for (index, value) in [(0x4b56_4d01, 5), (MSR_KVM_ASYNC_PF_EN, value), (0x4b56_4d03, 9)] {
            bytes.extend(u64::from(index).to_le_bytes());
            bytes.extend(u64::to_le_bytes(value));
        }
        let crc = Crc::<u64>::new(&CRC_64_REDIS).checksum(&bytes);
        bytes.extend(crc.to_le_bytes());
        bytes
    }

    #[test]
    fn only_that_value_and_the_checksum_change() {
        let on = vmstate(0x0183_7b8d);
        assert!(is_on(&on) && !is_on(&vmstate(0x0183_7b8c)));
        let off = switched_off(&on).expect("it is a vmstate");
        assert_eq!(off, vmstate(0));
        let other = vmstate(0x0183_7b8c);
        assert_eq!(switched_off(&other).expect("it is a vmstate"), other);
    }

    #[test]
    fn a_file_that_is_not_a_vmstate_is_refused() {
        let mut damaged = vmstate(1);
        damaged[20] ^= 1;
        for bad in [damaged, Vec::new(), vec![0; 100]] {
            assert!(switched_off(&bad).is_err());
        }
    }
}
