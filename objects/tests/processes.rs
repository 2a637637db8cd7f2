//! Processes with one cache: each block is fetched once, whenever they start, and whichever of them are killed.

mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use support::fake::{Fake, Received, whole_times_sent};
use support::processes::{Process, Reading};
use support::{Bench, push_chain};

/// 16 MiB.
const PAGES: usize = 4096;
const PROCESSES: usize = 8;

/// The processes of these tests.
#[test]
#[ignore = "the other tests start it"]
fn reader() {
    support::processes::read();
}

struct Setup {
    bench: Bench,
    memory: std::path::PathBuf,
}

impl Setup {
    /// Three layers, by a name and by the object of the top one.
    fn layers(fake: Fake) -> (Self, String) {
        let mut bench = Bench::with(PAGES, fake);
        let (object, memory) = push_chain(&bench, 3);
        bench.memory = memory;
        let memory = bench.folder.path().join("memory");
        std::fs::write(&memory, &bench.memory).expect("it is written");
        bench.fake.take_received();
        (Self { bench, memory }, object)
    }

    fn start(&self, path: &str, cache: &Path, pages: &[u32]) -> Process {
        let url = self.bench.fake.url(path);
        let reading =
            Reading { url: &url, cache, cache_bytes: 1 << 30, memory: &self.memory, pages };
        reading.start()
    }
}

fn of_bodies(received: &[Received]) -> u64 {
    let gets = received.iter().filter(|one| one.method == "GET" && one.status < 300);
    gets.map(|one| one.range.end - one.range.start).sum()
}

#[test]
fn processes_that_open_at_the_same_moment_fetch_each_block_once() {
    let (setup, object) = Setup::layers(Fake::start(Duration::from_millis(5)));
    let every: Vec<u32> = (0..PAGES as u32).step_by(16).collect();
    for opened in ["/bucket/guest", &object] {
        let cache = tempfile::tempdir().expect("a folder");
        let mut all: Vec<_> =
            (0..PROCESSES).map(|_| setup.start(opened, cache.path(), &every)).collect();
        all.iter_mut().for_each(Process::release);
        all.into_iter().for_each(Process::succeed);
        let received = setup.bench.fake.take_received();
        let objects: Vec<_> = setup.bench.fake.paths();
        let mut blocks = 0;
        for path in objects.iter().filter(|path| path.ends_with(".snap")) {
            let times = whole_times_sent(&received, path, setup.bench.fake.len_bytes(path));
            // Without a length from a name, all of a short object is in both of the first two answers.
            let most = if *path == object && opened == object { 2 } else { 1 };
            assert!(times.values().all(|times| *times <= most), "{path}: {times:?} {received:?}");
            blocks += times.len();
        }
        // The base has 128 blocks of pages. Its index and each layer are one more, but the top one is in the name.
        assert!((130..=136).contains(&blocks), "{blocks} blocks");
        // Beyond that: the part of a block, the names or lists, and 4 KiB of each object for each process, which show
        // its version.
        let needed = 17 << 20;
        let most = needed + (512 << 10) + (PROCESSES * 5 * 4096) as u64;
        assert!(of_bodies(&received) <= most, "{} bytes", of_bodies(&received));
    }
}

#[test]
fn a_process_that_is_killed_while_it_writes_the_cache_leaves_it_usable() {
    // 32 MB/s: half a second for all.
    let (setup, _) = Setup::layers(Fake::with_link(Duration::from_millis(1), 32 << 20));
    let kills: u32 =
        std::env::var("SNAP_KILLS").map_or(12, |kills| kills.parse().expect("a number"));
    let all: Vec<u32> = (0..PAGES as u32).collect();
    let cache = tempfile::tempdir().expect("a folder");
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    let mut killed = 0;
    for _ in 0..kills {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let mut reader = setup.start("/bucket/guest", cache.path(), &all);
        reader.release();
        std::thread::sleep(Duration::from_millis(20 + random % 250));
        reader.0.kill().expect("it can be signalled");
        let status = reader.0.wait().expect("it ends");
        // It has never read a wrong byte: then it would have ended before.
        assert!(status.signal() == Some(9) || status.success(), "{status}");
        killed += u32::from(status.signal() == Some(9));
        if status.success() {
            // All is cached: begin with an empty cache.
            std::fs::remove_dir_all(cache.path()).expect("it can be removed");
        }
    }
    assert!(killed * 2 >= kills, "{killed} of {kills} were killed");
    let mut last = setup.start("/bucket/guest", cache.path(), &all);
    last.release();
    last.succeed();
}
