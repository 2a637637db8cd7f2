//! The VMClock: a page of guest memory whose generation counter is new when a restored or reset guest begins to run.
//! UAPI.13; Linux, `include/uapi/linux/vmclock-abi.h`.
//!
//! A program in the guest can map the page (`/dev/vmclock0`) and compare the counter with the one that it has seen
//! before. The page is written while no vCPU runs, so the first instruction already sees the new counter. The generation
//! id reaches the kernel later, by an interrupt.
//!
//! Only this counter is used. The page describes no clock: its counter id is "invalid", and its status is "unknown".

use std::io;

use crate::arch::VM_CLOCK_GPA;
use crate::layout::PAGE_BYTES;
use crate::memory_slots::MemorySlots;

/// Length of the structure. The page has zeros after it.
const STRUCTURE_BYTES: usize = 0x70;
/// "VCLK", little endian.
const MAGIC: u32 = 0x4b4c_4356;
const VERSION: u16 = 1;
/// `VMCLOCK_COUNTER_INVALID`
const NO_COUNTER: u8 = 0xff;
/// `VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT` and `VMCLOCK_FLAG_NOTIFICATION_PRESENT`
const FLAGS: u64 = 1 << 8 | 1 << 9;

/// Offsets of the fields.
const SIZE_AT: usize = 0x04;
const VERSION_AT: usize = 0x08;
const COUNTER_ID_AT: usize = 0x0a;
const SEQ_COUNT_AT: usize = 0x0c;
const DISRUPTION_MARKER_AT: usize = 0x10;
const FLAGS_AT: usize = 0x18;
const GENERATION_COUNTER_AT: usize = 0x68;

/// Writes the page of a guest that has not run yet.
pub(crate) fn place(memory_slots: &MemorySlots, generation: u64) -> io::Result<()> {
    memory_slots.write(VM_CLOCK_GPA, &structure(0, generation))
}

/// Writes a new generation into the page. No vCPU runs. A guest that was booted by a version without a VMClock has no
/// such page: its memory there is zero, is reserved, and stays as it is.
pub(crate) fn renew(memory_slots: &MemorySlots, generation: u64) -> io::Result<()> {
    let mut constants = [0; SEQ_COUNT_AT];
    memory_slots.read(VM_CLOCK_GPA, &mut constants)?;
    if constants != structure(0, 0)[..SEQ_COUNT_AT] {
        return Ok(());
    }
    let mut seq_count = [0; size_of::<u32>()];
    memory_slots.read(VM_CLOCK_GPA + SEQ_COUNT_AT as u64, &mut seq_count)?;
    // The next even number: a vCPU may have been stopped between its two reads of it.
    let next = (u32::from_le_bytes(seq_count) | 1).wrapping_add(1);
    memory_slots.write(VM_CLOCK_GPA, &structure(next, generation))
}

/// The counters of time stamps and of generations are both disrupted by a restore: they get the same new value.
fn structure(seq_count: u32, generation: u64) -> [u8; STRUCTURE_BYTES] {
    let mut bytes = [0; STRUCTURE_BYTES];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &MAGIC.to_le_bytes());
    put(SIZE_AT, &(PAGE_BYTES as u32).to_le_bytes());
    put(VERSION_AT, &VERSION.to_le_bytes());
    put(COUNTER_ID_AT, &[NO_COUNTER]);
    put(SEQ_COUNT_AT, &seq_count.to_le_bytes());
    put(DISRUPTION_MARKER_AT, &generation.to_le_bytes());
    put(FLAGS_AT, &FLAGS.to_le_bytes());
    put(GENERATION_COUNTER_AT, &generation.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes as a driver finds them, without the constants above.
    #[test]
    fn the_structure_is_that_of_the_specification() {
        let bytes = structure(0x0403_0202, 0x1122_3344_5566_7788);
        let generation = [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
        let expected = [
            b"VCLK".as_slice(),
            &[0, 0x10, 0, 0, 1, 0, 0xff, 0],
            &[2, 2, 3, 4],
            &generation,
            &[0, 3, 0, 0, 0, 0, 0, 0],
            &[0; 0x48],
            &generation,
        ];
        assert_eq!(bytes.as_slice(), expected.concat());
    }
}
