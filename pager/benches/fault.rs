//! The cost of a fault: this crate compared to a bare loop, in one run.
//!
//!     cargo bench -p snapvm-pager --bench fault              # a table
//!     cargo bench -p snapvm-pager --bench fault -- --json    # the same as JSON
//!
//! Both serve the same pages from the same warm file. The bare loop is `poll`, `read`, `pread` and
//! `UFFDIO_COPY` of one page, and nothing else. Rounds of the two alternate. A result is the median over
//! the rounds.
#![allow(unsafe_code)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use pager::uffd::{Features, Message, MessageBatch, Uffd, Wait};
use pager::{
    Load, LoadCost, LoadedPage, LoadedPages, PageReader, PageSource, Pager, Placement, SourceError,
};
use serde::Serialize;
use support::{Memory, PAGE, shuffled, stamp};

const ROUNDS: usize = 9;
const PAGES: usize = 4096;

#[derive(Serialize)]
struct Figure {
    what: String,
    /// Nanoseconds per page: the median of the medians of the rounds, and the median of their means.
    p50_ns: f64,
    mean_ns: f64,
}

fn main() {
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let args: Vec<String> = std::env::args().collect();
    let rounds = if args.iter().any(|arg| arg == "--bench") { ROUNDS } else { 1 };
    if !support::userfaultfd_works("bench fault") {
        return;
    }
    let mut file = tempfile::tempfile().expect("a temporary file");
    for page in 0..PAGES {
        file.write_all(&stamp(page).to_ne_bytes().repeat(PAGE / 8)).expect("room for 16 MiB");
    }
    let file = Arc::new(file);

    let mut figures = Vec::new();
    figures.extend(one_fault(&file, rounds));
    figures.extend(chunks(&file, rounds));
    figures.extend(threads(&file, rounds));
    figures.extend(zeros(rounds));
    figures.extend(starts(rounds));

    if args.iter().any(|arg| arg == "--json") {
        println!("{}", serde_json::to_string_pretty(&figures).expect("plain figures"));
        return;
    }
    println!("{:<64} {:>10} {:>10}", "", "p50 us", "mean us");
    for Figure { what, p50_ns, mean_ns } in &figures {
        println!("{what:<64} {:>10.2} {:>10.2}", p50_ns / 1e3, mean_ns / 1e3);
    }
}

/// One fault of a warm page in random order, for each placement of the two threads.
fn one_fault(file: &Arc<File>, rounds: usize) -> Vec<Figure> {
    let bare = |pinned: Option<usize>| {
        let file = Arc::clone(file);
        move || {
            let memory = Memory::map(PAGES * PAGE);
            let _bare = Bare::start(&memory, &file, pinned);
            pin(pinned);
            touch_each(&memory)
        }
    };
    let ours = |placement: Placement, toucher: Option<usize>| {
        let source: Arc<dyn PageSource> =
            Arc::new(FileSource { file: Arc::clone(file), chunk_pages: 1 });
        move || {
            let memory = Memory::map(PAGES * PAGE);
            let builder = Pager::builder(Arc::clone(&source)).region(memory.whole());
            let pager = builder.placement(placement).start().expect("it starts");
            pin(toucher);
            let times = touch_each(&memory);
            assert_eq!(pager.stop().installed.demand, PAGES as u64);
            times
        }
    };
    alternate(
        rounds,
        vec![
            ("one fault: bare loop, same CPU", Box::new(bare(Some(0)))),
            ("one fault: pager, same CPU", Box::new(ours(Placement::Cpu(0), Some(0)))),
            ("one fault: bare loop, nothing pinned", Box::new(bare(None))),
            ("one fault: pager, nothing pinned", Box::new(ours(Placement::None, None))),
            ("one fault: pager, follows", Box::new(ours(Placement::Follow, None))),
            ("one fault: pager, toucher pinned", Box::new(ours(Placement::None, Some(0)))),
            (
                "one fault: pager, toucher pinned, follows",
                Box::new(ours(Placement::Follow, Some(0))),
            ),
        ],
    )
}

/// All pages in random order: the cost of a page when whole chunks are installed.
fn chunks(file: &Arc<File>, rounds: usize) -> Vec<Figure> {
    let ours = |chunk_pages: usize| {
        let source: Arc<dyn PageSource> =
            Arc::new(FileSource { file: Arc::clone(file), chunk_pages });
        move || {
            let memory = Memory::map(PAGES * PAGE);
            let pager = Pager::builder(Arc::clone(&source))
                .region(memory.whole())
                .start()
                .expect("it starts");
            let begin = Instant::now();
            touch_each(&memory);
            let each = begin.elapsed().as_nanos() as f64 / PAGES as f64;
            drop(pager);
            vec![each]
        }
    };
    alternate(
        rounds,
        vec![
            ("all pages, chunks of 4 KiB: a page", Box::new(ours(1))),
            ("all pages, chunks of 64 KiB: a page", Box::new(ours(16))),
            ("all pages, chunks of 256 KiB: a page", Box::new(ours(64))),
        ],
    )
}

/// Several threads that fault at the same time, each all over the memory, page by page.
fn threads(file: &Arc<File>, rounds: usize) -> Vec<Figure> {
    let ours = |touchers: usize, slices: usize, placement: Placement| {
        let source: Arc<dyn PageSource> =
            Arc::new(FileSource { file: Arc::clone(file), chunk_pages: 1 });
        move || {
            let memory = Memory::map(PAGES * PAGE);
            let builder = Pager::builder(Arc::clone(&source)).region(memory.whole());
            let pager = builder.slices(slices).placement(placement).start().expect("it starts");
            let order = shuffled(PAGES, 23);
            let begin = Instant::now();
            thread::scope(|scope| {
                for part in order.chunks(PAGES.div_ceil(touchers)) {
                    let memory = &memory;
                    scope.spawn(move || {
                        for &page in part {
                            assert_eq!(memory.read_u64(page * PAGE), stamp(page));
                        }
                    });
                }
            });
            let each = begin.elapsed().as_nanos() as f64 / PAGES as f64;
            drop(pager);
            vec![each]
        }
    };
    alternate(
        rounds,
        vec![
            ("1 thread, 1 slice: a page", Box::new(ours(1, 1, Placement::Follow))),
            ("2 threads, 1 slice: a page", Box::new(ours(2, 1, Placement::Follow))),
            ("2 threads, 2 slices: a page", Box::new(ours(2, 2, Placement::Follow))),
            ("2 threads, 2 slices, no placement: a page", Box::new(ours(2, 2, Placement::None))),
            ("4 threads, 4 slices: a page", Box::new(ours(4, 4, Placement::Follow))),
            ("4 threads, 4 slices, no placement: a page", Box::new(ours(4, 4, Placement::None))),
            ("8 threads, 4 slices: a page", Box::new(ours(8, 4, Placement::Follow))),
        ],
    )
}

/// Zero pages: how many to install together, and whether as zero pages or as copies of zeros.
fn zeros(rounds: usize) -> Vec<Figure> {
    let fill = |step: usize, copied: bool, written: bool| {
        move || {
            let memory = Memory::map(PAGES * PAGE);
            let uffd = register(&memory);
            let buffer = vec![0; step * PAGE];
            let begin = Instant::now();
            for first in (0..PAGES).step_by(step) {
                let addr = memory.addr() + (first * PAGE) as u64;
                let done = match copied {
                    // SAFETY: inside `memory`, which is registered with it.
                    true => unsafe { uffd.copy(addr, &buffer) },
                    // SAFETY: as above.
                    false => unsafe { uffd.zero(addr, step * PAGE) },
                };
                assert_eq!(done, Ok(step * PAGE));
            }
            if written {
                (0..PAGES).for_each(|page| memory.write(page * PAGE, 1));
            }
            vec![begin.elapsed().as_nanos() as f64 / PAGES as f64]
        }
    };
    alternate(
        rounds,
        vec![
            ("zero fill: UFFDIO_ZEROPAGE of 1 page: a page", Box::new(fill(1, false, false))),
            ("zero fill: UFFDIO_ZEROPAGE of 16 pages: a page", Box::new(fill(16, false, false))),
            ("zero fill: UFFDIO_ZEROPAGE of 512 pages: a page", Box::new(fill(512, false, false))),
            ("zero fill: UFFDIO_COPY of 1 zero page: a page", Box::new(fill(1, true, false))),
            ("zero fill: UFFDIO_COPY of 16 zero pages: a page", Box::new(fill(16, true, false))),
            (
                "zero fill: ZEROPAGE of 16, then each written: a page",
                Box::new(fill(16, false, true)),
            ),
            ("zero fill: COPY of 16, then each written: a page", Box::new(fill(16, true, true))),
        ],
    )
}

/// The start, whose time must not depend on the size.
fn starts(rounds: usize) -> Vec<Figure> {
    let start = |bytes: usize, slices: usize| {
        move || {
            let memory = Memory::map(bytes);
            let source = support::source_of(bytes / PAGE, |_, _| Ok(()));
            let builder = Pager::builder(source).region(memory.whole()).slices(slices);
            let begin = Instant::now();
            let pager = builder.start().expect("it starts");
            let took = begin.elapsed().as_nanos() as f64;
            drop(pager);
            vec![took]
        }
    };
    alternate(
        rounds * 5,
        vec![
            ("start: 64 MiB, 1 slice", Box::new(start(64 << 20, 1))),
            ("start: 16 GiB, 1 slice", Box::new(start(16 << 30, 1))),
            ("start: 16 GiB, 4 slices", Box::new(start(16 << 30, 4))),
        ],
    )
}

type Contender<'a> = (&'a str, Box<dyn Fn() -> Vec<f64> + Send + Sync>);

/// Runs each contender once in each round, in a new thread, so that none inherits an affinity.
fn alternate(rounds: usize, contenders: Vec<Contender<'_>>) -> Vec<Figure> {
    let mut of_rounds: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); contenders.len()];
    for _ in 0..rounds {
        for ((_, run), (medians, means)) in contenders.iter().zip(&mut of_rounds) {
            let times = thread::scope(|scope| scope.spawn(run).join().expect("it runs"));
            means.push(times.iter().sum::<f64>() / times.len() as f64);
            medians.push(median(times));
        }
    }
    contenders
        .iter()
        .zip(of_rounds)
        .map(|((what, _), (medians, means))| Figure {
            what: (*what).to_owned(),
            p50_ns: median(medians),
            mean_ns: median(means),
        })
        .collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Touches all pages in a random order. Returns the nanoseconds of each.
fn touch_each(memory: &Memory) -> Vec<f64> {
    let order = shuffled(PAGES, 17);
    let mut times = Vec::with_capacity(PAGES);
    for page in order {
        let begin = Instant::now();
        let word = memory.read_u64(page * PAGE);
        times.push(begin.elapsed().as_nanos() as f64);
        assert_eq!(word, stamp(page));
    }
    times
}

fn register(memory: &Memory) -> Uffd {
    let uffd = Uffd::open(Features::EVENT_REMOVE, Features::NONE).expect("checked in main");
    // SAFETY: the mapping outlives the userfaultfd in all callers, and has no references into it.
    unsafe { uffd.register(memory.addr(), memory.len() as u64) }.expect("anonymous memory");
    uffd
}

/// The bare loop in its thread. Dropping this stops it.
struct Bare {
    stop: Option<io::PipeWriter>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Bare {
    fn start(memory: &Memory, file: &Arc<File>, pinned: Option<usize>) -> Bare {
        let uffd = register(memory);
        let (stopped, stop) = io::pipe().expect("a pipe");
        let (file, start) = (Arc::clone(file), memory.addr());
        let thread = thread::spawn(move || {
            pin(pinned);
            let (mut batch, mut page) = (MessageBatch::new(), vec![0; PAGE]);
            while uffd.wait(stopped.as_fd()).expect("poll") == Wait::Readable {
                uffd.read(&mut batch).expect("read");
                for message in batch.messages() {
                    let Message::Pagefault { address, .. } = message else {
                        continue;
                    };
                    let offset = (address - start) & !(PAGE as u64 - 1);
                    file.read_exact_at(&mut page, offset).expect("pread");
                    // SAFETY: the fault was in `memory`, which is registered with it.
                    unsafe { uffd.copy(start + offset, &page) }.expect("UFFDIO_COPY");
                }
            }
        });
        Bare { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the loop does not panic");
        }
    }
}

fn pin(cpu: Option<usize>) {
    let Some(cpu) = cpu else { return };
    // SAFETY: all zero bits are an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the benchmark only asks for CPU 0.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the calling thread, and a valid set of that size.
    let result = unsafe { libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// A raw file as a source, in aligned chunks.
struct FileSource {
    file: Arc<File>,
    chunk_pages: usize,
}

struct FileReader {
    file: Arc<File>,
    buffer: Vec<u8>,
    pages: Vec<LoadedPage>,
}

impl PageSource for FileSource {
    fn reader(&self, _page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        Ok(Box::new(FileReader {
            file: Arc::clone(&self.file),
            buffer: vec![0; self.chunk_pages * PAGE],
            pages: Vec::with_capacity(self.chunk_pages),
        }))
    }

    fn len_bytes(&self) -> u64 {
        (PAGES * PAGE) as u64
    }
}

impl PageReader for FileReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        let begin = Instant::now();
        let start = source_offset - source_offset % self.buffer.len() as u64;
        self.file
            .read_exact_at(&mut self.buffer, start)
            .map_err(|error| SourceError::permanent("pread").caused_by(error))?;
        self.pages.clear();
        self.pages.extend((0..self.buffer.len()).step_by(PAGE).map(|buffer_offset| LoadedPage {
            source_offset: start + buffer_offset as u64,
            buffer_offset,
        }));
        let cost = LoadCost {
            read_ns: begin.elapsed().as_nanos() as u64,
            bytes_read: self.buffer.len() as u64,
            ..LoadCost::default()
        };
        Ok(Load::Pages(LoadedPages { bytes: &self.buffer, pages: &self.pages, cost }))
    }
}
