//! Storage that fails: at every single read in turn, the result is an error with the part and the place, or the right
//! bytes. When the storage works again, so does the same snapshot.

use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::time::Duration;

use snapfmt::layout::{HEADER_BYTES, PAGE_BYTES};
use snapfmt::{
    ChunkBuffer, Codec, Contents, MemoryRegion, Metadata, PageEntry, PageIndex, Part, ReadAt,
    ReadError, Snapshot, StateBlob, WriteOptions, write_snapshot,
};

const EIO: i32 = 5;

/// The fault of one read.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The storage fails after it has written nonsense into half of the buffer.
    Eio,
    /// The storage ends early.
    Short,
    /// The read is slow.
    Slow,
    /// One bit of this read is wrong, at this place in the buffer, in 64ths.
    Flip(usize),
}

/// A file in memory, of which one read fails.
struct Faulty {
    bytes: Vec<u8>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The fault, and the number of reads before it.
    armed: Option<(u32, Fault)>,
    /// Reads so far.
    reads: u32,
    /// Offset and length of the read that failed.
    struck: Option<(u64, u64)>,
}

impl Faulty {
    fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), state: Mutex::default() }
    }

    /// Makes the read after `reads` good ones fail. The ones after it succeed.
    fn arm(&self, reads: u32, fault: Fault) {
        *self.state.lock().unwrap() = State { armed: Some((reads, fault)), ..State::default() };
    }

    /// Reads since the last call, and the one that failed.
    fn disarm(&self) -> (u32, Option<(u64, u64)>) {
        let state = std::mem::take(&mut *self.state.lock().unwrap());
        (state.reads, state.struck)
    }

    fn next_fault(&self, offset: u64, len: u64) -> Option<Fault> {
        let mut state = self.state.lock().unwrap();
        state.reads += 1;
        match state.armed.take() {
            Some((0, fault)) => {
                state.struck = Some((offset, len));
                Some(fault)
            }
            waits => {
                state.armed = waits.map(|(reads, fault)| (reads - 1, fault));
                None
            }
        }
    }
}

impl ReadAt for Faulty {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let fault = self.next_fault(offset, buf.len() as u64);
        self.bytes.read_exact_at(buf, offset)?;
        let half = buf.len() / 2;
        match fault {
            Some(Fault::Eio) => {
                buf[..half].fill(0xa5);
                Err(io::Error::from_raw_os_error(EIO))
            }
            Some(Fault::Short) => {
                buf[half..].fill(0);
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Some(Fault::Flip(place)) if !buf.is_empty() => {
                let at = place * (buf.len() - 1) / 63;
                buf[at] ^= 1 << (place % 8);
                Ok(())
            }
            Some(Fault::Slow) => {
                std::thread::sleep(Duration::from_millis(1));
                Ok(())
            }
            Some(Fault::Flip(_)) | None => Ok(()),
        }
    }

    fn len_bytes(&self) -> io::Result<u64> {
        match self.next_fault(0, HEADER_BYTES as u64) {
            Some(Fault::Eio) => Err(io::Error::from_raw_os_error(EIO)),
            // The storage reports a wrong length: the file seems to be cut.
            Some(Fault::Short) => Ok(self.bytes.len() as u64 / 2),
            _ => Ok(self.bytes.len() as u64),
        }
    }
}

/// 2 MiB and 12 pages of memory: nine pages in two leaves are not zero.
fn memory() -> Vec<u8> {
    let mut memory = vec![0; 524 * PAGE_BYTES];
    for page in [1, 2, 3, 5, 8, 100, 511, 512, 523] {
        for (at, byte) in memory[page * PAGE_BYTES..][..PAGE_BYTES].iter_mut().enumerate() {
            *byte = (at / 40 + page) as u8 | 1;
        }
    }
    memory
}

fn file(codec: Codec, memory: &[u8]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snap");
    let len = memory.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    let states = [StateBlob { tag: 1, version: 1, bytes: vec![9; 100] }];
    let contents = Contents::new(&regions, &memory, &data)
        .states(&states)
        .metadata(Metadata::default().tool("test"));
    let options = WriteOptions::default().codec(codec).chunk_pages(3);
    write_snapshot(&path, contents, &options, &|_| ControlFlow::Continue(())).unwrap();
    std::fs::read(path).unwrap()
}

/// A way of reading a snapshot; compares what it read with what was stored.
type Operation = fn(&Snapshot<Faulty>, &[u8]) -> Result<(), ReadError>;

const OPERATIONS: [(&str, Operation); 6] = [
    ("metadata", |snapshot, _| {
        assert_eq!(snapshot.metadata()?.tool, "test");
        Ok(())
    }),
    ("state", |snapshot, _| {
        assert_eq!(snapshot.state(1)?.unwrap().bytes, [9; 100]);
        Ok(())
    }),
    ("pages", |snapshot, memory| {
        let (mut buffer, mut page) = (ChunkBuffer::new(), [0; PAGE_BYTES]);
        for (number, expected) in memory.chunks(PAGE_BYTES).enumerate() {
            snapshot.read_page(PageIndex(number as u32), &mut buffer, &mut page)?;
            assert!(page == expected, "page {number}");
        }
        Ok(())
    }),
    ("zero runs", |snapshot, memory| {
        for page in [0, 4, 520] {
            let run = snapshot.zero_run(PageIndex(page))?;
            let bytes = &memory[run.start as usize..run.end as usize];
            assert!(!bytes.is_empty() && bytes.iter().all(|byte| *byte == 0));
        }
        Ok(())
    }),
    ("load", |snapshot, memory| {
        let loaded = Mutex::new(0);
        let place = |offset: u64, bytes: &[u8]| {
            // Even if the operation fails afterwards, the bytes that were passed are right.
            assert!(memory[offset as usize..][..bytes.len()] == *bytes);
            *loaded.lock().unwrap() += bytes.len() / PAGE_BYTES;
        };
        snapshot.load(threads(2), &place, &|_| ControlFlow::Continue(()))?;
        assert_eq!(loaded.into_inner().unwrap(), 9);
        Ok(())
    }),
    ("verify", |snapshot, _| {
        let verified = snapshot.verify(threads(2), &|_| ControlFlow::Continue(()))?;
        assert_eq!(verified.data_pages, 9);
        Ok(())
    }),
];

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

fn faults() -> impl Iterator<Item = Fault> {
    [Fault::Eio, Fault::Short, Fault::Slow].into_iter().chain((0..64).step_by(7).map(Fault::Flip))
}

fn codecs() -> impl Iterator<Item = Codec> {
    Codec::ALL.into_iter().filter(|codec| cfg!(feature = "zstd") || *codec != Codec::Zstd)
}

/// The part of a good file that a read at this offset belongs to.
fn part_at(file: &[u8], offset: u64) -> Part {
    let snapshot = Snapshot::new(file).unwrap();
    let table = u64::from_le_bytes(file[96..104].try_into().unwrap());
    let inside = |section: &&snapfmt::Section| (section.offset..section.end()).contains(&offset);
    match snapshot.sections().iter().find(inside) {
        _ if offset < HEADER_BYTES as u64 => Part::Header,
        _ if offset >= table => Part::SectionTable,
        Some(section) => Part::Section(section.kind),
        None => Part::Padding,
    }
}

/// Whether the result is allowed after a read with this fault.
#[track_caller]
fn check(file: &[u8], fault: Fault, struck: (u64, u64), result: Result<(), ReadError>) {
    let expected_part = part_at(file, struck.0);
    match (fault, result) {
        (Fault::Slow, Ok(())) => {}
        // The storage reported a wrong length.
        (Fault::Short, Err(ReadError::WrongLength { .. })) => {
            assert_eq!(struck, (0, HEADER_BYTES as u64));
        }
        (Fault::Eio | Fault::Short, Err(ReadError::Io { part, offset, len, source })) => {
            assert_eq!((part, offset, len), (expected_part, struck.0, struck.1));
            match fault {
                Fault::Eio => assert_eq!(source.raw_os_error(), Some(EIO)),
                _ => assert_eq!(source.kind(), io::ErrorKind::UnexpectedEof),
            }
        }
        (Fault::Flip(_), Err(ReadError::Corrupt(corruption))) => {
            assert_eq!(corruption.part, expected_part, "{corruption}");
            let read = struck.0..=struck.0 + struck.1;
            assert!(read.contains(&corruption.offset), "{corruption}: not in {struck:?}");
        }
        (Fault::Flip(_), Err(ReadError::NotASnapshot { .. })) => {
            assert_eq!(expected_part, Part::Header);
        }
        (fault, result) => panic!("{fault:?} at {struck:?} ({expected_part}): {result:?}"),
    }
}

#[test]
fn a_fault_at_any_read_while_opening_is_named() {
    let memory = memory();
    let file = file(Codec::Lz4, &memory);
    for fault in faults() {
        for reads in 0.. {
            let storage = Faulty::new(&file);
            storage.arm(reads, fault);
            let opened = Snapshot::new(&storage).map(drop);
            let Some(struck) = storage.disarm().1 else {
                opened.unwrap();
                // The length, the header, the table, the memory map and the index root.
                assert_eq!(reads, 5);
                break;
            };
            match (fault, reads) {
                // A bit of the length cannot flip: it is not read into a buffer.
                (Fault::Flip(_), 0) => opened.unwrap(),
                _ => check(&file, fault, struck, opened),
            }
            Snapshot::new(&storage).unwrap();
        }
    }
}

#[test]
fn a_fault_at_any_read_of_any_operation_is_named_and_not_kept() {
    let memory = memory();
    for codec in codecs() {
        let file = file(codec, &memory);
        for (name, operation) in OPERATIONS {
            let mut struck_reads = 0;
            for fault in faults() {
                for reads in 0.. {
                    let snapshot = Snapshot::new(Faulty::new(&file)).unwrap();
                    snapshot.storage().arm(reads, fault);
                    let result = operation(&snapshot, &memory);
                    let Some(struck) = snapshot.storage().disarm().1 else {
                        result.unwrap_or_else(|error| panic!("{codec} {name}: {error:?}"));
                        break;
                    };
                    struck_reads += 1;
                    check(&file, fault, struck, result);
                    // The fault is over: nothing of it was kept.
                    operation(&snapshot, &memory)
                        .unwrap_or_else(|error| panic!("{codec} {name} again: {error:?}"));
                }
            }
            assert!(struck_reads > 0, "{name} reads nothing");
        }
    }
}

/// A leaf is kept after it was read. A bad one must not be kept, neither unchanged nor as zeros.
#[test]
fn a_leaf_that_could_not_be_read_is_read_again() {
    let memory = memory();
    let file = file(Codec::Raw, &memory);
    for fault in faults().filter(|fault| !matches!(fault, Fault::Slow)) {
        let snapshot = Snapshot::new(Faulty::new(&file)).unwrap();
        snapshot.storage().arm(0, fault);
        assert!(snapshot.entry(PageIndex(1)).is_err(), "{fault:?}");
        assert_eq!(snapshot.storage().disarm().0, 1);
        assert!(matches!(snapshot.entry(PageIndex(1)).unwrap(), PageEntry::Data { .. }));
        assert_eq!(snapshot.entry(PageIndex(0)).unwrap(), PageEntry::Zero);
        assert_eq!(snapshot.storage().disarm().0, 1, "one more read, and then it is kept");
    }
}

/// A buffer may remember the chunk that it holds. It must not remember one that could not be read, nor mistake a chunk
/// for the one that it held before.
#[test]
fn a_buffer_in_which_a_chunk_failed_is_usable_again() {
    let memory = memory();
    for codec in codecs() {
        let file = file(codec, &memory);
        for fault in faults().filter(|fault| !matches!(fault, Fault::Slow)) {
            let snapshot = Snapshot::new(Faulty::new(&file)).unwrap();
            let (mut buffer, mut page) = (ChunkBuffer::new(), [0; PAGE_BYTES]);
            let mut read = |number: u32| {
                snapshot.read_page(PageIndex(number), &mut buffer, &mut page)?;
                let start = number as usize * PAGE_BYTES;
                assert!(page == memory[start..start + PAGE_BYTES], "{codec} {fault:?} {number}");
                Ok::<(), ReadError>(())
            };
            // Three chunks, of pages 1 to 3, 5 to 100, and 512 to 523.
            for (first, second) in [(1, 5), (100, 1), (5, 523), (523, 3)] {
                read(first).unwrap();
                read(512).unwrap();
                read(first).unwrap();
                snapshot.storage().arm(0, fault);
                let failed = read(second);
                let struck = snapshot.storage().disarm().1.unwrap();
                check(&file, fault, struck, failed);
                read(first).unwrap();
                read(second).unwrap();
            }
        }
    }
}

/// A fault in one thread does not affect another one.
#[test]
fn only_the_reader_whose_read_failed_sees_an_error() {
    let memory = memory();
    let file = file(Codec::Lz4, &memory);
    for reads in 0..12 {
        let snapshot = Snapshot::new(Faulty::new(&file)).unwrap();
        snapshot.storage().arm(reads, Fault::Eio);
        let (_, pages) = OPERATIONS[2];
        let failed: usize = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| usize::from(pages(&snapshot, &memory).is_err())))
                .collect();
            readers.into_iter().map(|reader| reader.join().unwrap()).sum()
        });
        assert_eq!(failed, 1, "{reads}");
        pages(&snapshot, &memory).unwrap();
    }
}
