//! Damaged and hostile files: each is a typed error, never a panic, and no field is trusted.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use proptest::prelude::*;
use snapfmt::layout::{HEADER_BYTES, PAGE_BYTES, SECTION_RECORD_BYTES};
use snapfmt::{
    ChunkBuffer, Codec, Contents, Corruption, MemoryRegion, Part, Problem, ReadError, SectionKind,
    Snapshot, StateBlob, WriteOptions, write_snapshot,
};

/// A small snapshot: 40 pages, the odd ones not zero, in chunks of four.
fn sample(codec: Codec) -> Vec<u8> {
    let mut memory = vec![0; 40 * PAGE_BYTES];
    for (number, page) in memory.chunks_mut(PAGE_BYTES).enumerate().filter(|(n, _)| n % 2 == 1) {
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (at / 50 + number) as u8;
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sample.snap");
    let len = memory.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    let states = [StateBlob { tag: 1, version: 1, bytes: vec![9; 100] }];
    let contents = Contents::new(&regions, &memory, &data).states(&states);
    let options = WriteOptions::default().codec(codec).chunk_pages(4);
    write_snapshot(&path, contents, &options, &|_| ControlFlow::Continue(())).unwrap();
    std::fs::read(path).unwrap()
}

fn codecs() -> impl Iterator<Item = Codec> {
    Codec::ALL.into_iter().filter(|codec| cfg!(feature = "zstd") || *codec != Codec::Zstd)
}

/// Uses a file in every possible way.
fn use_all(bytes: &[u8]) -> Result<(), ReadError> {
    let snapshot = Snapshot::new(bytes)?;
    snapshot.metadata()?;
    for section in snapshot.sections().iter().filter(|s| s.kind == SectionKind::STATE) {
        snapshot.state(section.tag)?;
    }
    let (mut buffer, mut page) = (ChunkBuffer::new(), [0; PAGE_BYTES]);
    let leaves = snapshot.leaf_count();
    snapshot.for_each_entry(0..leaves, |number, _| {
        snapshot.read_page(number, &mut buffer, &mut page)
    })?;
    snapshot.verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(())).map(drop)
}

#[test]
fn a_flip_of_any_byte_is_detected() {
    for codec in codecs() {
        let bytes = sample(codec);
        use_all(&bytes).unwrap();
        let mut damaged = bytes.clone();
        // Every byte of a raw file would take long in a debug build; a prime step reaches every part, and all borders
        // of parts are checked.
        let snapshot = Snapshot::new(&bytes[..]).unwrap();
        let borders = snapshot.sections().iter().flat_map(|s| [s.offset, s.end()]);
        let near_borders = borders.flat_map(|at| at.saturating_sub(40)..at + 40);
        let mut places: Vec<_> =
            near_borders.map(|at| at as usize).chain((0..bytes.len()).step_by(13)).collect();
        places.retain(|at| *at < bytes.len());
        for at in places {
            damaged[at] ^= 1 << (at % 8);
            assert!(use_all(&damaged).is_err(), "{codec}: byte {at} of {}", bytes.len());
            damaged[at] = bytes[at];
        }
    }
}

#[test]
fn a_file_cut_anywhere_or_extended_is_refused_when_opened() {
    let bytes = sample(Codec::Lz4);
    for len in (0..bytes.len()).step_by(7).chain(bytes.len() - 100..bytes.len()) {
        assert!(Snapshot::new(&bytes[..len]).is_err(), "{len}");
    }
    let mut extended = bytes.clone();
    extended.push(0);
    assert!(matches!(
        Snapshot::new(&extended[..]),
        Err(ReadError::WrongLength { expected, found }) if expected + 1 == found
    ));
    assert!(matches!(Snapshot::new(&bytes[..0]), Err(ReadError::WrongLength { .. })));
    assert!(matches!(Snapshot::new(&b"#!/bin/sh\n"[..]), Err(ReadError::NotASnapshot { .. })));
    assert!(matches!(Snapshot::new(&bytes[..100]), Err(ReadError::WrongLength { .. })));
}

/// Changes a file and corrects every checksum of header and section table, as an attacker would.
fn forge(bytes: &mut [u8], change: impl FnOnce(&mut [u8])) {
    change(bytes);
    let table = u64::from_le_bytes(bytes[96..104].try_into().unwrap()) as usize;
    if let Some(table_bytes) = bytes.get(table..) {
        let crc = crc32fast::hash(table_bytes);
        bytes[108..112].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

fn corruption(bytes: &[u8]) -> Corruption {
    match use_all(bytes) {
        Err(ReadError::Corrupt(corruption)) => corruption,
        other => panic!("expected corruption, got {other:?}"),
    }
}

#[test]
fn forged_lengths_and_offsets_are_named_without_allocation() {
    let bytes = sample(Codec::Lz4);
    let table = u64::from_le_bytes(bytes[96..104].try_into().unwrap()) as usize;
    let records = (bytes.len() - table) / SECTION_RECORD_BYTES;
    for huge in [u64::MAX, 1 << 63, 1 << 62, bytes.len() as u64, 1 << 40] {
        for record in 0..records {
            for field in [16, 24] {
                let mut forged = bytes.clone();
                let at = table + record * SECTION_RECORD_BYTES + field;
                forge(&mut forged, |b| b[at..at + 8].copy_from_slice(&huge.to_le_bytes()));
                assert_eq!(corruption(&forged).part, Part::SectionTable, "{record} {field} {huge}");
            }
        }
    }
    // Memory of 2^63 bytes, and a chunk size of 2^31 pages.
    let mut forged = bytes.clone();
    forge(&mut forged, |b| b[80..88].copy_from_slice(&(1u64 << 63).to_le_bytes()));
    assert!(matches!(
        corruption(&forged).problem,
        Problem::Range { field: "memory_bytes", found: 0x8000_0000_0000_0000, .. }
    ));
    let mut forged = bytes.clone();
    forge(&mut forged, |b| b[76..80].copy_from_slice(&(1u32 << 31).to_le_bytes()));
    assert!(matches!(corruption(&forged).problem, Problem::Range { field: "chunk_pages", .. }));
}

#[test]
fn overlapping_missing_and_doubled_sections_are_refused() {
    let bytes = sample(Codec::Lz4);
    let table = u64::from_le_bytes(bytes[96..104].try_into().unwrap()) as usize;
    let record = |number: usize| table + number * SECTION_RECORD_BYTES;
    // The second section begins inside the first.
    let mut forged = bytes.clone();
    forge(&mut forged, |b| {
        b.copy_within(record(0) + 16..record(0) + 24, record(1) + 16);
    });
    assert!(matches!(corruption(&forged).problem, Problem::Range { field: "section.offset", .. }));
    // The index root is missing, or listed twice.
    for (number, kind, found) in [(2, 99u32, 0), (5, 3, 2)] {
        let mut forged = bytes.clone();
        forge(&mut forged, |b| b[record(number)..][..4].copy_from_slice(&kind.to_le_bytes()));
        assert_eq!(
            corruption(&forged).problem,
            Problem::SectionCount { kind: SectionKind::INDEX_ROOT, found }
        );
    }
}

/// A command that does not use a section refuses its double too. Otherwise it would copy both.
#[test]
fn a_state_and_a_description_that_are_there_twice_are_refused_when_opened() {
    let bytes = sample(Codec::Lz4);
    let table = u64::from_le_bytes(bytes[96..104].try_into().unwrap()) as usize;
    let record = |kind: SectionKind| {
        let mut records = (table..bytes.len()).step_by(SECTION_RECORD_BYTES);
        records.find(|at| bytes[*at..*at + 4] == kind.0.to_le_bytes()).expect("it has one")
    };
    let (state, metadata) = (record(SectionKind::STATE), record(SectionKind::METADATA));
    for (from, to, kind) in
        [(state, metadata, SectionKind::STATE), (metadata, state, SectionKind::METADATA)]
    {
        let mut forged = bytes.clone();
        // Kind, tag and version.
        forge(&mut forged, |b| b.copy_within(from..from + 12, to));
        match Snapshot::new(&forged[..]) {
            Err(ReadError::Corrupt(Corruption { problem, .. })) => {
                assert_eq!(problem, Problem::SectionCount { kind, found: 2 });
            }
            other => panic!("{kind}: {:?}", other.map(drop)),
        }
    }
}

#[test]
fn an_entry_that_points_outside_the_chunks_or_to_no_slot_is_refused() {
    let bytes = sample(Codec::Lz4);
    let snapshot = Snapshot::new(&bytes[..]).unwrap();
    let section = |kind| *snapshot.sections().iter().find(|s| s.kind == kind).unwrap();
    let leaves = section(SectionKind::INDEX_LEAVES);
    let root = section(SectionKind::INDEX_ROOT);
    let table = u64::from_le_bytes(bytes[96..104].try_into().unwrap()) as usize;
    let forge_entry = |entry: u64| {
        let mut forged = bytes.clone();
        forge(&mut forged, |b| {
            let leaf = leaves.offset as usize..leaves.end() as usize;
            b[leaf.start + 8..leaf.start + 16].copy_from_slice(&entry.to_le_bytes());
            let crc = crc32fast::hash(&b[leaf]);
            let root_bytes = root.offset as usize..root.end() as usize;
            b[root_bytes.start + 4..root_bytes.start + 8].copy_from_slice(&crc.to_le_bytes());
            let crc = crc32fast::hash(&b[root_bytes]);
            b[table + 2 * SECTION_RECORD_BYTES + 12..][..4].copy_from_slice(&crc.to_le_bytes());
        });
        corruption(&forged)
    };
    let at = leaves.offset as usize + 8;
    let entry = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    // Beyond the file, inside the index, of an unknown kind, in a missing parent.
    for bad in [entry | 1 << 63, (leaves.offset / 64) << 28 | 1, entry & !7 | 5, 2] {
        assert_eq!(forge_entry(bad).part, Part::Section(SectionKind::INDEX_LEAVES), "{bad:#x}");
    }
    // A slot that the chunk does not have.
    let bad = entry & !(511 << 3) | 300 << 3;
    assert!(matches!(forge_entry(bad).problem, Problem::Slot { page: 1, slot: 300 }));
    // Into the middle of a chunk: no header there.
    let corruption = forge_entry(entry + (1 << 28));
    assert_eq!(corruption.part, Part::Section(SectionKind::CHUNKS));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn mutated_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        forged: bool,
    ) {
        let mut bytes = sample(Codec::Lz4);
        let change = |b: &mut [u8]| {
            for (at, value) in &changes {
                b[at.index(b.len())] = *value;
            }
        };
        if forged { forge(&mut bytes, change) } else { change(&mut bytes) }
        let _ = use_all(&bytes);
    }

    #[test]
    fn mutated_headers_and_tables_never_panic(
        changes in prop::collection::vec((0usize..152, any::<u8>()), 1..4),
        table in prop::collection::vec((0usize..240, any::<u8>()), 0..4),
    ) {
        let mut bytes = sample(Codec::Raw);
        let start = u64::from_le_bytes(bytes[96..104].try_into().unwrap()) as usize;
        forge(&mut bytes, |b| {
            for (at, value) in table {
                b[start + at] = value;
            }
            for (at, value) in changes {
                b[at] = value;
            }
        });
        let _ = use_all(&bytes);
    }
}
