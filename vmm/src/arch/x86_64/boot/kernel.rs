//! The kernel file. Its headers are checked first, so that errors are specific; then it is loaded.
//!
//! ELF: `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol", and `pvh.rst`; bzImage: boot.rst,
//! "The Real-Mode Kernel Header". Offsets below are those of the documents.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use linux_loader::elf::PT_LOAD;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::error::KernelError;
use crate::arch::CMDLINE_MAX_BYTES;

/// Kernels begin here or above. `address_map` lists what is below.
const HIGH_MEMORY: u64 = 1 << 20;
/// What 64-bit x86 kernels read of a command line, its final zero included (COMMAND_LINE_SIZE).
const COMMAND_LINE_SIZE: u32 = 2048;
/// Highest address of an initrd for kernels that do not define it: boot.rst, "initrd_addr_max".
const INITRD_ADDR_MAX: u32 = 0x7fff_ffff;
/// Program headers of any kernel; a vmlinux has five.
const PROGRAM_HEADERS_MAX: u16 = 128;

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// ELF identification: 64 bit, little-endian.
const ELF_CLASS_DATA: [u8; 2] = [2, 1];
const EM_X86_64: u16 = 62;

/// Start of a bzImage's setup header.
const SETUP_HEADER: usize = 0x1f1;
const SETUP_HEADER_MAGIC: &[u8] = b"HdrS";
/// The headers of both formats are in the first bytes of this number.
const HEAD_BYTES: u64 = 1024;
/// Protocol with `xloadflags`.
const PROTOCOL_MIN: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1 << 0;
const LOADED_HIGH: u8 = 1 << 0;
/// Offset of the 64-bit entry point in the loaded kernel.
const ENTRY_64_OFFSET: u64 = 0x200;

/// A kernel in guest memory.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Where the 64-bit protocol enters it.
    pub(super) entry: u64,
    /// Where PVH enters it, if it has that entry.
    pub(super) pvh_entry: Option<u64>,
    /// First address that it does not need.
    end: u64,
    /// A bzImage's setup header, which becomes part of the boot parameters.
    pub(super) setup_header: Vec<u8>,
    cmdline_size: u32,
    initrd_addr_max: u32,
}

impl Kernel {
    /// Most bytes of a command line, without its final zero.
    pub(crate) fn cmdline_max(&self) -> usize {
        // The place of the command line in memory is a limit too.
        self.cmdline_size.min(CMDLINE_MAX_BYTES) as usize - 1
    }

    /// The addresses that an initrd may use, given the end of low memory.
    pub(crate) fn initrd_room(&self, low_end: u64) -> Range<u64> {
        self.end..low_end.min(u64::from(self.initrd_addr_max) + 1)
    }

    /// Loads the file into memory below `low_end`.
    pub(crate) fn load(
        file: &mut File,
        memory: &GuestMemoryMmap,
        low_end: u64,
    ) -> Result<Kernel, KernelError> {
        let mut head = Vec::new();
        let mut start = (&*file).take(HEAD_BYTES);
        start.read_to_end(&mut head).map_err(KernelError::Read)?;
        if head.starts_with(ELF_MAGIC) {
            load_elf(file, &head, memory, low_end)
        } else if head.get(0x202..0x206) == Some(SETUP_HEADER_MAGIC) {
            load_bzimage(file, &head, memory, low_end)
        } else {
            Err(KernelError::Format)
        }
    }
}

fn load_elf(
    file: &mut File,
    head: &[u8],
    memory: &GuestMemoryMmap,
    low_end: u64,
) -> Result<Kernel, KernelError> {
    let cut = KernelError::Damaged { what: "the ELF header is cut short" };
    if head.get(4..6) != Some(&ELF_CLASS_DATA) || u16_at(head, 18) != Some(EM_X86_64) {
        return Err(KernelError::Machine);
    }
    let (Some(table), Some(entry_len), Some(count)) =
        (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56))
    else {
        return Err(cut);
    };
    if entry_len != 56 || count == 0 || count > PROGRAM_HEADERS_MAX {
        return Err(KernelError::Damaged { what: "impossible ELF program headers" });
    }
    let mut end = 0;
    for index in 0..count {
        let mut header = [0; 56];
        let at = u64::from(index)
            .checked_mul(56)
            .and_then(|offset| offset.checked_add(table))
            .ok_or(KernelError::Damaged { what: "ELF program headers outside of the file" })?;
        file.read_exact_at(&mut header, at).map_err(KernelError::Read)?;
        let field = |at| u64_at(&header, at).unwrap_or(0);
        let (gpa, file_len, memory_len) = (field(24), field(32), field(40));
        if !header.starts_with(&PT_LOAD.to_le_bytes()) || memory_len == 0 {
            continue;
        }
        if gpa < HIGH_MEMORY {
            return Err(KernelError::TooLow { gpa });
        }
        let needed = gpa.saturating_add(memory_len.max(file_len));
        end = needed.max(end);
    }
    if end == 0 {
        return Err(KernelError::Damaged { what: "an ELF file with nothing to load" });
    }
    if end > low_end {
        return Err(KernelError::MemoryTooSmall { needed: end, found: low_end });
    }
    let loaded = Elf::load(memory, None, file, None).map_err(KernelError::Loader)?;
    let pvh_entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Some(entry.0),
        _ => None,
    };
    Ok(Kernel {
        entry: loaded.kernel_load.0,
        pvh_entry,
        end,
        setup_header: Vec::new(),
        cmdline_size: COMMAND_LINE_SIZE,
        initrd_addr_max: INITRD_ADDR_MAX,
    })
}

fn load_bzimage(
    file: &mut File,
    head: &[u8],
    memory: &GuestMemoryMmap,
    low_end: u64,
) -> Result<Kernel, KernelError> {
    let cut = || KernelError::Damaged { what: "the bzImage header is cut short" };
    let version = u16_at(head, 0x206).ok_or_else(cut)?;
    let load_flags = *head.get(0x211).ok_or_else(cut)?;
    let xload_flags = u16_at(head, 0x236).ok_or_else(cut)?;
    if version < PROTOCOL_MIN || xload_flags & XLF_KERNEL_64 == 0 || load_flags & LOADED_HIGH == 0 {
        return Err(KernelError::Protocol { version });
    }
    // The byte at 0x201 has the length of the header: boot.rst, "jump".
    let header_end = 0x202 + usize::from(*head.get(0x201).ok_or_else(cut)?);
    let setup_header = head.get(SETUP_HEADER..header_end.min(0x290)).ok_or_else(cut)?.to_vec();
    let preferred = u64_at(head, 0x258).ok_or_else(cut)?;
    let init_size = u32_at(head, 0x260).ok_or_else(cut)?;
    if preferred < HIGH_MEMORY || preferred > u64::from(u32::MAX) {
        return Err(KernelError::TooLow { gpa: preferred });
    }
    let file_len = file.metadata().map_err(KernelError::Read)?.len();
    // Decompression happens in place, in `init_size` bytes.
    let end = preferred.saturating_add(u64::from(init_size).max(file_len));
    if end > low_end {
        return Err(KernelError::MemoryTooSmall { needed: end, found: low_end });
    }
    let at = Some(GuestAddress(preferred));
    BzImage::load(memory, at, file, None).map_err(KernelError::Loader)?;
    Ok(Kernel {
        entry: preferred + ENTRY_64_OFFSET,
        pvh_entry: None,
        end,
        setup_header,
        // Without the final zero in the header, with it here.
        cmdline_size: u32_at(head, 0x238).ok_or_else(cut)?.clamp(1, u32::MAX - 1) + 1,
        initrd_addr_max: u32_at(head, 0x22c).ok_or_else(cut)?,
    })
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}
