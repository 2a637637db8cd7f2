//! Forged files that claim large sizes: the reader allocates less than the limits in the documentation of
//! `Snapshot::new`.

mod allocations;
#[path = "../fuzz/harness/forge.rs"]
#[allow(dead_code, reason = "shared with the fuzz targets")]
mod forge;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use allocations::{alone, peak, within};
use forge::{Forge, Forged, Place, Slot};
use snapfmt::{ChunkBuffer, PageIndex, Problem, ReadError, Snapshot};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const TIB: u64 = 1 << 40;

/// An open snapshot: for each 2 MiB of memory claimed, and for each leaf that the root lists.
const BYTES_PER_POSSIBLE_LEAF: usize = 4;
const BYTES_PER_LISTED_LEAF: usize = 64;
/// Reading a chunk: stored, decoded, page list.
const CHUNK_CAP: usize = 7 * MIB;
/// Metadata is at most 1 MiB of JSON, of which small objects take the most memory, in 16384 values.
const METADATA_CAP: usize = 16 * MIB;

fn open_cap(memory_bytes: u64, leaves: usize) -> usize {
    let possible = (memory_bytes >> 21) as usize;
    possible * BYTES_PER_POSSIBLE_LEAF + leaves * BYTES_PER_LISTED_LEAF + 64 * KIB
}

fn verify(snapshot: &Snapshot<Forged>) -> Result<(), ReadError> {
    snapshot.verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(())).map(drop)
}

fn load(snapshot: &Snapshot<Forged>) -> Result<usize, ReadError> {
    let pages = AtomicUsize::new(0);
    let place = |_: u64, bytes: &[u8]| _ = pages.fetch_add(bytes.len() / 4096, Relaxed);
    snapshot.load(NonZeroUsize::MIN, &place, &|_| ControlFlow::Continue(()))?;
    Ok(pages.into_inner())
}

#[track_caller]
fn problem(result: Result<impl Sized, ReadError>) -> Problem {
    match result {
        Err(ReadError::Corrupt(corruption)) => corruption.problem,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("a forged file was accepted"),
    }
}

/// 16 TiB is the format's own limit, so this is a good file; its last page has the largest page number.
#[test]
fn sixteen_tebibytes_of_memory_with_two_pages_in_them() {
    let _alone = alone();
    let mut forge = Forge::new(16 * TIB);
    let (last, before) = (u32::MAX, u32::MAX - 1);
    let place = forge.chunk(0, 2, &[last, before], &[[7; 4096], [8; 4096]].concat(), |_| ());
    forge.entry(last, place.entry(Slot(0)));
    forge.entry(before, place.entry(Slot(1)));
    let file = forge.finish();
    let cap = open_cap(16 * TIB, 1);
    let snapshot = within(cap, || Snapshot::new(file)).unwrap();
    assert_eq!(within(CHUNK_CAP, || load(&snapshot)).unwrap(), 2);
    within(cap + CHUNK_CAP, || verify(&snapshot)).unwrap();
    let (mut buffer, mut page) = (ChunkBuffer::new(), [0; 4096]);
    snapshot.read_page(PageIndex(last), &mut buffer, &mut page).unwrap();
    assert_eq!(page, [7; 4096]);
    snapshot.read_page(PageIndex(0), &mut buffer, &mut page).unwrap();
    assert_eq!(page, [0; 4096]);
}

/// Leaves that are holes take no room on disk, and must not take 4 KiB each in memory.
#[test]
fn an_index_of_leaves_that_are_holes() {
    let _alone = alone();
    let leaves = 16 << 10;
    let memory_bytes = (leaves as u64) << 21;
    let mut forge = Forge::new(memory_bytes);
    forge.end_chunks();
    let leaves_offset = forge.len();
    forge.hole(leaves as u64 * 4096);
    forge.record(2, 0, leaves_offset, leaves as u64 * 4096);
    let crc = crc32fast::hash(&[0; 4096]);
    forge.section(
        3,
        (0..leaves as u32).flat_map(|leaf| [leaf, crc]).flat_map(u32::to_le_bytes).collect(),
    );
    let file = forge.finish_with(b"{}");
    let cap = open_cap(memory_bytes, leaves);
    let snapshot = within(cap, || Snapshot::new(file)).unwrap();
    within(2 * MIB, || load(&snapshot)).unwrap();
    within(cap + 2 * MIB, || verify(&snapshot)).unwrap();
}

/// The count in the header and a section that is a hole of terabytes would make room for
/// sixty-four thousand million chunks.
#[test]
fn a_forged_count_of_chunks() {
    let _alone = alone();
    let mut forge = Forge::new(4096);
    let place = forge.chunk(0, 1, &[0], &[7; 4096], |_| ());
    forge.entry(0, place.entry(Slot(0)));
    forge.hole(4 * TIB - 8192);
    forge.chunks = u64::MAX;
    let file = forge.finish();
    let snapshot = within(open_cap(4096, 1), || Snapshot::new(file)).unwrap();
    let problem = problem(within(2 * MIB, || verify(&snapshot)));
    assert!(matches!(problem, Problem::Field { field: "chunk.magic", found: 0, .. }), "{problem}");
    assert_eq!(within(CHUNK_CAP, || load(&snapshot)).unwrap(), 1);
}

/// Every section whose content is read as a whole, a hole of 1 TiB.
#[test]
fn sections_of_a_tebibyte() {
    let _alone = alone();
    for kind in [3, 4, 5, 6] {
        let mut forge = Forge::new(16 * TIB);
        forge.end_chunks();
        let offset = forge.len();
        forge.hole(TIB);
        forge.record(kind, 0, offset, TIB);
        if kind != 3 {
            let end = forge.len();
            forge.record(2, 0, end, 0);
            forge.section(3, Vec::new());
        } else {
            let end = forge.len();
            forge.record(2, 0, end, TIB / 8 * 4096);
        }
        let file = forge.finish_with(b"{}");
        let result = within(open_cap(16 * TIB, 0), || {
            let snapshot = Snapshot::new(file)?;
            snapshot.metadata().map(drop)?;
            snapshot.state(0).map(drop)
        });
        let problem = problem(result);
        assert!(
            matches!(
                problem,
                Problem::Range { field: "section.len", .. }
                    | Problem::SectionCount { found: 2, .. }
            ),
            "{kind}: {problem}"
        );
    }
}

#[test]
fn metadata_that_unfolds() {
    let _alone = alone();
    let mebibyte = |unit: &str, end: &str, begin: &str| {
        let units = (MIB - begin.len() - end.len()) / unit.len();
        [begin, &unit.repeat(units), end].concat()
    };
    for json in [
        mebibyte("0,", "0]}", "{\"a\":["),
        mebibyte("[],", "0]}", "{\"a\":["),
        mebibyte("{},", "0]}", "{\"a\":["),
        mebibyte("\"\":0,", "\"\":0}", "{"),
        mebibyte("{\"\":0},", "0]}", "{\"a\":["),
        mebibyte(
            &["{\"\":".repeat(100), "0".into(), "}".repeat(100), ",".into()].concat(),
            "0]}",
            "{\"a\":[",
        ),
        // As many values as there may be, and long strings in what is left of the mebibyte.
        ["{\"a\":[", &"{\"\":\"\"},".repeat(8000), "0]}"].concat(),
        ["{\"a\":[", &["{\"", &"x".repeat(110), "\":{}},"].concat().repeat(5400), "0]}"].concat(),
        mebibyte("[", "", ""),
        mebibyte("{\"a\":", "", ""),
        mebibyte("\\u0000", "\"}", "{\"tool\":\""),
    ] {
        let mut forge = Forge::new(4096);
        forge.end_chunks();
        let end = forge.len();
        forge.record(2, 0, end, 0);
        forge.section(3, Vec::new());
        let snapshot = Snapshot::new(forge.finish_with(json.as_bytes())).unwrap();
        let (_, peak) = peak(|| snapshot.metadata().map(drop));
        assert!(peak <= METADATA_CAP, "{peak} bytes for {}...", &json[..20]);
    }
}

/// A file with one chunk of `pages` pages.
fn with_chunk(codec: u8, pages: u16, payload: &[u8]) -> Snapshot<Forged> {
    let mut forge = Forge::new(4096 * 512);
    let list: Vec<u32> = (0..u32::from(pages)).collect();
    let place = forge.chunk(codec, pages, &list, payload, |_| ());
    for page in list {
        forge.entry(page, place.entry(Slot(page as u16)));
    }
    Snapshot::new(forge.finish()).unwrap()
}

/// One literal, then a match that repeats it: 255 times for each byte.
fn lz4_bomb(len: usize) -> Vec<u8> {
    let mut payload = b"\x1fa\x01\x00".to_vec();
    payload.resize(len - 6, 0xff);
    payload.extend(b"\x50aaaaa");
    payload
}

/// Blocks of one repeated byte, 128 KiB each, of 4 bytes. `head` is the frame header.
#[cfg(feature = "zstd")]
fn zstd_bomb(head: &[u8], blocks: usize) -> Vec<u8> {
    let block = |last: u32| (128 << 13 | 1 << 1 | last).to_le_bytes();
    let mut payload = [b"\x28\xb5\x2f\xfd", head].concat();
    for number in 1..=blocks {
        payload.extend(&block(u32::from(number == blocks))[..3]);
        payload.push(b'a');
    }
    payload
}

#[test]
fn payloads_that_decode_to_more_than_allowed() {
    let _alone = alone();
    #[allow(unused_mut, reason = "more with zstd")]
    let mut bombs =
        vec![(1, 1, lz4_bomb(4000)), (1, 16, lz4_bomb(60_000)), (1, 512, lz4_bomb(2_000_000))];
    #[cfg(feature = "zstd")]
    bombs.extend([
        // No length given, a window of 128 KiB; the same with one of 2 TiB.
        (2, 1, zstd_bomb(&[0x00, 0x38], 1000)),
        (2, 1, zstd_bomb(&[0x00, 0xf8], 1000)),
        // Its header claims 16 EiB.
        (2, 1, zstd_bomb(&[0xe0, 255, 255, 255, 255, 255, 255, 255, 255], 1000)),
        // Its header claims 4096 bytes, and it has 64 GiB.
        (2, 512, zstd_bomb(&[0x60, 0x00, 0x0f], (1 << 19) - 16)),
        // It is 128 KiB longer than allowed.
        (2, 512, zstd_bomb(&[0x00, 0x38], 17)),
    ]);
    let address_space = address_space_bytes();
    for (number, (codec, pages, payload)) in bombs.into_iter().enumerate() {
        let snapshot = with_chunk(codec, pages, &payload);
        let mut page = [0xa5; 4096];
        let read = within(CHUNK_CAP, || {
            snapshot.read_page(PageIndex(0), &mut ChunkBuffer::new(), &mut page)
        });
        let problem = problem(read);
        assert!(matches!(problem, Problem::Undecodable { .. }), "{number}: {problem}");
        assert_eq!(page, [0xa5; 4096], "no bytes are returned");
        assert!(within(CHUNK_CAP, || load(&snapshot)).is_err());
    }
    // The C library's allocations are not counted above. They are below the least window of the
    // forged ones, by far; what other threads reserve meanwhile is in this, too.
    if let (Some(before), Some(after)) = (address_space, address_space_bytes()) {
        assert!(after - before < 1 << 30, "{before} {after}");
    }
}

/// The largest address space of this process so far.
fn address_space_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// An entry can name 4 MiB of file as one chunk; no more is ever read for it.
#[test]
fn an_entry_with_the_greatest_length() {
    let _alone = alone();
    let mut forge = Forge::new(4096);
    forge.hole(64 << 20);
    forge.entry(0, Place { offset: 4096, len: 4 << 20 }.entry(Slot(511)));
    let snapshot = Snapshot::new(forge.finish()).unwrap();
    let mut page = [0; 4096];
    let read =
        within(CHUNK_CAP, || snapshot.read_page(PageIndex(0), &mut ChunkBuffer::new(), &mut page));
    assert!(matches!(problem(read), Problem::Field { field: "chunk.magic", .. }));
}
