//! Firecracker: a memory file and a vmstate file.
//!
//! The memory file contains the regions of guest memory one after the other. Their addresses are
//! in the vmstate, which is opaque here. But on each architecture, Firecracker's layout depends
//! only on the size of the memory, so the size gives the addresses. Of the vmstate only its
//! beginning is read: the magic, the version, and the size of the memory.

use std::ops::Range;

use super::foreign_file::ForeignFile;

/// The vmstate file of a Firecracker snapshot.
pub const VMSTATE: ForeignFile =
    ForeignFile { name: "vmstate", tag: u32::from_le_bytes(*b"FCvs"), what: "Firecracker vmstate" };

/// Name of the memory file in an exported folder.
pub(super) const MEMORY: &str = "memory";

/// The memory of a Firecracker guest is whole MiB.
pub(super) const MEMORY_UNIT: u64 = 1 << 20;

/// Architecture of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestArch {
    /// x86-64.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

/// `SNAPSHOT_MAGIC_ID` without the lower 16 bits, in which old releases put a version
/// (Firecracker, `src/vmm/src/snapshot`).
const MAGIC_X86_64: u64 = 0x0710_1984_8664;
const MAGIC_AARCH64: u64 = 0x0710_1984_aaaa;

/// The magic is within this number of bytes. It is the first field, but some of the encodings
/// that Firecracker has used put a few bytes in front of it.
const MAGIC_WITHIN: usize = 64;

impl GuestArch {
    /// The architecture of a vmstate; `None` if it has no magic of Firecracker.
    #[must_use]
    pub fn of_vmstate(vmstate: &[u8]) -> Option<Self> {
        let start = &vmstate[..vmstate.len().min(MAGIC_WITHIN)];
        start.windows(8).find_map(|window| {
            // Eight bytes: the window's length.
            let value = u64::from_le_bytes(window.try_into().ok()?);
            match value >> 16 {
                MAGIC_X86_64 => Some(Self::X86_64),
                MAGIC_AARCH64 => Some(Self::Aarch64),
                _ => None,
            }
        })
    }

    /// Its name in metadata: `x86_64` or `aarch64`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// The ranges that Firecracker uses for memory of this size: `arch_memory_regions` of its
    /// `src/vmm/src/arch/x86_64/mod.rs` and `aarch64/mod.rs`. The gaps are for devices; early
    /// releases had none at 256 GiB.
    pub(super) fn ranges(self, memory_bytes: u64) -> Vec<Range<u64>> {
        const GIB: u64 = 1 << 30;
        let usable: &[Range<u64>] = match self {
            Self::X86_64 => &[0..3 * GIB, 4 * GIB..256 * GIB, 512 * GIB..u64::MAX],
            Self::Aarch64 => &[2 * GIB..256 * GIB, 512 * GIB..u64::MAX],
        };
        let mut left = memory_bytes;
        let mut ranges = Vec::new();
        for range in usable {
            let len = left.min(range.end - range.start);
            if len > 0 {
                ranges.push(range.start..range.start + len);
            }
            left -= len;
        }
        ranges
    }
}

/// The size of the guest's memory in bytes, without memory that can be plugged in. `None`: the encoding is not known.
///
/// The first fields are the magic, the version of the format as text, and `VmInfo::mem_size_mib`
/// (Firecracker, `src/vmm/src/snapshot` and `src/vmm/src/persist.rs`), in one of two encodings.
pub(super) fn memory_bytes(vmstate: &[u8]) -> Option<u64> {
    let mib = fixed_size_mib(vmstate).or_else(|| packed_size_mib(vmstate))?;
    mib.checked_mul(MEMORY_UNIT).filter(|bytes| *bytes > 0)
}

/// bincode: integers of eight bytes, and text behind its length in eight bytes.
fn fixed_size_mib(vmstate: &[u8]) -> Option<u64> {
    let rest = after_magic(vmstate)?;
    let (len, rest) = rest.split_first_chunk()?;
    let (version, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    is_version(version).then_some(())?;
    Some(u64::from_le_bytes(*rest.first_chunk()?))
}

/// bitcode: an integer has its packing in front (0, 2, 4, 6: it takes 8, 4, 2, 1 bytes), text its length in one byte.
fn packed_size_mib(vmstate: &[u8]) -> Option<u64> {
    let rest = after_magic(vmstate.strip_prefix(&[0])?)?;
    let (len, rest) = rest.split_first()?;
    let (version, rest) = rest.split_at_checked(usize::from(*len))?;
    is_version(version).then_some(())?;
    let (packing, rest) = rest.split_first()?;
    match packing {
        0 => rest.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)),
        2 => rest.first_chunk().map(|bytes| u32::from_le_bytes(*bytes).into()),
        4 => rest.first_chunk().map(|bytes| u16::from_le_bytes(*bytes).into()),
        6 => rest.first().map(|byte| (*byte).into()),
        _ => None,
    }
}

fn after_magic(bytes: &[u8]) -> Option<&[u8]> {
    let (magic, rest) = bytes.split_first_chunk()?;
    matches!(u64::from_le_bytes(*magic) >> 16, MAGIC_X86_64 | MAGIC_AARCH64).then_some(rest)
}

/// Three numbers, such as `10.0.0`.
fn is_version(text: &[u8]) -> bool {
    let is_number = |part: &[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
    text.len() <= 32 && text.split(|byte| *byte == b'.').filter(|part| is_number(part)).count() == 3
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_lies_around_the_gaps() {
        let x86 = |bytes| GuestArch::X86_64.ranges(bytes);
        assert_eq!(x86(GIB), [0..GIB]);
        assert_eq!(x86(3 * GIB), [0..3 * GIB]);
        assert_eq!(x86(3 * GIB + 4096), [0..3 * GIB, 4 * GIB..4 * GIB + 4096]);
        assert_eq!(x86(256 * GIB), [0..3 * GIB, 4 * GIB..256 * GIB, 512 * GIB..513 * GIB]);
        assert_eq!(GuestArch::Aarch64.ranges(GIB), [2 * GIB..3 * GIB]);
    }

    #[test]
    fn the_magic_gives_the_architecture() {
        let mut vmstate = 0x0710_1984_8664_0001_u64.to_le_bytes().to_vec();
        vmstate.extend([9; 100]);
        assert_eq!(GuestArch::of_vmstate(&vmstate), Some(GuestArch::X86_64));
        vmstate.splice(0..0, [8, 0]);
        assert_eq!(GuestArch::of_vmstate(&vmstate), Some(GuestArch::X86_64));
        let arm = 0x0710_1984_aaaa_0000_u64.to_le_bytes();
        assert_eq!(GuestArch::of_vmstate(&arm), Some(GuestArch::Aarch64));
        for other in [&[][..], &[0; 7], &[0; 200]] {
            assert_eq!(GuestArch::of_vmstate(other), None);
        }
    }

    #[test]
    fn the_size_of_memory_is_found_in_both_encodings() {
        let magic = 0x0710_1984_8664_0000_u64.to_le_bytes();
        let fixed =
            [&magic[..], &5_u64.to_le_bytes(), b"5.0.0", &64_u64.to_le_bytes(), &[1; 9]].concat();
        assert_eq!(memory_bytes(&fixed), Some(64 << 20));
        let packed = |size: &[u8]| [&[0], &magic[..], &[6], b"10.0.0", size].concat();
        for (size, mib) in [
            (&[6, 32][..], Some(32)),
            (&[6, 128, 7], Some(128)),
            (&[4, 0, 2], Some(512)),
            (&[2, 0, 0, 1, 0], Some(65536)),
            (&[0, 0, 0, 0, 0, 1, 0, 0, 0], Some(1 << 32)),
            (&[0, 0, 0, 0, 0, 0, 0, 0, 255], None),
            (&[0, 1], None),
            (&[6, 0], None),
            (&[5, 9], None),
            (&[6], None),
            (&[], None),
        ] {
            assert_eq!(memory_bytes(&packed(size)), mib.map(|mib: u64| mib << 20), "{size:?}");
        }
        // A length of 2^64 - 1, text that is no version, and no magic.
        let long = [&magic[..], &[255; 100]].concat();
        let other = [&magic[..], &3_u64.to_le_bytes(), b"abc", &64_u64.to_le_bytes()].concat();
        for unknown in [&long[..], &other, &fixed[1..], &magic, &[]] {
            assert_eq!(memory_bytes(unknown), None);
        }
    }
}
