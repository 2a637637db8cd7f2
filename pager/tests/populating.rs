//! Background population: all pages are loaded without being touched, and faults go first.
#![allow(missing_docs)]

mod support;

use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pager::{Pager, PagerBuilder, Populate, Population, SourceError, VecSource};
use support::{Memory, PAGE, shuffled, source_of, stamp, stamped, userfaultfd_works};

const PAGES: usize = 2048;
/// A hang guard.
const LONG: Duration = Duration::from_secs(60);

fn populating(
    source: Arc<dyn pager::PageSource>,
    memory: &Memory,
    populate: Populate,
) -> PagerBuilder {
    Pager::builder(source).region(memory.whole()).populate(populate)
}

/// After all pages are loaded, the file is truncated and deleted. The guest continues, also in pages that it never
/// touched, in zero pages, and in pages that it gives back.
#[test]
fn after_completion_the_source_is_not_needed() {
    if !userfaultfd_works("after_completion_the_source_is_not_needed") {
        return;
    }
    for (mode, slices, threads) in
        [(Populate::Full, 1, 1), (Populate::Full, 3, 2), (Populate::Idle, 2, 1)]
    {
        // The second half is zero.
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("pages");
        let mut file = File::create_new(&path).expect("a new file");
        file.write_all(&stamped(PAGES / 2)).expect("room for 4 MiB");
        let file = File::options().read(true).write(true).open(&path).expect("it is there");
        let shared = Arc::new(file);
        let reading = Arc::clone(&shared);
        let source = source_of(PAGES, move |offset, answer| {
            let page = offset as usize / PAGE;
            if page >= PAGES / 2 {
                answer.zero((PAGES / 2 * PAGE) as u64..(PAGES * PAGE) as u64);
                return Ok(());
            }
            for page in page - page % 8..page - page % 8 + 8 {
                let mut word = [0; 8];
                reading
                    .read_exact_at(&mut word, (page * PAGE) as u64)
                    .map_err(|error| SourceError::permanent("the file").caused_by(error))?;
                assert_eq!(u64::from_ne_bytes(word), stamp(page));
                answer.push(page);
            }
            Ok(())
        });
        let memory = Memory::map(PAGES * PAGE);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let called = Arc::clone(&seen);
        let pager = populating(source, &memory, mode)
            .slices(slices)
            .populate_threads(threads)
            .on_complete(move |state| called.lock().expect("not poisoned").push(state))
            .start()
            .expect("it starts");
        memory.remove(7, 2);
        memory.write(20 * PAGE + 8, 0x11);
        assert_eq!(pager.wait_complete(LONG), Population::Complete);
        shared.set_len(0).expect("it can be cut");
        std::fs::remove_file(&path).expect("it can be deleted");

        memory.remove(100, 50);
        memory.remove(PAGES - 10, 5);
        let expected = |page: usize| match page {
            7 | 8 | 100..150 => 0,
            page if page >= PAGES / 2 => 0,
            page => stamp(page),
        };
        for page in shuffled(PAGES, 3) {
            assert_eq!(memory.read_u64(page * PAGE), expected(page), "page {page}");
        }
        assert_eq!(memory.read(20 * PAGE + 8), 0x11);
        // All of it, because the pager does not see any more which pages are touched.
        assert_eq!(pager.touched(), [0..(PAGES * PAGE) as u64]);
        assert!(pager.failure().is_none());
        let stats = pager.stop();
        assert_eq!(stats.population, Population::Complete);
        assert!(stats.installed.populated >= (PAGES / 2 - 150 - 16) as u64, "{stats:?}");
        assert_eq!(*seen.lock().expect("not poisoned"), [Population::Complete]);
        // Without a pager, too.
        for page in shuffled(PAGES, 4) {
            assert_eq!(memory.read_u64(page * PAGE), expected(page), "page {page}");
        }
    }
}

/// Threads touch, write and give back pages while it runs.
#[test]
fn population_beside_faults_and_removals() {
    if !userfaultfd_works("population_beside_faults_and_removals") {
        return;
    }
    for round in 0..6 {
        let memory = Arc::new(Memory::map(PAGES * PAGE));
        let source = Arc::new(VecSource::new(stamped(PAGES), 16 * PAGE));
        let pager = populating(source, &memory, Populate::Full)
            .slices(1 + round % 3)
            .populate_threads(2)
            .start()
            .expect("it starts");
        let threads: Vec<_> = (0..3)
            .map(|owner| {
                let memory = Arc::clone(&memory);
                thread::spawn(move || {
                    let mine = |page: &usize| page % 3 == owner;
                    for page in shuffled(PAGES, (round * 3 + owner) as u64).into_iter().filter(mine)
                    {
                        if page % 5 == 0 {
                            memory.remove(page, 1);
                            assert_eq!(memory.read_u64(page * PAGE), 0, "page {page}");
                        } else {
                            memory.write(page * PAGE + 4000, 0x42);
                            assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("all pages are right"));
        assert_eq!(pager.wait_complete(LONG), Population::Complete);
        for page in 0..PAGES {
            let (word, byte) = (memory.read_u64(page * PAGE), memory.read(page * PAGE + 4000));
            let expected = if page % 5 == 0 { (0, 0) } else { (stamp(page), 0x42) };
            assert_eq!((word, byte), expected, "page {page}");
        }
    }
}

/// A lost page that no thread touches is no failure: it is left to a fault.
#[test]
fn unreadable_pages_are_left_to_faults() {
    if !userfaultfd_works("unreadable_pages_are_left_to_faults") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    // In a sequence, and as a single page.
    let panics = Arc::new(AtomicUsize::new(2));
    let source = source_of(64, move |offset, answer| match offset as usize / PAGE {
        30..32 => Err(SourceError::permanent("wrong checksum")),
        63 if panics.load(Ordering::Relaxed) > 0 => {
            panics.fetch_sub(1, Ordering::Relaxed);
            panic!("page 63 is cursed")
        }
        page => {
            answer.push(page);
            Ok(())
        }
    });
    let pager = populating(source, &memory, Populate::Full).start().expect("it starts");
    assert_eq!(pager.wait_complete(LONG), Population::Incomplete { pages: 3 });
    assert!(pager.failure().is_none(), "no thread has touched the page");
    for page in (0..64).filter(|page| !(30..32).contains(page)) {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page));
    }
    assert!(memory.read_by_syscall(30).is_err(), "its userfaultfd is still there");
    assert!(pager.failure().is_some());
    let stats = pager.stop();
    assert_eq!((stats.pages.poisoned, stats.installed.populated), (1, 61));
}

#[test]
fn transient_errors_delay_it() {
    if !userfaultfd_works("transient_errors_delay_it") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let loads = Arc::new(AtomicUsize::new(0));
    let source = source_of(64, move |offset, answer| {
        if !loads.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) {
            return Err(SourceError::transient("timed out"));
        }
        answer.push(offset as usize / PAGE);
        Ok(())
    });
    let pager = populating(source, &memory, Populate::Full).start().expect("it starts");
    assert_eq!(pager.wait_complete(LONG), Population::Complete);
    assert_eq!(pager.stop().installed.populated, 64);
}

#[test]
fn a_rate_limit_holds_and_does_not_delay_a_stop() {
    if !userfaultfd_works("a_rate_limit_holds_and_does_not_delay_a_stop") {
        return;
    }
    let memory = Memory::map(PAGES * PAGE);
    let source = Arc::new(VecSource::new(stamped(PAGES), 16 * PAGE));
    // The rate allows two chunks in a second. All of them would take a minute.
    let rate = NonZeroU64::new((32 * PAGE) as u64);
    let begin = Instant::now();
    let pager =
        populating(source, &memory, Populate::Full).populate_rate(rate).start().expect("it starts");
    assert_eq!(pager.wait_complete(Duration::from_millis(700)), Population::Running);
    let stats = pager.stop();
    assert_eq!(stats.population, Population::Running);
    let most = begin.elapsed().as_secs_f64() * 32.0 + 32.0;
    assert!((stats.installed.populated as f64) <= most, "{stats:?}, {most} at most");
    assert!(begin.elapsed() < LONG / 2);
}
