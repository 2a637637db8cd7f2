//! The simulator of docs/fleet.md: what it predicts is what processes fetch, and what the text shows is what it prints.

#[path = "../examples/fleet/model.rs"]
#[allow(dead_code, reason = "shared with the example")]
mod model;
#[path = "../examples/fleet/report.rs"]
#[allow(dead_code, reason = "shared with the example")]
mod report;
mod support;

use std::time::Duration;

use model::{Caches, Fleet, From, Placement, Trace, simulate};
use support::fake::{BLOCK_BYTES, Fake, Received};
use support::processes::{Process, Reading};
use support::{memory, write};

/// 16 MiB: 128 blocks, and the index.
const PAGES: usize = 4096;
/// Pages of five blocks that are not in the first answers, and that do not look like a stream.
const HOT: [u32; 5] = [10 * 64, 20 * 64, 30 * 64, 40 * 64, 50 * 64];
/// The first 256 KiB, the last 1.125 MiB, and these blocks.
const START_BYTES: u64 = (256 << 10) + (9 << 17) + HOT.len() as u64 * BLOCK_BYTES;
const STARTS: u64 = 10;

/// The processes of these tests.
#[test]
#[ignore = "the other tests start it"]
fn reader() {
    support::processes::read();
}

/// A server with some snapshots.
struct Bucket {
    fake: Fake,
    folder: tempfile::TempDir,
}

impl Bucket {
    fn new(images: u32) -> Self {
        let (fake, folder) = (Fake::start(Duration::from_millis(5)), tempfile::tempdir().unwrap());
        for image in 0..images {
            let pages = memory(PAGES, u64::from(image) + 11);
            std::fs::write(folder.path().join(format!("memory-{image}")), &pages).unwrap();
            let file = write(folder.path(), "guest.snap", &pages);
            fake.put(&format!("/bucket/{image}"), std::fs::read(&file).unwrap());
            std::fs::remove_file(file).unwrap();
        }
        Self { fake, folder }
    }

    /// A process of a host: hosts share no cache.
    fn start(&self, image: u32, host: u32) -> Process {
        let reading = Reading {
            url: &self.fake.url(&format!("/bucket/{image}")),
            cache: &self.folder.path().join(format!("host-{host}")),
            cache_bytes: 1 << 30,
            memory: &self.folder.path().join(format!("memory-{image}")),
            pages: &HOT,
        };
        reading.start()
    }

    fn sent_bytes(&self) -> u64 {
        let of = |one: &Received| match one.method.as_str() {
            "GET" => one.range.end - one.range.start,
            _ => 0,
        };
        self.fake.take_received().iter().map(of).sum()
    }
}

#[test]
fn ten_processes_fetch_what_the_model_predicts() {
    for (hosts, images) in [(1, 1), (1, 4), (3, 4), (10, 1)] {
        let fleet = Fleet {
            hosts,
            images,
            starts: Some(STARTS),
            hot_bytes: START_BYTES,
            cache_bytes: 1 << 30,
            ..Fleet::default()
        };
        let bucket = Bucket::new(images);
        let (mut trace, mut caches) = (Trace::new(&fleet), Caches::new(&fleet));
        for number in 0..STARTS {
            let start = trace.next();
            let predicted = match caches.start(start) {
                From::Bucket => START_BYTES,
                From::Host | From::Zone => 0,
            };
            let mut process = bucket.start(start.image, start.host);
            process.release();
            process.succeed();
            assert_eq!(
                bucket.sent_bytes(),
                predicted,
                "{start:?}, the start {number} of {fleet:?}"
            );
        }
    }
}

#[test]
fn processes_that_start_at_the_same_moment_fetch_as_much_as_one() {
    let bucket = Bucket::new(1);
    let mut all: Vec<_> = (0..STARTS).map(|_| bucket.start(0, 0)).collect();
    all.iter_mut().for_each(Process::release);
    all.into_iter().for_each(Process::succeed);
    // A process that has to wait for another one asks for 4 KiB, which show the version of the object.
    let sent = bucket.sent_bytes();
    assert!((START_BYTES..=START_BYTES + STARTS * 4096).contains(&sent), "{sent} bytes");
}

#[test]
fn the_model_agrees_with_its_formula_and_with_itself() {
    let fleet = Fleet { hosts: 200, zone: Some((100, 16_000_000_000)), ..Fleet::default() };
    let result = simulate(&fleet);
    assert_eq!(result, simulate(&fleet), "the same seed gives the same result");
    let (host, zone) = (result.host_hits, result.zone_hits);
    let by_formula = fleet.starts_s() * fleet.hot_bytes as f64 * (1.0 - host) * (1.0 - zone) / 1e9;
    let simulated = fleet.gigabytes_s(result.bucket_bytes, result.counted);
    assert!((by_formula - simulated).abs() < 1e-6, "{by_formula} {simulated}");
    // One that stays where its snapshots are cached finds more of them.
    let affine = simulate(&Fleet { placement: Placement::Affine, ..fleet.clone() });
    assert!(affine.host_hits > host + 0.2, "{} {host}", affine.host_hits);
    let other = simulate(&Fleet { seed: 2, ..fleet });
    assert!(other != result && (other.host_hits - host).abs() < 0.02, "{other:?} {result:?}");
}

#[test]
fn the_text_shows_what_the_simulator_prints() {
    let text = std::fs::read_to_string("../docs/fleet.md").expect("it is there");
    // A line of 10,000 hosts takes many times as long.
    for line in report::tables(&Fleet::default(), &[1, 10, 100, 1000]).lines() {
        assert!(text.contains(line), "docs/fleet.md does not have the line\n{line}");
    }
}
