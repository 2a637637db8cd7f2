//! The working set of a trained snapshot: how much of the link its pages use, and how many other bytes come with them.

use std::collections::HashSet;
use std::path::Path;

use snapfmt::{PageEntry, PageIndex, Snapshot};

use crate::fake::{Fake, Received};
use crate::{Amount, Bound, LATENCY, LINK, line, snap};

const KEY: &str = "/bucket/hot.snap";

pub(crate) fn measure(amount: Amount) {
    let folder = tempfile::tempdir().unwrap();
    let [memory, work] = amount.hot_guest;
    let guest = ["--memory", memory, "--work", work, "--codec", "lz4"];
    let file = snap::create(folder.path(), "guest", &guest);
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (trained, optimized) = (path("trained"), path("optimized"));
    let file = file.to_str().unwrap();
    snap::run(
        folder.path(),
        &["train", "--quiet", file, "--out", &trained, "--runs", "1", "--beats", "1"],
    );
    snap::run(folder.path(), &["optimize", "--quiet", &trained, "--out", &optimized]);

    for (what, file) in [("trained", &trained), ("optimized", &optimized)] {
        let fake = Fake::with_link(LATENCY, LINK);
        fake.put(KEY, std::fs::read(file).unwrap());
        let cache = tempfile::tempdir().unwrap();
        snap::restore(cache.path(), &fake.url(KEY), &["--populate", "off"]);
        let received: Vec<Received> =
            fake.take_received().into_iter().filter(|one| one.method == "GET").collect();
        let fetched: u64 = received.iter().map(|one| one.range.end - one.range.start).sum();
        if std::env::var_os("TIMELINE").is_some() {
            let first = received.iter().map(|one| one.started).min().unwrap();
            for one in &received {
                eprintln!(
                    "{:8.1} {:8.1} {:10} {:8}",
                    (one.started - first).as_secs_f64() * 1e3,
                    (one.ended - first).as_secs_f64() * 1e3,
                    one.range.start / 1024,
                    (one.range.end - one.range.start) / 1024
                );
            }
        }
        let needed = needed_bytes(Path::new(file));
        line(&format!("working set, {what}: bytes needed"), needed as f64 / 1e6, "MB", None);
        let beyond = (fetched as f64 / needed as f64 - 1.0) * 100.0;
        line("  bytes beyond those", beyond, "%", Some(Bound::AtMost(15.0)));
        let share = share_of_link(&received) * 100.0;
        line("  share of the link's bandwidth", share, "%", Some(Bound::AtLeast(90.0)));
    }
    println!();
}

/// The share of the link that answers used, from the first byte that could come to the last one.
fn share_of_link(received: &[Received]) -> f64 {
    let started = received.iter().map(|one| one.started).min().unwrap() + LATENCY;
    let ended = received.iter().map(|one| one.ended).max().unwrap();
    let bytes: u64 = received.iter().map(|one| one.range.end - one.range.start).sum();
    bytes as f64 / (LINK as f64 * ended.duration_since(started).as_secs_f64())
}

/// The chunks that contain pages of the working set, and all of the file that is not chunks.
fn needed_bytes(file: &Path) -> u64 {
    let snapshot = Snapshot::open(file).unwrap();
    let set = snapshot.working_set().unwrap().unwrap();
    let mut chunks = HashSet::new();
    for (page, _) in set.pages() {
        if let PageEntry::Data { chunk, .. } = snapshot.entry(page).unwrap() {
            chunks.insert((chunk.offset(), chunk.end()));
        }
    }
    let of_chunks: u64 = chunks.iter().map(|(start, end)| end - start).sum();
    let all_chunks: HashSet<(u64, u64)> = (0..snapshot.header().pages() as u32)
        .filter_map(|page| match snapshot.entry(PageIndex(page)).unwrap() {
            PageEntry::Data { chunk, .. } => Some((chunk.offset(), chunk.end())),
            _ => None,
        })
        .collect();
    let rest: u64 = all_chunks.iter().map(|(start, end)| end - start).sum();
    of_chunks + snapshot.header().file_bytes - rest
}
