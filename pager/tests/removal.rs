//! Pages that are given back (`MADV_DONTNEED`, as a balloon does) read as zero from then on.
#![allow(missing_docs)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pager::{Pager, VecSource};
use support::{Memory, PAGE, shuffled, source_of, stamp, stamped, userfaultfd_works};

#[test]
fn removed_pages_read_as_zero_whether_loaded_before_or_not() {
    if !userfaultfd_works("removed_pages_read_as_zero_whether_loaded_before_or_not") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let source = Arc::new(VecSource::new(stamped(64), PAGE));
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    (0..8).for_each(|page| assert_eq!(memory.read_u64(page * PAGE), stamp(page)));
    memory.remove(4, 8);
    for page in 4..12 {
        assert_eq!(memory.read_u64(page * PAGE), 0, "page {page}");
    }
    // The same page again, after it was zero, and after it was written to.
    memory.write(5 * PAGE, 1);
    memory.remove(4, 4);
    (4..8).for_each(|page| assert_eq!(memory.read_u64(page * PAGE), 0));
    assert_eq!(memory.read_u64(3 * PAGE), stamp(3));
    assert_eq!(memory.read_u64(12 * PAGE), stamp(12));
    memory.remove(20, 10);
    let stats = pager.stop();
    assert_eq!(stats.pages.removed, 10);
    assert_eq!(stats.pages.missing, 64 - 13 - 10);
    assert_eq!(stats.installed.demand, 9);
}

/// Threads that remove race with threads that touch, in overlapping chunks. The ioctls get `EAGAIN`, and faults
/// and REMOVEs come in any order. A page that a thread has removed, and that only this
/// thread removes or writes, is zero for it until it writes.
#[test]
fn a_storm_of_removals_never_brings_content_back() {
    if !userfaultfd_works("a_storm_of_removals_never_brings_content_back") {
        return;
    }
    const PAGES: usize = 2048;
    for slices in [1, 3] {
        let memory = Arc::new(Memory::map(PAGES * PAGE));
        let source = source_of(PAGES, |offset, answer| {
            // The whole block of 16 pages, and some far away, in other slices.
            let page = offset as usize / PAGE;
            let block = page - page % 16;
            answer.push(page);
            (block..block + 16).filter(|&other| other != page).for_each(|page| answer.push(page));
            (0..16).for_each(|i| answer.push((block * 7 + i * 31 + 1000) % PAGES));
            Ok(())
        });
        let pager = Pager::builder(source)
            .region(memory.whole())
            .slices(slices)
            .start()
            .expect("it starts");
        let stop = Arc::new(AtomicBool::new(false));
        let removals = Arc::new(AtomicUsize::new(0));
        // Each thread owns every third page.
        let owners: Vec<_> = (0..3)
            .map(|owner| {
                let (memory, removals) = (Arc::clone(&memory), Arc::clone(&removals));
                thread::spawn(move || {
                    let mut expected: Vec<Option<u8>> = vec![None; PAGES]; // None: the content of the source.
                    let begin = Instant::now();
                    let mut round = 0;
                    while begin.elapsed() < Duration::from_millis(1500) {
                        round += 1;
                        for page in shuffled(PAGES, owner as u64 * 1000 + round) {
                            if page % 3 != owner {
                                continue;
                            }
                            match (page + round as usize) % 4 {
                                0 => {
                                    memory.remove(page, 1);
                                    removals.fetch_add(1, Ordering::Relaxed);
                                    expected[page] = Some(0);
                                }
                                1 => {
                                    memory.write(page * PAGE + 99, 0x42);
                                    let want = expected[page].map_or(stamp(page), |_| 0);
                                    assert_eq!(memory.read_u64(page * PAGE), want, "page {page}");
                                    if expected[page].is_some() {
                                        expected[page] = Some(0x42);
                                    }
                                }
                                _ => {
                                    let want = expected[page].map_or(stamp(page), |_| 0);
                                    assert_eq!(memory.read_u64(page * PAGE), want, "page {page}");
                                    if let Some(byte) = expected[page] {
                                        assert_eq!(memory.read(page * PAGE + 99), byte);
                                    }
                                }
                            }
                        }
                    }
                })
            })
            .collect();
        // Another thread only reads: each word is either that of the source or zero.
        let looker = {
            let (memory, stop) = (Arc::clone(&memory), Arc::clone(&stop));
            thread::spawn(move || {
                let mut seed = 1;
                while !stop.load(Ordering::Relaxed) {
                    seed += 1;
                    for page in shuffled(PAGES, seed) {
                        let word = memory.read_u64(page * PAGE + 2048);
                        assert!(word == 0 || word == stamp(page), "page {page}: {word:#x}");
                    }
                }
            })
        };
        for owner in owners {
            owner.join().expect("no removed content came back");
        }
        stop.store(true, Ordering::Relaxed);
        looker.join().expect("no foreign content was seen");
        // Each owner has completed at least one round.
        assert!(removals.load(Ordering::Relaxed) >= PAGES / 4 - 3);
        let stats = pager.stop();
        let pages = stats.pages;
        assert_eq!(pages.total, pages.missing + pages.present + pages.removed + pages.poisoned);
        assert_eq!(pages.poisoned, 0);
    }
}
