//! The program of a fresh guest.

use std::ops::Range;

use vm_memory::{GuestMemoryError, GuestMemoryMmap};

use crate::arch::{self, Entry, Mapping, PROGRAM_MAX_BYTES};
use crate::boot::{Board, LinuxConfig, LinuxError};
use crate::demo::{DemoConfig, DemoError, DemoPlan};
use crate::layout::{LARGE_PAGE_BYTES, MemoryRange};

/// The program of a fresh guest.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Payload {
    /// The embedded demo guest: see [`demo`](crate::demo).
    Demo(DemoConfig),
    /// A Linux kernel: see [`boot`](crate::boot).
    Linux(LinuxConfig),
    /// Machine code for experiments: x86-64.
    ///
    /// It is loaded at guest physical (and virtual) address 0x4000 and entered at its first byte in
    /// ring 0 of 64-bit mode with a small stack and without an interrupt table. The first gigabyte of
    /// addresses is mapped one to one.
    Program {
        /// The code, at most 16 KiB.
        code: Vec<u8>,
    },
}

/// A payload that does not fit into the guest's memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PayloadError {
    /// The demo's working area does not fit.
    #[error(transparent)]
    Demo(#[from] DemoError),
    /// The kernel, or its initrd or command line, does not fit.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// The program is too long.
    #[error("program of {code_bytes} bytes, expected at most {}", PROGRAM_MAX_BYTES)]
    ProgramTooLong {
        /// Length of the program.
        code_bytes: usize,
    },
    /// Guest memory could not be written.
    #[error("cannot write the payload into guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// A payload in guest memory.
pub(crate) struct LoadedPayload {
    /// Guest physical addresses that it uses. `None` means any address.
    pub(crate) touched: Option<Vec<Range<u64>>>,
    /// The state in which the first vCPU begins.
    pub(crate) entry: Entry,
}

impl Payload {
    /// Whether the guest has a generation id.
    pub(crate) fn has_generation_id(&self) -> bool {
        matches!(self, Payload::Linux(_))
    }

    /// Writes the payload into memory.
    pub(crate) fn load(
        &self,
        memory: &GuestMemoryMmap,
        ranges: &[MemoryRange],
        board: Board,
    ) -> Result<LoadedPayload, PayloadError> {
        match self {
            Payload::Linux(config) => {
                let entry = config.load(memory, ranges, board)?;
                Ok(LoadedPayload { touched: None, entry })
            }
            Payload::Demo(config) => {
                let plan = DemoPlan::new(config, ranges)?;
                plan.load(memory).map_err(PayloadError::Memory)?;
                Ok(LoadedPayload { touched: Some(plan.touched()), entry: Entry::Program })
            }
            Payload::Program { code } => {
                if code.len() > PROGRAM_MAX_BYTES {
                    return Err(PayloadError::ProgramTooLong { code_bytes: code.len() });
                }
                let identity = Mapping { virt: 0, gpa: 0, len: 1 << 30 };
                arch::load_program(memory, code, &[identity]).map_err(PayloadError::Memory)?;
                let touched = std::iter::once(0..LARGE_PAGE_BYTES).collect();
                Ok(LoadedPayload { touched: Some(touched), entry: Entry::Program })
            }
        }
    }
}
