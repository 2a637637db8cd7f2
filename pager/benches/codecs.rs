//! Touches a whole region in random order, from a snapshot in chunks of 64 KiB, compared to only decoding and only
//! installing.
//!
//!     cargo bench -p snapvm-pager --bench codecs
//!
//! - *decode*: the function of the codec on the payload of each chunk, which is already in memory. No checksum, no
//!   index.
//! - *load*: the work of a reader of the pager for each chunk (pread, checksum, decode, index), without a pager.
//! - *install*: `UFFDIO_COPY` of 64 KiB for each chunk, with no thread waiting.
//! - *pager*: the touches of a thread that is bound to a CPU, and of one that is not.
//!
//! Chunks are loaded in the order of the touches. Rounds of all variants alternate. Results are medians over the
//! rounds, also of the ratios.
#![allow(unsafe_code)]

#[path = "../tests/support/snapshot.rs"]
mod snapshot;
#[path = "../tests/support/mod.rs"]
mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use pager::uffd::{Features, Uffd};
use pager::{PageSource, Pager, SnapshotSource};
use snapfmt::layout::CHUNK_HEADER_BYTES;
use snapfmt::{Codec, PageEntry, PageIndex, ReadAt, Snapshot};
use support::{Memory, PAGE, shuffled, stamp};

const CHUNK_PAGES: usize = 16;

struct Bench {
    rounds: usize,
    pages: usize,
}

/// One chunk: its first page, and its payload as stored.
struct Chunk {
    page: usize,
    payload: Vec<u8>,
}

fn main() {
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let full = std::env::args().any(|arg| arg == "--bench");
    if !support::userfaultfd_works("bench codecs") {
        return;
    }
    let bench = match full {
        true => Bench { rounds: 9, pages: 64 << 8 },
        false => Bench { rounds: 1, pages: 1 << 8 },
    };
    println!(
        "{} MiB, us a chunk of 64 KiB: {:>6} {:>6} {:>8} {:>6} {:>8} {:>14} {:>14}",
        bench.pages >> 8,
        "decode",
        "load",
        "install",
        "bound",
        "unbound",
        "of decode+inst.",
        "of load+inst."
    );
    for codec in [Codec::Lz4, Codec::Zstd] {
        bench.codec(codec);
    }
}

impl Bench {
    fn codec(&self, codec: Codec) {
        let folder = tempfile::tempdir().expect("a folder");
        let snapshot = snapshot::stored(folder.path(), &snapshot::content(self.pages), codec);
        let source: Arc<dyn PageSource> = Arc::new(SnapshotSource::new(Arc::clone(&snapshot)));
        let order = shuffled(self.pages, 3);
        let chunks = chunks(&snapshot, &order);
        let mut rounds: Vec<[f64; 5]> = Vec::new();
        for _ in 0..self.rounds {
            // In new threads, so that none inherits a CPU. The second run counts: the first one after another variant
            // is much slower.
            let alone = |work: &(dyn Fn() + Sync)| {
                let twice = || [micros(work), micros(work)][1];
                thread::scope(|scope| scope.spawn(twice).join().expect("it runs"))
            };
            let touch = |bound| [0, 1].map(|_| self.touch(&source, &order, bound))[1];
            let round = [
                alone(&|| decode(codec, &chunks)),
                alone(&|| load(&*source, &chunks)),
                [0, 1].map(|_| self.install(&chunks))[1],
                touch(true),
                touch(false),
            ];
            rounds.push(round.map(|micros| micros / chunks.len() as f64));
        }
        let of = |pick: &dyn Fn(&[f64; 5]) -> f64| median(rounds.iter().map(pick).collect());
        let [decode, load, install, bound, unbound] = [0, 1, 2, 3, 4].map(|at| of(&|r| r[at]));
        // Speed: higher is better.
        let bare = [of(&|r| (r[0] + r[2]) / r[3]), of(&|r| (r[0] + r[2]) / r[4])];
        let whole = [of(&|r| (r[1] + r[2]) / r[3]), of(&|r| (r[1] + r[2]) / r[4])];
        println!(
            "{:<29} {decode:>6.1} {load:>6.1} {install:>8.1} {bound:>6.1} {unbound:>8.1} {:>6.2}x {:>6.2}x {:>6.2}x {:>6.2}x",
            codec.to_string(),
            bare[0],
            bare[1],
            whole[0],
            whole[1]
        );
    }

    fn install(&self, chunks: &[Chunk]) -> f64 {
        let memory = Memory::map(self.pages * PAGE);
        let uffd = Uffd::open(Features::EVENT_REMOVE, Features::NONE).expect("checked in main");
        // SAFETY: the mapping outlives the userfaultfd, and has no references into it.
        unsafe { uffd.register(memory.addr(), memory.len() as u64) }.expect("anonymous memory");
        let bytes = vec![7; CHUNK_PAGES * PAGE];
        micros(&|| {
            for chunk in chunks {
                let at = memory.addr() + (chunk.page * PAGE) as u64;
                // SAFETY: inside `memory`, which is registered with it.
                assert_eq!(unsafe { uffd.copy(at, &bytes) }, Ok(bytes.len()));
            }
        })
    }

    fn touch(&self, source: &Arc<dyn PageSource>, order: &[usize], bound: bool) -> f64 {
        let memory = Memory::map(self.pages * PAGE);
        let pager = Pager::builder(Arc::clone(source)).region(memory.whole()).start();
        let pager = pager.expect("it starts");
        let touch = || {
            if bound {
                support::pin(0);
            }
            micros(&|| {
                for &page in order {
                    assert_eq!(memory.read_u64(page * PAGE), stamp(page));
                }
            })
        };
        let took = thread::scope(|scope| scope.spawn(touch).join().expect("it runs"));
        let stats = pager.stop();
        assert_eq!(stats.pages.present, self.pages as u64, "{stats:?}");
        took
    }
}

/// The chunks of the snapshot, in the order in which touches in this order of pages load them.
fn chunks(snapshot: &Snapshot, order: &[usize]) -> Vec<Chunk> {
    let mut seen = vec![false; order.len()];
    let mut chunks = Vec::new();
    for &page in order {
        let first = page - page % CHUNK_PAGES;
        if std::mem::replace(&mut seen[first], true) {
            continue;
        }
        let PageEntry::Data { chunk, .. } =
            snapshot.entry(PageIndex(first as u32)).expect("it is indexed")
        else {
            panic!("page {first} is stored");
        };
        let mut stored = vec![0; chunk.len_bytes() as usize];
        snapshot.storage().read_exact_at(&mut stored, chunk.offset()).expect("it is there");
        let pages = usize::from(u16::from_le_bytes([stored[6], stored[7]]));
        assert_eq!(pages, CHUNK_PAGES);
        let len = u32::from_le_bytes([stored[8], stored[9], stored[10], stored[11]]) as usize;
        let payload = stored[CHUNK_HEADER_BYTES + 4 * pages..][..len].to_vec();
        chunks.push(Chunk { page: first, payload });
    }
    chunks
}

fn decode(codec: Codec, chunks: &[Chunk]) {
    let mut zstd = zstd::bulk::Decompressor::new().expect("memory");
    let mut out = vec![0; CHUNK_PAGES * PAGE];
    for Chunk { payload, .. } in chunks {
        let len = match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(payload, &mut out).expect("it is lz4"),
            _ => zstd.decompress_to_buffer(payload, &mut out).expect("it is zstd"),
        };
        assert_eq!(len, out.len());
        black_box(&out);
    }
}

fn load(source: &dyn PageSource, chunks: &[Chunk]) {
    let mut reader = source.reader(PAGE).expect("it has such pages");
    for chunk in chunks {
        black_box(reader.load((chunk.page * PAGE) as u64).expect("it is there"));
    }
}

fn micros(work: &(impl Fn() + ?Sized)) -> f64 {
    let begin = Instant::now();
    work();
    begin.elapsed().as_nanos() as f64 / 1e3
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
