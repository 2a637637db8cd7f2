//! What a seal costs: sealed files compared to plain ones with the same content.
//!
//!     cargo bench -p snapfmt --bench sealed
//!
//! The guest's memory is synthetic, half text-like and half random bytes. Everything is in the page cache. The sides
//! alternate. Results are medians over the rounds.
#![allow(missing_docs, clippy::unwrap_used)]

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{
    ChunkBuffer, ChunkExtent, Codec, Contents, Existing, KeyProvider, MemoryRegion, Metadata,
    PageEntry, Parents, Rekey, SecretKey, Snapshot, WriteOptions, rekey_snapshot, write_snapshot,
};

const ROUNDS: usize = 9;
const PAGES: usize = 64 << 8;

fn main() {
    let folder = tempfile::tempdir().unwrap();
    let memory = memory();
    for (codec, chunk_pages) in
        [(Codec::Zstd, 8), (Codec::Zstd, 16), (Codec::Lz4, 16), (Codec::Raw, 16)]
    {
        let options = WriteOptions::default()
            .codec(codec)
            .chunk_pages(chunk_pages)
            .threads(NonZeroUsize::MIN)
            .existing(Existing::Replace);
        let sides = [options.clone(), options.seal(key())];
        let paths = ["plain", "sealed"].map(|name| folder.path().join(name));
        let mut times = [(); 2].map(|()| (Vec::new(), Vec::new(), Vec::new(), Vec::new()));
        let (mut stored, mut rekeys, mut rewrites) = (0, Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            for ((options, path), times) in sides.iter().zip(&paths).zip(&mut times) {
                times.0.push(time(|| store(path, &memory, options)));
                let mut opened = None;
                times.1.push(time(|| opened = Some(open(path, options))));
                let snapshot = opened.unwrap();
                times.2.push(chunk_time(&snapshot));
                times.3.push(time(|| {
                    let place = |_: u64, bytes: &[u8]| _ = std::hint::black_box(bytes[0]);
                    snapshot.load(NonZeroUsize::MIN, &place, &go_on).unwrap();
                }));
                stored = snapshot.header().file_bytes / snapshot.header().chunks;
            }
        }
        for _ in 0..ROUNDS {
            let (sealed, to) = (open(&paths[1], &sides[1]), folder.path().join("copy"));
            rekeys.push(time(|| rekey(&to, &sealed)));
            rewrites.push(time(|| rewrite(&to, &sealed, &sides[1])));
        }
        let [mut plain, mut sealed] = times;
        println!("{codec}, {chunk_pages} pages, {stored} bytes of file a chunk");
        for (what, plain, sealed) in [
            ("write all, 1 thread", &mut plain.0, &mut sealed.0),
            ("open", &mut plain.1, &mut sealed.1),
            ("read a chunk", &mut plain.2, &mut sealed.2),
            ("load all, 1 thread", &mut plain.3, &mut sealed.3),
        ] {
            let (plain, sealed) = (median(plain), median(sealed));
            let ratio = sealed.as_secs_f64() / plain.as_secs_f64();
            println!("  {what:<20} plain {plain:>10.2?}, sealed {sealed:>10.2?}: {ratio:.2} x");
        }
        let (rekeyed, rewritten) = (median(&mut rekeys), median(&mut rewrites));
        let ratio = rekeyed.as_secs_f64() / rewritten.as_secs_f64();
        println!(
            "  {:<20} rekey {rekeyed:>10.2?}, rewrite {rewritten:>9.2?}: {ratio:.2} x",
            "another key"
        );
    }
}

/// The median time to read, check and decode a chunk, in an order that is not that of the file.
fn chunk_time(snapshot: &Snapshot) -> Duration {
    let mut chunks: Vec<ChunkExtent> = Vec::new();
    snapshot
        .for_each_entry(0..snapshot.leaf_count(), |_, entry| {
            if let PageEntry::Data { chunk, .. } = entry {
                chunks.push(chunk);
            }
            Ok(())
        })
        .unwrap();
    chunks.dedup();
    let mut buffer = ChunkBuffer::new();
    // 997 is prime: every chunk once.
    let order = (0..chunks.len()).map(|at| chunks[at * 997 % chunks.len()]);
    let mut times: Vec<_> = order
        .map(|chunk| time(|| _ = std::hint::black_box(snapshot.chunk(chunk, &mut buffer).unwrap())))
        .collect();
    median(&mut times)
}

fn key() -> Arc<dyn KeyProvider> {
    Arc::new(SecretKey::new([7; 32]))
}

fn open(path: &PathBuf, options: &WriteOptions) -> Snapshot {
    let parents = Parents { keys: options.seal.clone(), ..Parents::default() };
    Snapshot::open_with(path, &parents).unwrap()
}

fn store(path: &Path, memory: &[u8], options: &WriteOptions) {
    let len = memory.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    write_snapshot(path, Contents::new(&regions, &memory, &data), options, &go_on).unwrap();
}

/// As `snap rekey`: the chunks are copied.
fn rekey(to: &Path, snapshot: &Snapshot) {
    let keys = Rekey::new(vec![key()], Metadata::default()).existing(Existing::Replace);
    rekey_snapshot(to, snapshot, &keys, &go_on).unwrap();
}

/// As `snap flatten`: all pages are decoded, compressed and encrypted.
fn rewrite(to: &Path, snapshot: &Snapshot, options: &WriteOptions) {
    let (memory, data) = (snapshot.memory(), snapshot.populated().collect::<Vec<_>>());
    let contents = Contents::new(snapshot.regions(), &memory, &data);
    write_snapshot(to, contents, options, &go_on).unwrap();
}

fn memory() -> Vec<u8> {
    let mut memory = vec![0; PAGES * PAGE_BYTES];
    let mut state = 1u64;
    for (at, byte) in memory.iter_mut().enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = match at / (PAGE_BYTES / 2) % 2 {
            0 => b"the guest's memory "[at / 5 % 19] ^ (at / PAGE_BYTES % 3) as u8,
            _ => state as u8 & 0x0f,
        };
    }
    memory
}

fn go_on(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
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
