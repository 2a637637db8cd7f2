//! Queues with any content, for the fuzz target `virtio_queue` and the tests below.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::balloon::Balloon;
use super::block::Block;
use super::device::{Backend, HostWatcher};
use super::disk::Disk;
use super::event_loop::EventLoop;
use super::fault::Fault;
use super::memory::DeviceMemory;
use super::net::{MacAddress, Net, Tap};
use super::rings::Rings;
use super::state::TransportState;
use super::transport::{Action, Transport};
use super::vsock::{Vsock, VsockHost};

const MEMORY_BYTES: usize = 64 << 10;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// From the rings of one queue to those of the next.
const RINGS_STRIDE: u64 = 0x100;
const QUEUE_SIZE: u32 = 16;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x6000;
const TABLE: u64 = 0x7000;
const DISK_BYTES: u64 = 64 << 10;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Input: the device, modulo 4, plus 4 for one that was restored; the changes of the queues' sizes (2 bytes) and of the
/// places of their three rings (4 bytes each), 0 for none; then patches of a memory that holds good requests: an offset
/// (2 bytes), a length (1 byte, modulo 16, plus 1) and as many bytes.
///
/// # Panics
/// When the device uses more buffers than it was offered, finds a present page missing, works endlessly, or changes the
/// length of its disk.
#[allow(clippy::unwrap_used, reason = "for tests and fuzzing only")]
#[cfg_attr(test, allow(unreachable_pub))]
pub fn any_queue(input: &[u8]) {
    let Some((device, input)) = input.split_first() else { return };
    match device % 4 {
        0 => {
            let mut block = shared_block().lock().unwrap_or_else(PoisonError::into_inner);
            drive(&mut *block, input, fill_block);
            assert_eq!(block.disk_len(), DISK_BYTES);
        }
        1 => {
            let mut sockets = shared_sockets().lock().unwrap_or_else(PoisonError::into_inner);
            let (vsock, listener) = &mut *sockets;
            vsock.reset();
            if device & 4 != 0 {
                vsock.restored();
            }
            drive(vsock, input, fill_vsock);
            // Programs of the host that send data, and close the connection.
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.set_nonblocking(true);
                let _ = stream.write(b"from the host").and(stream.read(&mut [0; 64]));
            }
        }
        2 => {
            let (tap, host) = Tap::stand_in();
            (0..3).for_each(|len| drop(host.send(&[7; 60][len..])));
            drive(&mut Net::new(tap, MacAddress([2; 6])), input, fill_net);
        }
        _ => drive(&mut Balloon::default(), input, fill_balloon),
    }
}

#[allow(clippy::unwrap_used, reason = "for tests and fuzzing only")]
fn drive(backend: &mut dyn Backend, input: &[u8], fill: fn(&GuestMemoryMmap)) {
    let Some((registers, patches)) = input.split_first_chunk::<14>() else { return };
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| registers[at + i]));
    let size = u32::from(u16::from_le_bytes([registers[0], registers[1]])) ^ QUEUE_SIZE;

    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
    fill(&ram);
    patch(&ram, patches);
    let memory = DeviceMemory::new(Arc::new(ram));

    let queues = backend.queue_sizes().len();
    let mut transport =
        Transport::new(backend.state().kind(), backend.features(), backend.queue_sizes());
    transport.write(0x70, 3, &memory);
    transport.write(0x24, 1, &memory);
    transport.write(0x20, 1, &memory);
    transport.write(0x70, 3 | 8, &memory);
    for queue in 0..queues as u32 {
        let at = queue * RINGS_STRIDE as u32;
        transport.write(0x30, queue, &memory);
        transport.write(0x38, size, &memory);
        transport.write(0x80, (DESCRIPTORS as u32 + at) ^ word(2), &memory);
        transport.write(0x90, (AVAILABLE as u32 + at) ^ word(6), &memory);
        transport.write(0xa0, (USED as u32 + at) ^ word(10), &memory);
        if transport.write(0x44, 1, &memory) == Action::NeedsReset {
            return;
        }
    }
    assert_eq!(transport.write(0x70, 15, &memory), Action::Start);

    let mut rings = Rings { queues: &mut transport.queues, memory: &memory, used: false };
    let fault = (0..queues).find_map(|queue| serve(backend, &mut rings, queue).err());
    assert!(!matches!(fault, Some(Fault::Unreadable { .. })), "{fault:?}");
    check(&transport.state());
}

/// One turn: as many requests as the queue holds, twice.
fn serve(backend: &mut dyn Backend, rings: &mut Rings<'_>, queue: usize) -> Result<(), Fault> {
    // A request may be answered into the available ring and so offer more: a turn is bounded.
    for _ in 0..2 * rings.size(queue) {
        if !backend.serve(rings, queue)? {
            break;
        }
    }
    Ok(())
}

fn check(state: &TransportState) {
    for queue in &state.queues {
        // Every chain that was taken was returned, except one that broke the device.
        assert!(queue.next_available.wrapping_sub(queue.next_used) <= 1, "{queue:?}");
    }
}

fn put(ram: &GuestMemoryMmap, at: u64, gpa: u64, len: u32, flags: u16, next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&gpa.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    store(ram, at, &bytes);
}

/// A queue with these heads in its available ring.
fn offer(ram: &GuestMemoryMmap, queue: u64, heads: &[u16]) {
    let ring = [&[0, heads.len() as u16], heads].concat();
    let ring: Vec<u8> = ring.iter().flat_map(|value| value.to_le_bytes()).collect();
    store(ram, AVAILABLE + queue * RINGS_STRIDE, &ring);
}

/// A queue with these buffers, each a request.
fn offer_buffers(ram: &GuestMemoryMmap, queue: u64, buffers: &[(u64, u32, u16)]) {
    for (index, &(gpa, len, flags)) in (0..).zip(buffers) {
        let at = DESCRIPTORS + queue * RINGS_STRIDE + index * 16;
        put(ram, at, gpa, len, flags, 0);
    }
    offer(ram, queue, &(0..buffers.len() as u16).collect::<Vec<_>>());
}

/// Four good requests: a read, the same again, one in an indirect table, and a write.
fn fill_block(ram: &GuestMemoryMmap) {
    put(ram, DESCRIPTORS, HEADER, 16, NEXT, 1);
    put(ram, DESCRIPTORS + 16, DATA, 512, NEXT | WRITE, 2);
    put(ram, DESCRIPTORS + 32, STATUS, 1, WRITE, 0);
    put(ram, DESCRIPTORS + 48, TABLE, 32, INDIRECT, 0);
    put(ram, DESCRIPTORS + 64, HEADER + 16, 16, NEXT, 5);
    put(ram, DESCRIPTORS + 80, DATA, 1024, NEXT, 2);
    put(ram, TABLE, HEADER, 16, NEXT, 1);
    put(ram, TABLE + 16, DATA, 513, WRITE, 0);
    store(ram, HEADER + 8, &3u64.to_le_bytes());
    store(ram, HEADER + 16, &1u64.to_le_bytes());
    offer(ram, 0, &[0, 3, 4, 0]);
}

/// A connection that is requested, used, queried for its credit, and shut down; buffers for the answers.
fn fill_vsock(ram: &GuestMemoryMmap) {
    let mut packets = Vec::new();
    for (index, (op, len, flags)) in [(1, 0, 0), (5, 5, 0), (7, 0, 0), (4, 0, 3)].iter().enumerate()
    {
        let at = HEADER + 64 * index as u64;
        store(ram, at, &CID.to_le_bytes());
        store(ram, at + 8, &2u64.to_le_bytes());
        let words = [1000, 7, *len, 1 | op << 16, *flags, 4096u32, 0];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        store(ram, at + 16, &bytes);
        packets.push((at, 44 + len, 0));
    }
    offer_buffers(ram, 0, &[0, 1, 2, 3, 4, 5].map(|index| (DATA + index * 0x200, 0x200, WRITE)));
    offer_buffers(ram, 1, &packets);
    offer_buffers(ram, 2, &[(STATUS, 4, WRITE), (STATUS, 4, WRITE)]);
}

/// Three frames to send, and buffers for as many.
fn fill_net(ram: &GuestMemoryMmap) {
    offer_buffers(ram, 0, &[0, 1, 2, 3].map(|index| (DATA + index * 0x200, 0x200, WRITE)));
    offer_buffers(ram, 1, &[(HEADER, 26, 0), (HEADER, 72, 0), (HEADER, 0x600, 0)]);
}

/// Pages into the balloon and out again, and reports of free ones.
fn fill_balloon(ram: &GuestMemoryMmap) {
    let pages: Vec<u8> = [9u32, 8, 12].iter().flat_map(|page| page.to_le_bytes()).collect();
    store(ram, HEADER, &pages);
    offer_buffers(ram, 0, &[(HEADER, 12, 0), (HEADER, 4, 0)]);
    offer_buffers(ram, 1, &[(HEADER, 12, 0)]);
    offer_buffers(ram, 2, &[(0x8000, 0x4000, WRITE), (0xc000, 0x1000, WRITE)]);
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

/// The guest's context id.
const CID: u64 = 3;

/// One vsock for all inputs, and the listener at its port 7.
fn shared_sockets() -> &'static Mutex<(Vsock, UnixListener)> {
    static SOCKETS: OnceLock<Mutex<(Vsock, UnixListener)>> = OnceLock::new();
    #[allow(clippy::unwrap_used, reason = "for tests and fuzzing only")]
    SOCKETS.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("snap-any-vsock-{}", std::process::id()));
        let at_port = format!("{}_7", path.display());
        let _ = std::fs::remove_file(&path).and(std::fs::remove_file(&at_port));
        let listener = UnixListener::bind(&at_port).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut vsock = Vsock::new(VsockHost::bind(CID, &path).unwrap());
        vsock.connect(HostWatcher::without_machine(&EventLoop::start().unwrap())).unwrap();
        Mutex::new((vsock, listener))
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

    /// The devices must accept the templates.
    #[test]
    fn the_templates_are_served() {
        type Template = (fn() -> Box<dyn Backend>, fn(&GuestMemoryMmap), &'static [u16]);
        let templates: [Template; 4] = [
            (block, fill_block, &[4]),
            (vsock, fill_vsock, &[4, 4, 0]),
            (net, fill_net, &[0, 3]),
            (|| Box::new(Balloon::default()), fill_balloon, &[2, 1, 2]),
        ];
        for (device, (backend, fill, used)) in templates.iter().enumerate() {
            any_queue(&[&[device as u8][..], &[0; 14]].concat());
            let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
            fill(&ram);
            let memory = DeviceMemory::new(Arc::new(ram));
            let mut queues: Vec<_> = (0..used.len() as u64)
                .map(|queue| {
                    let queue = virtio_queue::QueueState {
                        max_size: 16,
                        size: 16,
                        ready: true,
                        desc_table: DESCRIPTORS + queue * RINGS_STRIDE,
                        avail_ring: AVAILABLE + queue * RINGS_STRIDE,
                        used_ring: USED + queue * RINGS_STRIDE,
                        ..Default::default()
                    };
                    Some(virtio_queue::Queue::try_from(queue).unwrap())
                })
                .collect();
            let mut rings = Rings { queues: &mut queues, memory: &memory, used: false };
            let mut backend = backend();
            for queue in 0..used.len() {
                assert_eq!(serve(&mut *backend, &mut rings, queue), Ok(()), "{device} {queue}");
            }
            let found: Vec<_> =
                queues.iter().flatten().map(virtio_queue::QueueT::next_used).collect();
            assert_eq!(&found, used, "{device}");
        }
    }

    fn block() -> Box<dyn Backend> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(DISK_BYTES).unwrap();
        Box::new(Block::new(Disk::open(file.path(), false).unwrap()))
    }

    fn net() -> Box<dyn Backend> {
        Box::new(Net::new(Tap::stand_in().0, MacAddress([2; 6])))
    }

    /// There is no listener at its port: the request and what follows are refused.
    fn vsock() -> Box<dyn Backend> {
        let folder = tempfile::tempdir().unwrap();
        Box::new(Vsock::new(VsockHost::bind(CID, &folder.path().join("vsock")).unwrap()))
    }

    /// `SNAP_FUZZ_RUNS` sets another number of inputs.
    #[test]
    fn mutations() {
        let runs = std::env::var("SNAP_FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok());
        let config =
            Config { cases: runs.unwrap_or(2000), failure_persistence: None, ..Config::default() };
        // From a fixed seed, so that a failure is reproducible.
        let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let place = prop_oneof![
            6 => 0x1000..0x1060u16, 3 => 0x1100..0x1260u16, 4 => 0x2000..0x2010u16,
            2 => 0x2100..0x2210u16, 1 => 0x3000..0x3008u16, 5 => 0x4000..0x4100u16, 3 => 0x7000..0x7020u16, 1 => any::<u16>(),
        ];
        let byte = prop_oneof![4 => 0..8u8, 2 => Just(0xff), 2 => any::<u8>()];
        let patch = (place, prop::collection::vec(byte, 1..=16));
        let register = prop_oneof![6 => Just(0u32), 1 => any::<u32>(), 2 => 0..0x8000u32];
        let size = prop_oneof![6 => Just(0u16), 1 => any::<u16>(), 1 => 0..256u16];
        let registers = (size, prop::array::uniform3(register));
        let input = (0..8u8, registers, prop::collection::vec(patch, 0..6)).prop_map(
            |(device, (size, places), patches)| {
                let mut input = vec![device];
                input.extend(size.to_le_bytes());
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
