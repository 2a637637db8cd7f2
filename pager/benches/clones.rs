//! The cost of pages for the first clone of a snapshot, and for the others.
//!
//!     cargo bench -p snapvm-pager --features serve,vm-memory --bench clones
//!
//! Each clone is a process. It requests the shared file from the server, maps it, and touches all of it once in random
//! order. A round has a new server with an empty file, and fifty clones, one after the other. All of them live until
//! the end of the round. Results are medians over the rounds.
#![allow(unsafe_code)]

#[path = "../tests/support/snapshot.rs"]
mod snapshot;
#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use pager::serve::{ServeOptions, Server, SnapshotName};
use pager::shared::{ANSWER_TIMEOUT, SharedClone};
use pager::{PageSource, SnapshotSource, VecSource};
use snapfmt::Codec;
use support::{PAGE, shuffled, stamp};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// The settings that make this binary a clone: the action, the number of pages, the socket.
const CLONE: &str = "PAGER_BENCH_CLONE";

struct Bench {
    rounds: usize,
    clones: usize,
    pages: usize,
}

fn main() {
    if let Ok(words) = std::env::var(CLONE) {
        return clone(&words);
    }
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let full = std::env::args().any(|arg| arg == "--bench");
    if !support::userfaultfd_works("bench clones") {
        return;
    }
    let bench = match full {
        true => Bench { rounds: 5, clones: 50, pages: 64 << 8 },
        false => Bench { rounds: 1, clones: 2, pages: 1 << 8 },
    };
    let folder = tempfile::tempdir().expect("a folder");
    let content = snapshot::content(bench.pages);
    let zstd = SnapshotSource::new(snapshot::stored(folder.path(), &content, Codec::Zstd));
    let lz4 = SnapshotSource::new(snapshot::stored(folder.path(), &content, Codec::Lz4));
    let at_hand = VecSource::new(content, 16 * PAGE);
    println!(
        "{} MiB, us a page{:25} {:>8} {:>8} {:>8} {:>7}",
        bench.pages >> 8,
        "",
        "1st",
        "others",
        "slowest",
        "ratio"
    );
    for (what, source) in [
        ("nothing to decode", Arc::new(at_hand) as Arc<dyn PageSource>),
        ("lz4", Arc::new(lz4)),
        ("zstd", Arc::new(zstd)),
    ] {
        for act in ["read", "write"] {
            bench.row(&format!("{what}, {act}"), act, &source);
        }
    }
}

impl Bench {
    fn row(&self, what: &str, act: &str, source: &Arc<dyn PageSource>) {
        let rounds: Vec<[f64; 4]> = (0..self.rounds).map(|_| self.round(act, source)).collect();
        let [first, others, slowest, ratio] =
            [0, 1, 2, 3].map(|at| median(rounds.iter().map(|round| round[at]).collect()));
        println!("{what:<40} {first:>8.3} {others:>8.3} {slowest:>8.3} {ratio:>6.3}x");
    }

    /// The first clone, the median and the slowest of the others, and the ratio of the median to the first.
    fn round(&self, act: &str, source: &Arc<dyn PageSource>) -> [f64; 4] {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("s");
        let mut options = ServeOptions::default();
        options.share = Some(name(self.pages));
        let server = Server::bind(&socket, Arc::clone(source), options, |_| {}).expect("it binds");
        let (stopped, stop) = std::io::pipe().expect("a pipe");
        let serving = thread::spawn(move || server.run(stopped.as_fd()).expect("it can poll"));
        let mut clones = Vec::new();
        let mut times: Vec<f64> = (0..self.clones)
            .map(|_| {
                let (clone, time) = Clone::touch(act, self.pages, &socket);
                clones.push(clone);
                time
            })
            .collect();
        drop((clones, stop));
        serving.join().expect("the server does not panic");
        let first = times.remove(0);
        let slowest = times.iter().copied().fold(0.0, f64::max);
        let others = median(times);
        [first, others, slowest, others / first]
    }
}

fn name(pages: usize) -> SnapshotName {
    SnapshotName { layers: vec!["bench".into()], memory_bytes: (pages * PAGE) as u64 }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The process of a clone, as the benchmark sees it. Dropping this ends it.
struct Clone(Child);

impl Clone {
    /// A clone that has touched all of its memory, and the time for that in us per page.
    fn touch(act: &str, pages: usize, socket: &Path) -> (Clone, f64) {
        let mut child = Command::new(std::env::current_exe().expect("this benchmark"))
            .env(CLONE, format!("{act} {pages} {}", socket.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("it prints a line");
        (Clone(child), line.trim_end().parse().expect("a number"))
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().expect("it ends").success());
    }
}

/// The process of a clone.
fn clone(words: &str) {
    let mut words = words.splitn(3, ' ');
    let mut word = || words.next().expect("three words");
    let (act, pages, socket): (_, usize, _) =
        (word(), word().parse().expect("a number"), PathBuf::from(word()));
    let ranges = [(GuestAddress(0), pages * PAGE, 0)];
    let (clone, memory) =
        SharedClone::start(&socket, &name(pages), &ranges, ANSWER_TIMEOUT, |why| {
            eprintln!("{why}");
            std::process::abort();
        })
        .expect("the server shares");
    let memory_start = memory.iter().next().expect("one region").as_ptr();
    let order = shuffled(pages, u64::from(std::process::id()));
    let begin = Instant::now();
    for page in order {
        let at = memory_start.wrapping_add(page * PAGE);
        if act == "write" {
            // SAFETY: inside the mapping.
            unsafe { at.wrapping_add(8).write_volatile(1) };
        }
        // SAFETY: inside the mapping, and aligned.
        assert_eq!(unsafe { at.cast::<u64>().read_volatile() }, stamp(page));
    }
    println!("{}", begin.elapsed().as_nanos() as f64 / 1e3 / pages as f64);
    // Until the benchmark closes the pipe.
    std::io::stdin().read_to_end(&mut Vec::new()).expect("it can be read");
    drop(clone);
}
