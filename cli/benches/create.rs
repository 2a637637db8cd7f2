//! The cost of `snap create`, compared to the codec alone, and for guests of different sizes.
//!
//!     cargo bench -p snapvm-cli --bench create
//!
//! "Codec alone" compresses the same non-zero pages, gathered in memory in chunks of the same size, with as many
//! threads, into buffers that are thrown away. "Write" is `snapfmt::write_snapshot` of the guest's memory (the demo's,
//! or the flat image named by `SNAP_BENCH_MEMORY`), read as `snap create` reads it, through the mapping of a memfd,
//! into a file, synced and named; it is also shown without the cost of the disk, into a file in memory (tmpfs, which
//! takes new pages more slowly than ext4 does). Rounds of all sides alternate. Results are medians; percentages are
//! medians over the rounds. The size is that of the whole file, compared to memory and to the codec's output for all
//! pages that are not zero.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{Codec, Contents, MemoryRegion, ReadAt, Snapshot, WriteOptions, write_snapshot};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

const ROUNDS: usize = 7;
const CHUNK_PAGES: usize = 16;

fn main() {
    if let Err(error) = vmm::probe() {
        println!("SKIPPED create: {error}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    against_the_codec(folder.path());
    against_memory_size(folder.path());
}

fn against_the_codec(folder: &Path) {
    // The same memory, read from a snapshot of it into a file in memory.
    let sample = folder.join("sample.snap");
    match std::env::var_os("SNAP_BENCH_MEMORY") {
        Some(image) => {
            let snap = env!("CARGO_BIN_EXE_snap");
            let imported =
                Command::new(snap).arg("import").arg(image).arg("-o").arg(&sample).status();
            assert!(imported.unwrap().success());
        }
        None => _ = snap_create(&sample, &["--memory", "1G", "--work", "512M"]),
    }
    let snapshot = Snapshot::open(&sample).unwrap();
    let in_memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let memory_bytes = snapshot.header().memory_bytes;
    let memory = Mapped::new(memory_bytes);
    let place = |offset: u64, bytes: &[u8]| {
        memory.0.write_slice(bytes, GuestAddress(offset)).unwrap();
    };
    let threads = std::thread::available_parallelism().unwrap();
    snapshot.load(threads, &place, &|_| ControlFlow::Continue(())).unwrap();
    let populated: Vec<_> = snapshot.populated().collect();
    let pages = pages_of(&memory, &populated);

    println!("create, {} MiB not zero, {threads} threads, medians of {ROUNDS}:", pages.len() >> 20);
    for codec in [Codec::Zstd, Codec::Lz4] {
        let options =
            WriteOptions::default().codec(codec).threads(threads).chunk_pages(CHUNK_PAGES);
        let write = |out: &Path| {
            let regions = [MemoryRegion { gpa: 0, len: memory_bytes, source_offset: 0 }];
            let contents = Contents::new(&regions, &memory, &populated);
            // Freeing the blocks of the last one is not part of writing.
            let _ = std::fs::remove_file(out);
            let start = Instant::now();
            write_snapshot(out, contents, &options, &|_| ControlFlow::Continue(())).unwrap();
            start.elapsed()
        };
        let on_disk = folder.join("out.snap");
        let (mut alone, mut to_memory, mut to_disk) = (Vec::new(), Vec::new(), Vec::new());
        let mut alone_bytes = 0;
        for _ in 0..ROUNDS {
            let (time, bytes) = codec_alone(codec, &pages, threads);
            alone.push(time);
            alone_bytes = bytes;
            to_memory.push(write(&in_memory.path().join("out.snap")));
            to_disk.push(write(&on_disk));
        }
        let speed = |times: &[Duration]| {
            let pairs = alone.iter().zip(times);
            let mut speeds: Vec<_> =
                pairs.map(|(alone, time)| alone.as_secs_f64() / time.as_secs_f64()).collect();
            speeds.sort_by(f64::total_cmp);
            speeds[speeds.len() / 2] * 100.0
        };
        let speeds = [speed(&to_memory), speed(&to_disk)];
        println!(
            "  {codec:<5} codec alone {:>8.0?}   write {:>8.0?} ({:.0} % of its speed)   \
             and sync to disk {:>8.0?} ({:.0} %)",
            median(alone),
            median(to_memory),
            speeds[0],
            median(to_disk),
            speeds[1]
        );
        let file_bytes = on_disk.metadata().unwrap().len() as f64;
        println!(
            "        file {:.1} MiB: {:.1} % of memory, {:.1} % of the pages that are not zero, {:.3} x the codec alone",
            file_bytes / f64::from(1 << 20),
            file_bytes / memory_bytes as f64 * 100.0,
            file_bytes / pages.len() as f64 * 100.0,
            file_bytes / alone_bytes as f64
        );
    }
}

/// A guest's memory in the form that `snap create` uses.
struct Mapped(GuestMemoryMmap);

impl Mapped {
    fn new(memory_bytes: u64) -> Self {
        let file = File::from(memfd_create("guest-memory", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(memory_bytes).unwrap();
        let region = (GuestAddress(0), memory_bytes as usize, Some(FileOffset::new(file, 0)));
        Self(GuestMemoryMmap::from_ranges_with_files([region]).unwrap())
    }
}

impl ReadAt for Mapped {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_slice(buf, GuestAddress(offset)).map_err(io::Error::other)
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.iter().map(|region| region.len()).sum())
    }
}

/// All pages of some ranges that are not zero, end to end.
fn pages_of(memory: &Mapped, ranges: &[std::ops::Range<u64>]) -> Vec<u8> {
    let mut pages = Vec::new();
    let mut leaf = vec![0; 2 << 20];
    for range in ranges {
        let bytes = &mut leaf[..(range.end - range.start) as usize];
        memory.read_exact_at(bytes, range.start).unwrap();
        for page in bytes.chunks(PAGE_BYTES).filter(|page| page.iter().any(|byte| *byte != 0)) {
            pages.extend_from_slice(page);
        }
    }
    pages
}

/// Also returns the compressed size of all chunks.
fn codec_alone(codec: Codec, pages: &[u8], threads: NonZeroUsize) -> (Duration, usize) {
    let chunks: Vec<_> = pages.chunks(CHUNK_PAGES * PAGE_BYTES).collect();
    let (next, total) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads.get() {
            scope.spawn(|| {
                let mut zstd = zstd::bulk::Compressor::new(1).unwrap();
                let mut out = vec![0; 2 * CHUNK_PAGES * PAGE_BYTES];
                while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let len = match codec {
                        Codec::Zstd => zstd.compress_to_buffer(chunk, &mut out[..]).unwrap(),
                        _ => lz4_flex::block::compress_into(chunk, &mut out).unwrap(),
                    };
                    total.fetch_add(len, Ordering::Relaxed);
                }
            });
        }
    });
    (start.elapsed(), total.into_inner())
}

fn against_memory_size(folder: &Path) {
    println!("snap create --work 32M, medians of {ROUNDS}:");
    let sizes = ["64M", "16G"];
    let mut runs = vec![Vec::new(); sizes.len()];
    let mut anonymous_kib = vec![0; sizes.len()];
    for _ in 0..ROUNDS {
        for (number, size) in sizes.iter().enumerate() {
            let options = ["--memory", size, "--work", "32M", "--force"];
            let (time, kib) = snap_create(&folder.join("size.snap"), &options);
            runs[number].push(time);
            anonymous_kib[number] = kib.max(anonymous_kib[number]);
        }
    }
    let times: Vec<_> = runs.into_iter().map(median).collect();
    for (number, size) in sizes.iter().enumerate() {
        let mib = anonymous_kib[number] >> 10;
        println!("  {size:>4} {:>8.0?}   peak of anonymous memory {mib} MiB", times[number]);
    }
    let ratio = times[1].as_secs_f64() / times[0].as_secs_f64();
    println!("  16G takes {ratio:.2} x the time of 64M");
}

/// Runs `snap create`. Returns the time of the whole process, and the peak of its anonymous memory in KiB (the guest's
/// memory is in a memfd).
fn snap_create(out: &Path, options: &[&str]) -> (Duration, u64) {
    let start = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_snap"))
        .arg("create")
        .arg(out)
        .args(options)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        most = kib.unwrap_or(0).max(most);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().unwrap().success());
    (start.elapsed(), most)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
