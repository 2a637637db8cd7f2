//! What checking costs: reads of a chunk's size at random offsets of a file in the page cache, with and without; and
//! opening, for files of several lengths.
//!
//! `cargo bench -p snapvm-hashtree` prints medians. `HASH_BENCH_MAX_GIB=64` also opens a sparse file of 64 GiB.

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use hashtree::{HashedStorage, Root, tree_path, write_tree};
use snapfmt::{Existing, ReadAt};

const FILE_BYTES: u64 = 512 << 20;
const READS: usize = 20_000;
/// A chunk of 64 KiB compressed by zstd and by lz4, a raw chunk of 64 KiB, and a part that a loader reads.
const LENGTHS: [usize; 4] = [9 << 10, 17 << 10, 64 << 10, 2 << 20];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = folder.path().join("data");
    let mut file = File::create(&path)?;
    let block: Vec<u8> =
        (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for number in 0..FILE_BYTES >> 20 {
        let mut block = block.clone();
        block[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&block)?;
    }
    drop(file);
    let began = Instant::now();
    let root = write_tree(&File::open(&path)?, &tree_path(&path), Existing::Keep, &|_, _| {
        ControlFlow::Continue(())
    })?;
    let rate = FILE_BYTES as f64 / began.elapsed().as_secs_f64() / 1e9;
    println!("hashing 512 MiB: {rate:.2} GB/s, with the sync of the tree");

    let plain = File::open(&path)?;
    let checked = open(&path, root)?;
    println!("{:>10} {:>12} {:>12} {:>12}", "bytes", "plain us", "checked us", "more us");
    for len in LENGTHS {
        let reads = READS.min((4 << 30) / len);
        // The first pass also checks the paths of all blocks.
        let _ = median(&checked, len, reads);
        let mut pairs: Vec<(f64, f64)> =
            (0..5).map(|_| (median(&plain, len, reads), median(&checked, len, reads))).collect();
        pairs.sort_by(|a, b| (a.1 - a.0).total_cmp(&(b.1 - b.0)));
        let (plain, checked) = pairs[2];
        println!("{len:>10} {plain:>12.1} {checked:>12.1} {:>12.1}", checked - plain);
    }

    let most: u64 = std::env::var("HASH_BENCH_MAX_GIB").map_or(Ok(4), |text| text.parse())?;
    println!("{:>10} {:>12}", "GiB", "open us");
    for bytes in [64 << 20, 4 << 30, 64 << 30].into_iter().filter(|bytes| *bytes <= most << 30) {
        let path = folder.path().join("sparse");
        File::create(&path)?.set_len(bytes)?;
        let root =
            write_tree(&File::open(&path)?, &tree_path(&path), Existing::Replace, &|_, _| {
                ControlFlow::Continue(())
            })?;
        let mut times: Vec<Duration> = Vec::new();
        for _ in 0..101 {
            let began = Instant::now();
            let opened = open(&path, root)?;
            times.push(began.elapsed());
            drop(opened);
        }
        times.sort();
        println!(
            "{:>10.3} {:>12.1}",
            bytes as f64 / (1u64 << 30) as f64,
            times[50].as_secs_f64() * 1e6
        );
    }
    Ok(())
}

fn open(
    path: &std::path::Path,
    root: Root,
) -> Result<HashedStorage<File>, Box<dyn std::error::Error>> {
    Ok(HashedStorage::open(File::open(path)?, File::open(tree_path(path))?, root)?)
}

/// Microseconds of a read at a random offset, aligned to 64 bytes as chunks are.
fn median(storage: &dyn ReadAt, len: usize, reads: usize) -> f64 {
    let mut buf = vec![0; len];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut times: Vec<u64> = Vec::with_capacity(reads);
    for _ in 0..reads {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let offset = (state >> 20) % (FILE_BYTES - len as u64) / 64 * 64;
        let began = Instant::now();
        storage.read_exact_at(&mut buf, offset).expect("it is right");
        times.push(began.elapsed().as_nanos() as u64);
    }
    times.sort_unstable();
    times[times.len() / 2] as f64 / 1000.0
}
