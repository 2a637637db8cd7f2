//! A disk's queue with any content: what the fuzz target `virtio_queue` and the tests below do with an input.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::block::{self, Block};
use super::device::Backend;
use super::disk::Disk;
use super::fault::Fault;
use super::memory::DeviceMemory;
use super::rings::Rings;
use super::transport::{Action, Transport};

const MEMORY_BYTES: usize = 64 << 10;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x6000;
const TABLE: u64 = 0x7000;
const DISK_BYTES: u64 = 64 << 10;

/// Input: what to change of the queue's size (2 bytes) and of the places of its three rings (4 bytes each),
/// 0 for nothing; then patches of a memory that holds good requests: an offset (2 bytes), a length (1
/// byte, modulo 16, plus 1) and as many bytes.
///
/// # Panics
/// When the device does what it must not: use more buffers than it was offered, find a page missing that is
/// there, work for ever, or change the length of its disk.
#[allow(clippy::unwrap_used, reason = "for tests and fuzzing only")]
#[cfg_attr(test, allow(unreachable_pub))]
pub fn any_queue(input: &[u8]) {
    let Some((registers, patches)) = input.split_first_chunk::<14>() else { return };
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| registers[at + i]));
    let size = u32::from(u16::from_le_bytes([registers[0], registers[1]])) ^ 16;

    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
    fill(&ram);
    patch(&ram, patches);
    let before: u16 = ram.read_obj(GuestAddress(USED + 2)).unwrap();
    let memory = DeviceMemory::new(Arc::new(ram));

    let mut block = shared_block().lock().unwrap_or_else(PoisonError::into_inner);
    let mut transport = Transport::new(block::DEVICE_ID, block.features(), block.queue_sizes());
    transport.write(0x70, 3, &memory);
    transport.write(0x24, 1, &memory);
    transport.write(0x20, 1, &memory);
    transport.write(0x70, 3 | 8, &memory);
    transport.write(0x38, size, &memory);
    transport.write(0x80, DESCRIPTORS as u32 ^ word(2), &memory);
    transport.write(0x90, AVAILABLE as u32 ^ word(6), &memory);
    transport.write(0xa0, USED as u32 ^ word(10), &memory);
    if transport.write(0x44, 1, &memory) == Action::NeedsReset {
        return;
    }
    assert_eq!(transport.write(0x70, 15, &memory), Action::Start);

    let mut rings = Rings { queues: &mut transport.queues, memory: &memory, used: false };
    let mut served = 0u16;
    // A request may be answered into the available ring and so offer more: a turn is bounded.
    let turns = 2 * rings.size(0);
    let fault = loop {
        if served == turns {
            break None;
        }
        match block.serve(&mut rings, 0) {
            Ok(true) => served += 1,
            Ok(false) => break None,
            Err(fault) => break Some(fault),
        }
    };
    assert!(!matches!(fault, Some(Fault::Unreadable { .. })), "{fault:?}");
    let state = transport.state();
    let queue = state.queues[0];
    assert_eq!(queue.next_used, served, "used {before}, then {served} requests");
    assert!(queue.next_available.wrapping_sub(served) <= 1, "{queue:?}");
    assert_eq!(block.disk_len(), DISK_BYTES);
}

/// Four good requests: a read, the same again, one in an indirect table, and a write.
fn fill(ram: &GuestMemoryMmap) {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let put = |at: u64, gpa: u64, len: u32, flags: u16, next: u16| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        store(ram, at, &bytes);
    };
    put(DESCRIPTORS, HEADER, 16, NEXT, 1);
    put(DESCRIPTORS + 16, DATA, 512, NEXT | WRITE, 2);
    put(DESCRIPTORS + 32, STATUS, 1, WRITE, 0);
    put(DESCRIPTORS + 48, TABLE, 32, INDIRECT, 0);
    put(DESCRIPTORS + 64, HEADER + 16, 16, NEXT, 5);
    put(DESCRIPTORS + 80, DATA, 1024, NEXT, 2);
    put(TABLE, HEADER, 16, NEXT, 1);
    put(TABLE + 16, DATA, 513, WRITE, 0);
    store(ram, HEADER + 8, &3u64.to_le_bytes());
    store(ram, HEADER + 16, &1u64.to_le_bytes());
    let ring: Vec<u8> = [0u16, 4, 0, 0, 3, 4].iter().flat_map(|v| v.to_le_bytes()).collect();
    store(ram, AVAILABLE, &ring);
}

fn patch(ram: &GuestMemoryMmap, mut patches: &[u8]) {
    while let [a, b, len, rest @ ..] = patches {
        let (bytes, rest) = rest.split_at((usize::from(*len) % 16 + 1).min(rest.len()));
        store(ram, u16::from_le_bytes([*a, *b]).into(), bytes);
        patches = rest;
    }
}

/// As much as fits.
fn store(ram: &GuestMemoryMmap, at: u64, bytes: &[u8]) {
    let _ = ram.write(bytes, GuestAddress(at));
}

/// One disk for all inputs.
fn shared_block() -> &'static Mutex<Block> {
    static BLOCK: OnceLock<Mutex<Block>> = OnceLock::new();
    #[allow(clippy::unwrap_used, reason = "for tests and fuzzing only")]
    BLOCK.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("snap-any-queue-{}", std::process::id()));
        std::fs::write(&path, vec![0x5a; DISK_BYTES as usize]).unwrap();
        let disk = Disk::open(&path, false).unwrap();
        std::fs::remove_file(&path).unwrap();
        Mutex::new(Block::new(disk))
    })
}

impl Block {
    fn disk_len(&self) -> u64 {
        self.disk().file.metadata().map_or(0, |metadata| metadata.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

    use super::*;

    #[test]
    fn the_template_is_served() {
        any_queue(&[0; 14]);
        // It is no template if the device refuses it.
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        fill(&ram);
        let memory = DeviceMemory::new(Arc::new(ram));
        let queue = virtio_queue::QueueState {
            max_size: 16,
            size: 16,
            ready: true,
            desc_table: DESCRIPTORS,
            avail_ring: AVAILABLE,
            used_ring: USED,
            ..Default::default()
        };
        let mut queues = [Some(queue.try_into().unwrap())];
        let mut rings = Rings { queues: &mut queues, memory: &memory, used: false };
        let mut block = shared_block().lock().unwrap();
        for _ in 0..4 {
            assert_eq!(block.serve(&mut rings, 0), Ok(true));
        }
        assert_eq!(block.serve(&mut rings, 0), Ok(false));
    }

    /// `SNAP_FUZZ_RUNS` sets another number of inputs.
    #[test]
    fn mutations() {
        let runs = std::env::var("SNAP_FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok());
        let config =
            Config { cases: runs.unwrap_or(2000), failure_persistence: None, ..Config::default() };
        // From a fixed seed, so that a failure comes again.
        let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let place = prop_oneof![
            6 => 0x1000..0x1060u16, 4 => 0x2000..0x2010u16, 1 => 0x3000..0x3008u16,
            4 => 0x4000..0x4020u16, 3 => 0x7000..0x7020u16, 1 => any::<u16>(),
        ];
        let byte = prop_oneof![4 => 0..8u8, 2 => Just(0xff), 2 => any::<u8>()];
        let patch = (place, prop::collection::vec(byte, 1..=16));
        let register = prop_oneof![6 => Just(0u32), 1 => any::<u32>(), 2 => 0..0x8000u32];
        let size = prop_oneof![6 => Just(0u16), 1 => any::<u16>(), 1 => 0..256u16];
        let registers = (size, prop::array::uniform3(register));
        let input = (registers, prop::collection::vec(patch, 0..6)).prop_map(
            |((size, places), patches)| {
                let mut input = size.to_le_bytes().to_vec();
                places.iter().for_each(|place| input.extend(place.to_le_bytes()));
                for (place, bytes) in patches {
                    input.extend(place.to_le_bytes());
                    input.push(bytes.len() as u8 - 1);
                    input.extend(bytes);
                }
                input
            },
        );
        let run = |input: Vec<u8>| {
            any_queue(&input);
            Ok(())
        };
        TestRunner::new_with_rng(config, random).run(&input, run).expect("no input panics");
    }
}
