//! Memory that is put back to the content of the source, in place.
#![allow(missing_docs)]

mod support;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use pager::window::WindowOptions;
use pager::{Pager, PagerBuilder, Populate, Population, ResetError, VecSource};
use support::{Memory, PAGE, Random, source_of, stamp, stamped, userfaultfd_works};

const LONG: Duration = Duration::from_secs(60);

fn builder(memory: &Memory, pages: usize) -> PagerBuilder {
    Pager::builder(Arc::new(VecSource::new(stamped(pages), 16 * PAGE))).region(memory.whole())
}

fn pages(range: Range<u64>) -> Range<u64> {
    range.start * PAGE as u64..range.end * PAGE as u64
}

#[track_caller]
fn is_as_in_the_source(memory: &Memory, pages: Range<usize>) {
    pages.for_each(|page| assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}"));
}

#[test]
fn written_and_removed_pages_are_loaded_again_and_others_stay() {
    if !userfaultfd_works("written_and_removed_pages_are_loaded_again_and_others_stay") {
        return;
    }
    for slices in [1, 3] {
        let memory = Memory::map(2048 * PAGE);
        let pager = builder(&memory, 2048).slices(slices).start().expect("it starts");
        (0..64).for_each(|page| memory.write(page * PAGE, 0xee));
        memory.write(1500 * PAGE, 0xee);
        memory.remove(32, 64);
        // After it, the removal is in the statistics.
        pager.touched();
        let before = pager.stats();
        // Page 7 was written to, and is not given.
        let written = [pages(0..7), pages(8..96), pages(1000..1001), pages(1500..1501)];
        let bytes = pager.reset(Some(&written)).expect("it is reset");
        // Of the chunk from page 1488 on, the others stay. Page 1000 was never loaded.
        assert_eq!(bytes, (7 + 88 + 1) * PAGE as u64);
        let pages = pager.stats().pages;
        assert_eq!(pages.missing, before.pages.missing + 96);
        assert_eq!((pages.removed, pages.poisoned), (0, 0));
        assert_eq!(memory.read_u64(7 * PAGE) & 0xff, 0xee, "nothing was known of it");
        is_as_in_the_source(&memory, 0..7);
        is_as_in_the_source(&memory, 8..2048);
        // All of it.
        (0..2048).for_each(|page| memory.write(page * PAGE, 0xdd));
        assert_eq!(pager.reset(None).expect("it is reset"), 2048 * PAGE as u64);
        assert_eq!(pager.stats().pages.missing, 2048);
        assert!(pager.touched().is_empty());
        is_as_in_the_source(&memory, 0..2048);
        assert!(pager.failure().is_none());
        pager.stop();
    }
}

/// The kernel fills pages of memory that is not registered, without the pager's knowledge. After a reset they are the
/// pager's again: a write to them is one to a page that was touched.
#[test]
fn memory_that_was_let_go_is_registered_again() {
    if !userfaultfd_works("memory_that_was_let_go_is_registered_again") {
        return;
    }
    let memory = Memory::map(256 * PAGE);
    let mut content = stamped(256);
    content[96 * PAGE..208 * PAGE].fill(0);
    let source = Arc::new(VecSource::new(content, 16 * PAGE));
    let builder = Pager::builder(source).region(memory.whole());
    let pager = builder.populate(Populate::Full).start().expect("it starts");
    assert_eq!(pager.wait_complete(LONG), Population::Complete);
    assert_eq!(memory.read_u64(150 * PAGE), 0);
    memory.write(120 * PAGE, 1);
    memory.write(20 * PAGE, 1);
    pager.reset(Some(&[pages(20..21), pages(120..121)])).expect("it is reset");
    assert_eq!(pager.population(), Population::Reset);
    // Windows can be opened again.
    let read = Arc::new(|_: u64, _: &mut [u8]| Ok(()));
    match pager.window(read, WindowOptions::default()) {
        Ok(window) => {
            let error = pager.reset(None).expect_err("a window is open");
            assert!(matches!(error, ResetError::Busy), "{error}");
            drop(window);
        }
        Err(error) => assert!(error.to_string().contains("6.4"), "{error}"),
    }
    assert_eq!(pager.touched(), [pages(0..20), pages(21..96), pages(208..256)]);
    memory.write(150 * PAGE, 1);
    memory.write(20 * PAGE + 1, 1);
    let touched = pager.touched();
    assert!(touched.iter().any(|range| range.contains(&(150 * PAGE as u64))), "{touched:?}");
    pager.reset(Some(&[pages(20..21), pages(150..151)])).expect("it is reset");
    for page in 96..208 {
        assert_eq!(memory.read_u64(page * PAGE), 0, "page {page}");
    }
    is_as_in_the_source(&memory, 0..96);
    is_as_in_the_source(&memory, 208..256);
    pager.stop();
}

/// Loaders run during all of it, and their memory must not be let go with missing pages.
#[test]
fn resets_at_any_moment_of_a_population() {
    if !userfaultfd_works("resets_at_any_moment_of_a_population") {
        return;
    }
    const PAGES: usize = 2048;
    let mut random = Random::new(7);
    for round in 0..60 {
        let memory = Arc::new(Memory::map(PAGES * PAGE));
        let slices = 1 + round % 3;
        let start = builder(&memory, PAGES).slices(slices).populate(Populate::Full);
        let pager = start.start().expect("it starts");
        for _ in 0..4 {
            thread::sleep(Duration::from_micros(random.below(1500) as u64));
            // The guest runs, and writes to some pages.
            let mut written: Vec<usize> = (0..50).map(|_| random.below(PAGES)).collect();
            written.sort_unstable();
            written.dedup();
            thread::scope(|scope| {
                for half in written.chunks(written.len().div_ceil(2)) {
                    let memory = &memory;
                    scope.spawn(move || {
                        half.iter().for_each(|page| memory.write(page * PAGE + 9, 0xee));
                    });
                }
            });
            let ranges: Vec<_> =
                written.iter().map(|&page| pages(page as u64..page as u64 + 1)).collect();
            pager.reset(Some(&ranges)).expect("it is reset");
        }
        assert_eq!(pager.wait_complete(LONG), Population::Reset);
        let found: Vec<u64> = (0..PAGES).map(|page| memory.read_u64(page * PAGE)).collect();
        assert!(found == (0..PAGES).map(stamp).collect::<Vec<_>>(), "round {round}");
        assert!(pager.failure().is_none());
        pager.stop();
    }
}

/// Unregistering wakes threads that wait for a page, as workers of KVM may while the guest is paused. They fault again
/// while the memory is not registered, and the kernel fills their pages with zeros.
#[test]
fn pages_that_threads_wait_for_have_the_content_of_the_source() {
    if !userfaultfd_works("pages_that_threads_wait_for_have_the_content_of_the_source") {
        return;
    }
    const PAGES: usize = 4096;
    const LATE: Range<usize> = 4000..4096;
    for round in 0..4 {
        let delayed = Arc::new((AtomicUsize::new(0), AtomicBool::new(true)));
        let delays = Arc::clone(&delayed);
        let source = source_of(PAGES, move |offset, answer| {
            let page = offset as usize / PAGE;
            if LATE.contains(&page) {
                delays.0.fetch_add(1, Ordering::SeqCst);
                while delays.1.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            answer.push(page);
            Ok(())
        });
        let memory = Memory::map(PAGES * PAGE);
        let pager = Pager::builder(source).region(memory.whole()).slices(1 + round % 2);
        let pager = pager.start().expect("it starts");
        // Dropping them takes a while, in which nothing is registered.
        (0..LATE.start).for_each(|page| memory.write(page * PAGE + 9, 0xee));
        thread::scope(|scope| {
            for page in LATE.step_by(12) {
                let memory = &memory;
                scope.spawn(move || memory.read(page * PAGE));
            }
            while delayed.0.load(Ordering::SeqCst) == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            // The others have only to fault.
            thread::sleep(Duration::from_millis(50));
            pager.reset(Some(&[pages(0..LATE.start as u64)])).expect("it is reset");
            delayed.1.store(false, Ordering::SeqCst);
        });
        is_as_in_the_source(&memory, 0..PAGES);
        assert!(pager.failure().is_none());
        pager.stop();
    }
}
