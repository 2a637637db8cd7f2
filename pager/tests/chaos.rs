//! Random combinations: faults, writes, removals, population, errors of the source, stops and starts.
//! Every page that is read is checked by its content.
//!
//!     SNAP_CHAOS_SECONDS=600 SNAP_CHAOS_SEED=7 cargo test -p snapvm-pager --release --test chaos -- --nocapture
#![allow(missing_docs)]

#[path = "support/deferred.rs"]
mod deferred;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use deferred::Deferred;
use pager::{Pager, Placement, Populate, Population, RetryPolicy, SourceError};
use support::{
    Memory, PAGE, Random, chaos_seed, is_lost, number_from_env, rss_kib, source_of, stamp,
    userfaultfd_works, watchdog,
};

const PAGES: usize = 1536;
const THREADS: usize = 4;
/// After this number of pagers, the memory of this process grows no more, except for its allocator.
const WARM: u64 = 8;
const KEPT_KIB: u64 = 4096;

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("proc").count()
}

/// The kind of a page of the source: most are stamped, some are zero, some are lost.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Stamped,
    Zero,
    Lost,
}

fn kind(page: usize, with_lost: bool) -> Kind {
    match page {
        page if with_lost && is_lost(page) => Kind::Lost,
        page if page % 97 < 20 => Kind::Zero,
        _ => Kind::Stamped,
    }
}

/// The pages come from another host for every second seed.
fn source(with_lost: bool, seed: u64) -> Arc<dyn pager::PageSource> {
    let source = near(with_lost, seed);
    if seed.is_multiple_of(2) { Arc::new(Deferred::new(source, seed)) } else { source }
}

fn near(with_lost: bool, seed: u64) -> Arc<dyn pager::PageSource> {
    let calls = Arc::new(AtomicU64::new(seed));
    source_of(PAGES, move |offset, answer| {
        let page = offset as usize / PAGE;
        let call = calls.fetch_add(1, Ordering::Relaxed);
        if call.is_multiple_of(50) {
            return Err(SourceError::transient("injected"));
        }
        match kind(page, with_lost) {
            Kind::Lost => return Err(SourceError::permanent("injected")),
            Kind::Zero => answer.zero(offset..offset + PAGE as u64),
            Kind::Stamped => {
                // The block of the page, and some pages from far away.
                let block = page - page % 16;
                let around =
                    (block..block + 16).chain((0..6).map(|i| (page * 7 + i * 211) % PAGES));
                answer.push(page);
                around
                    .filter(|&other| other != page && kind(other, with_lost) == Kind::Stamped)
                    .for_each(|other| answer.push(other));
            }
        }
        Ok(())
    })
}

/// What a thread expects of a page that only this thread writes to or removes.
#[derive(Clone, Copy)]
struct Known {
    word: u64,
    byte: u8,
}

/// Works on every `THREADS`th page until the deadline. Returns how many pages it has checked.
fn work(memory: &Memory, own: usize, with_lost: bool, seed: u64, until: Instant) -> u64 {
    let mut random = Random::new(seed);
    let mut known: Vec<Option<Known>> = vec![None; PAGES];
    let mut checked = 0;
    // A calm thread leaves pages for the population.
    let calm = seed.is_multiple_of(2);
    while Instant::now() < until {
        if calm {
            thread::sleep(Duration::from_millis(8));
        }
        for _ in 0..if calm { 2 } else { 64 } {
            let page = random.below(PAGES / THREADS) * THREADS + own;
            let source = kind(page, with_lost);
            let lost = source == Kind::Lost && known[page].is_none();
            let word = if source == Kind::Stamped { stamp(page) } else { 0 };
            let was = known[page].unwrap_or(Known { word, byte: (word >> 24) as u8 });
            match random.below(8) {
                0 => {
                    memory.remove(page, 1);
                    known[page] = Some(Known { word: 0, byte: 0 });
                }
                1 if !lost => {
                    let byte = random.next() as u8;
                    memory.write(page * PAGE + 3003, byte);
                    known[page] = Some(Known { word: was.word, byte });
                    checked += 1;
                }
                _ if lost => {
                    let error = memory.read_by_syscall(page).expect_err("a lost page was read");
                    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
                    checked += 1;
                }
                _ => {
                    assert_eq!(memory.read_u64(page * PAGE), was.word, "page {page}");
                    if known[page].is_some() {
                        assert_eq!(memory.read(page * PAGE + 3003), was.byte, "page {page}");
                    }
                    checked += 1;
                }
            }
        }
    }
    // At the end, all pages that can be loaded are checked once more.
    for page in (own..PAGES).step_by(THREADS) {
        let source = kind(page, with_lost);
        if source == Kind::Lost && known[page].is_none() {
            continue;
        }
        let word = if source == Kind::Stamped { stamp(page) } else { 0 };
        assert_eq!(memory.read_u64(page * PAGE), known[page].map_or(word, |k| k.word), "{page}");
        checked += 1;
    }
    checked
}

#[test]
fn chaos() {
    if !userfaultfd_works("chaos") {
        return;
    }
    let seconds = number_from_env("SNAP_CHAOS_SECONDS").unwrap_or(4);
    let seed = chaos_seed();
    eprintln!("chaos: {seconds} s, SNAP_CHAOS_SEED={seed}");
    let mut random = Random::new(seed);
    let files = open_files();
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut warm_kib, steps) = (None, watchdog());
    let (mut pagers, mut checked, mut populated, mut poisoned, mut retries) = (0u64, 0, 0, 0, 0);
    while pagers == 0 || Instant::now() < end {
        steps.send("a pager's life").expect("the watchdog lives");
        let with_lost = random.below(2) == 0;
        let memory = Memory::map(PAGES * PAGE);
        let populate =
            [Populate::Off, Populate::Auto, Populate::Idle, Populate::Full][random.below(4)];
        let placement = [Placement::Follow, Placement::None, Placement::Spin][random.below(3)];
        let retry =
            RetryPolicy { first_pause: Duration::from_micros(100), ..RetryPolicy::default() };
        // Two regions, at random in the other order in the source.
        let half = PAGES / 2;
        let pager = Pager::builder(source(with_lost, random.next() % 50))
            .region(memory.region(0, half, 0))
            .region(memory.region(half, half, (half * PAGE) as u64))
            .slices(1 + random.below(3))
            .populate(populate)
            .populate_threads(1 + random.below(2))
            .placement(placement)
            .retry(retry)
            .start()
            .expect("it starts");
        let until = Instant::now() + Duration::from_millis(20 + random.below(300) as u64);
        let seeds: Vec<u64> = {
            let all_calm = random.below(2) as u64;
            (0..THREADS).map(|_| random.next() & !1 | all_calm).collect()
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|own| {
                    let (memory, seed) = (&memory, seeds[own]);
                    scope.spawn(move || work(memory, own, with_lost, seed, until))
                })
                .collect();
            for thread in threads {
                checked += thread.join().expect("all pages are right");
            }
        });
        let stop_early = random.below(3) == 0;
        if matches!(populate, Populate::Idle | Populate::Full) && !stop_early {
            let state = pager.wait_complete(Duration::from_secs(60));
            assert_ne!(state, Population::Running, "it hangs");
            assert!(with_lost || state == Population::Complete, "{state:?}");
        }
        let stats = pager.stop();
        let pages = stats.pages;
        assert_eq!(pages.total, pages.missing + pages.present + pages.removed + pages.poisoned);
        assert!(with_lost || pages.poisoned == 0, "{stats:?}");
        pagers += 1;
        if pagers == WARM {
            warm_kib = Some(rss_kib());
        }
        populated += stats.installed.populated;
        poisoned += pages.poisoned;
        retries += stats.source_retries;
    }
    eprintln!(
        "chaos: {pagers} pagers, {checked} pages checked, {populated} populated, {poisoned} poisoned, {retries} retries"
    );
    // The thread of a source that waits for another host may hold the descriptor of an ended pager for a moment: it is in
    // the callback of a page that the pager does not wait for any more.
    let begun = Instant::now();
    while open_files() != files && begun.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(open_files(), files, "descriptors leaked");
    let (now_kib, warm_kib) = (rss_kib(), warm_kib.unwrap_or(u64::MAX));
    assert!(now_kib <= warm_kib.saturating_add(KEPT_KIB), "from {warm_kib} to {now_kib} KiB");
}
