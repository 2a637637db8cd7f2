//! The cost of reading, compared to pread and to the codecs alone.
//!
//!     cargo bench -p snapfmt --bench reading
//!
//! The guest's memory is synthetic: an eighth of its pages are zero, half have low entropy, a quarter are random, the
//! rest are in between. Everything is in the page cache. The sides alternate. Results are medians; the ratios of pages
//! and of `verify` are medians over the rounds.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../fuzz/harness/seal.rs"]
#[allow(dead_code, reason = "shared with the fuzz targets")]
mod seal;

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use snapfmt::layout::{CHUNK_HEADER_BYTES, PAGE_BYTES};
use snapfmt::{
    ChunkBuffer, ChunkExtent, Codec, Contents, MemoryRegion, PageEntry, PageIndex, Parent,
    Snapshot, WriteOptions, write_layer, write_snapshot,
};

const ROUNDS: usize = 9;
const PAGES: usize = 64 << 8;
const LOOKUPS: usize = 200_000;

fn main() {
    let folder = tempfile::tempdir().unwrap();
    opening(folder.path());
    looking_up(folder.path());
    single_pages(folder.path());
    guarded_pages(folder.path());
    verifying(folder.path());
    overhead(folder.path());
}

/// Opening a file of 64 GiB of memory, and one of 64 MiB with the same content.
fn opening(folder: &Path) {
    let memory = memory();
    let files: Vec<_> = [64u64 << 20, 64 << 30]
        .iter()
        .map(|memory_bytes| {
            let path = folder.join(format!("open-{memory_bytes}"));
            store(&path, &memory, *memory_bytes, None, &WriteOptions::default());
            path
        })
        .collect();
    let mut times = vec![Vec::new(); files.len()];
    for _ in 0..ROUNDS * 20 {
        for (file, times) in files.iter().zip(&mut times) {
            times.push(time(|| drop(Snapshot::open(file).unwrap())));
        }
    }
    let [small, large] = [0, 1].map(|at| median(&mut times[at]));
    println!("open          64 MiB {small:?}, 64 GiB {large:?}: {:.2} x", ratio(large, small));
}

/// Looking pages up in a chain of one layer and of eight, warm.
fn looking_up(folder: &Path) {
    let mut memory = memory();
    let mut files: Vec<PathBuf> = Vec::new();
    for layer in 0..8 {
        let path = folder.join(format!("layer-{layer}"));
        let parent = files.last().cloned();
        store(&path, &memory, memory.len() as u64, parent.as_deref(), &WriteOptions::default());
        files.push(path);
        for page in (layer..PAGES).step_by(40) {
            memory[page * PAGE_BYTES] ^= 0x55;
        }
    }
    let chains = [&files[0], &files[7]].map(|file| Snapshot::open(file).unwrap());
    let pages: Vec<_> = random_pages().take(LOOKUPS).collect();
    let look_up = |snapshot: &Snapshot| {
        time(|| {
            for page in &pages {
                std::hint::black_box(snapshot.entry(*page).unwrap());
            }
        }) / LOOKUPS as u32
    };
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (snapshot, times) in chains.iter().zip(&mut times) {
            times.push(look_up(snapshot));
        }
    }
    let [one, eight] = times.each_mut().map(|times| median(times));
    println!("look-up       1 layer {one:?}, 8 layers {eight:?}: {:.2} x", ratio(eight, one));
}

/// One page at random, compared to only pread and decode of its chunk.
fn single_pages(folder: &Path) {
    let memory = memory();
    for (codec, chunk_pages) in
        [(Codec::Raw, 1), (Codec::Raw, 16), (Codec::Lz4, 16), (Codec::Zstd, 16)]
    {
        let path = folder.join(format!("{codec}-{chunk_pages}"));
        let options = WriteOptions::default().codec(codec).chunk_pages(chunk_pages);
        store(&path, &memory, memory.len() as u64, None, &options);
        let snapshot = Snapshot::open(&path).unwrap();
        let entry = |page: PageIndex| match snapshot.entry(page).unwrap() {
            PageEntry::Data { chunk, .. } => Some((page, chunk)),
            _ => None,
        };
        let wanted: Vec<_> = random_pages().filter_map(entry).take(4000).collect();
        let (mut bare, mut summed, mut ours) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            bare.push(bare_reads(snapshot.storage().file().unwrap(), &wanted, false));
            summed.push(bare_reads(snapshot.storage().file().unwrap(), &wanted, true));
            ours.push(our_reads(&snapshot, &wanted));
        }
        let what = if codec == Codec::Raw { "pread" } else { "pread + decode" };
        println!(
            "one page      {codec} in chunks of {chunk_pages}: {what} {:?}, with the checksum {:.2} x, ours {:.2} x",
            median(&mut bare.clone()) / 4000,
            ratio_of_pairs(&summed, &bare),
            ratio_of_pairs(&ours, &bare)
        );
    }
}

/// One page at random of a file without BOUND, which is guarded by its times, compared to the same of a file with
/// BOUND.
fn guarded_pages(folder: &Path) {
    let (bound, guarded) = (folder.join("raw-1"), folder.join("guarded-1"));
    let mut bytes = std::fs::read(&bound).unwrap();
    bytes[16] = 0;
    bytes[152..168].fill(0);
    seal::seal(&mut bytes, seal::CHUNKS | seal::HEADER);
    std::fs::write(&guarded, bytes).unwrap();
    let [bound, guarded] = [bound, guarded].map(|path| Snapshot::open(path).unwrap());
    assert!(bound.header().chunks_id.is_some() && guarded.header().chunks_id.is_none());
    let entry = |page: PageIndex| match bound.entry(page).unwrap() {
        PageEntry::Data { chunk, .. } => Some((page, chunk)),
        _ => None,
    };
    let wanted: Vec<_> = random_pages().filter_map(entry).take(4000).collect();
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (snapshot, times) in [&bound, &guarded].into_iter().zip(&mut times) {
            times.push(our_reads(snapshot, &wanted) / 4000);
        }
    }
    let [bound, guarded] = times.each_mut().map(|times| median(times));
    let guard = guarded.saturating_sub(bound);
    println!(
        "guard         {bound:?} without, {guarded:?} with a check of the file's times: {guard:?}"
    );
}

fn our_reads(snapshot: &Snapshot, wanted: &[(PageIndex, ChunkExtent)]) -> Duration {
    let mut buffer = ChunkBuffer::new();
    time(|| {
        for (page, _) in wanted {
            std::hint::black_box(snapshot.page(*page, &mut buffer).unwrap());
        }
    })
}

/// Reads the same chunks and decodes them with the codec alone: no index, no checks; or with the
/// checksum and nothing else.
fn bare_reads(file: &File, wanted: &[(PageIndex, ChunkExtent)], checksum: bool) -> Duration {
    let mut zstd = zstd::bulk::Decompressor::new().unwrap();
    let (mut stored, mut decoded) = (vec![0; 4 << 20], vec![0; 4 << 20]);
    time(|| {
        for (_, extent) in wanted {
            let stored = &mut stored[..extent.len_bytes() as usize];
            file.read_exact_at(stored, extent.offset()).unwrap();
            if checksum {
                std::hint::black_box(crc32fast::hash(&stored[CHUNK_HEADER_BYTES..]));
            }
            let pages = usize::from(u16::from_le_bytes([stored[6], stored[7]]));
            let len = u32::from_le_bytes([stored[8], stored[9], stored[10], stored[11]]) as usize;
            let payload = &stored[CHUNK_HEADER_BYTES + 4 * pages..][..len];
            let out = &mut decoded[..pages * PAGE_BYTES];
            match stored[4] {
                1 => assert_eq!(lz4_flex::block::decompress_into(payload, out).unwrap(), out.len()),
                2 => assert_eq!(zstd.decompress_to_buffer(payload, out).unwrap(), out.len()),
                _ => {}
            }
            std::hint::black_box(&out);
        }
    })
}

/// `verify` against reading and decoding every chunk with the codec alone, one thread each.
fn verifying(folder: &Path) {
    for codec in ["lz4-16", "zstd-16"] {
        let snapshot = Snapshot::open(folder.join(codec)).unwrap();
        let mut chunks = Vec::new();
        snapshot
            .for_each_entry(0..snapshot.leaf_count(), |page, entry| {
                if let PageEntry::Data { chunk, .. } = entry {
                    chunks.push((page, chunk));
                }
                Ok(())
            })
            .unwrap();
        chunks.sort_by_key(|(_, chunk)| *chunk);
        chunks.dedup_by_key(|(_, chunk)| *chunk);
        let (mut bare, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            bare.push(bare_reads(snapshot.storage().file().unwrap(), &chunks, false));
            ours.push(time(|| {
                snapshot.verify(NonZeroUsize::MIN, &go_on).unwrap();
            }));
        }
        println!(
            "verify        {codec}: read + decode {:?}, ours {:?}: {:.2} x",
            median(&mut bare.clone()),
            median(&mut ours.clone()),
            ratio_of_pairs(&ours, &bare)
        );
    }
}

/// The bytes of the file beside the payloads, compared to the bytes of the stored pages.
fn overhead(folder: &Path) {
    for name in ["raw-16", "lz4-16", "zstd-16"] {
        let snapshot = Snapshot::open(folder.join(name)).unwrap();
        let header = snapshot.header();
        let mut payloads = 0;
        let mut buffer = ChunkBuffer::new();
        let mut last = None;
        snapshot
            .for_each_entry(0..snapshot.leaf_count(), |_, entry| {
                if let PageEntry::Data { chunk, .. } = entry
                    && last.is_none_or(|last| chunk > last)
                {
                    payloads +=
                        u64::from(snapshot.chunk(chunk, &mut buffer)?.header().payload_bytes);
                    last = Some(chunk);
                }
                Ok(())
            })
            .unwrap();
        let extra = (header.file_bytes - payloads) as f64;
        println!(
            "overhead      {name}: {:.2} % of the stored pages' {} MiB, {:.2} % of the file",
            extra / (header.stored_pages * PAGE_BYTES as u64) as f64 * 100.0,
            header.stored_pages >> 8,
            extra / header.file_bytes as f64 * 100.0
        );
    }
}

fn memory() -> Vec<u8> {
    let mut memory = vec![0; PAGES * PAGE_BYTES];
    let mut state = 1u64;
    for (number, page) in memory.chunks_mut(PAGE_BYTES).enumerate() {
        for (at, byte) in page.iter_mut().enumerate() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = match number % 8 {
                0 => 0,
                1..5 => (at / 16 % 23) as u8 ^ (number >> (at % 2 * 8)) as u8,
                5 | 6 => state as u8,
                _ => (state as u8) & 0x1f,
            };
        }
    }
    memory
}

fn store(
    path: &Path,
    memory: &[u8],
    memory_bytes: u64,
    parent: Option<&Path>,
    options: &WriteOptions,
) {
    let regions = [MemoryRegion { gpa: 0, len: memory_bytes, source_offset: 0 }];
    let data = [0..memory.len() as u64];
    let contents = Contents::new(&regions, &memory, &data);
    match parent {
        None => write_snapshot(path, contents, options, &go_on).unwrap(),
        Some(file) => {
            let snapshot = Snapshot::open(file).unwrap();
            let parent = Parent::new(&snapshot, file);
            write_layer(path, contents, &parent, options, &go_on).unwrap()
        }
    };
}

fn go_on(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn random_pages() -> impl Iterator<Item = PageIndex> {
    let mut state = 7u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        PageIndex((state >> 33) as u32 % PAGES as u32)
    })
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// The median of the ratios within the rounds.
fn ratio_of_pairs(a: &[Duration], b: &[Duration]) -> f64 {
    let mut ratios: Vec<_> = a.iter().zip(b).map(|(a, b)| ratio(*a, *b)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

fn ratio(a: Duration, b: Duration) -> f64 {
    a.as_secs_f64() / b.as_secs_f64()
}
