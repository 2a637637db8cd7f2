//! `Populate::Auto`: pages are loaded ahead for a guest that waits much, and not for one that waits little.
#![allow(missing_docs)]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pager::{Pager, PagerBuilder, Populate, Population, SourceError};
use support::{Memory, PAGE, is_lost, pin_here, shuffled, source_of, stamp, userfaultfd_works};

const PAGES: usize = 8192;
/// A hang guard.
const LONG: Duration = Duration::from_secs(60);

/// Loads page by page, each after `slow`, so that loading all pages takes a while.
fn auto(memory: &Memory, slow: Duration) -> PagerBuilder {
    let source = source_of(PAGES, move |offset, answer| {
        let began = Instant::now();
        while began.elapsed() < slow {
            std::hint::spin_loop();
        }
        answer.push(offset as usize / PAGE);
        Ok(())
    });
    // One thread, for any number of CPUs.
    Pager::builder(source).region(memory.whole()).populate_threads(1)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < LONG, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn loading_starts_stops_and_restarts_with_the_waiting() {
    if !userfaultfd_works("loading_starts_stops_and_restarts_with_the_waiting") {
        return;
    }
    let memory = Memory::map(PAGES * PAGE);
    let pager = auto(&memory, Duration::from_micros(200)).start().expect("it starts");
    assert_eq!(pager.population(), Population::Quiet, "the default is `Auto`");
    let order = shuffled(PAGES, 5);
    let mut touched = order.iter();
    let mut touch_until = |populated: u64| {
        for &page in touched.by_ref() {
            assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
            if pager.stats().installed.populated > populated {
                return;
            }
        }
        panic!("all pages were touched, and none was loaded ahead");
    };
    touch_until(0);
    wait_until("it is quiet", || pager.population() == Population::Quiet);
    let stats = pager.stats();
    assert!(stats.pages.missing > PAGES as u64 / 4, "it stops long before the end: {stats:?}");
    // The number of populated pages stays the same while no thread waits.
    thread::sleep(Duration::from_millis(50));
    assert_eq!(pager.stats().installed.populated, stats.installed.populated);
    touch_until(stats.installed.populated);
    // Then the loading continues to the end.
    for page in 0..PAGES {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
    }
    assert!(pager.failure().is_none());
}

/// The end is the same as for other modes of population.
#[test]
fn memory_that_is_touched_everywhere_is_complete_soon() {
    if !userfaultfd_works("memory_that_is_touched_everywhere_is_complete_soon") {
        return;
    }
    let memory = Memory::map(PAGES * PAGE);
    let pager = auto(&memory, Duration::from_micros(20)).start().expect("it starts");
    for page in shuffled(PAGES, 6) {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
    }
    // All pages are present: the loading ends, unless it has just become quiet.
    wait_until("it ends", || {
        matches!(pager.population(), Population::Complete | Population::Quiet)
    });
    let stats = pager.stop();
    assert_eq!(stats.pages.missing, 0);
    assert!(stats.installed.populated > 0, "{stats:?}");
    assert!(stats.faults < PAGES as u64, "{stats:?}");
}

/// If one fault is enough to begin the loading, the time before that is used, too.
#[test]
fn loading_that_one_fault_begins_does_not_wait_for_it() {
    if !userfaultfd_works("loading_that_one_fault_begins_does_not_wait_for_it") {
        return;
    }
    let memory = Memory::map(PAGES * PAGE);
    let pager = auto(&memory, Duration::ZERO)
        .fault_overhead(Duration::from_millis(8))
        .start()
        .expect("it starts");
    wait_until("pages are loaded", || pager.stats().installed.populated > 0);
    assert_eq!(pager.stop().faults, 0);
}

#[test]
fn off_is_off() {
    if !userfaultfd_works("off_is_off") {
        return;
    }
    let memory = Memory::map(PAGES * PAGE);
    let pager = auto(&memory, Duration::ZERO).populate(Populate::Off).start().expect("it starts");
    for page in shuffled(PAGES, 8) {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
    }
    let stats = pager.stop();
    assert_eq!((stats.population, stats.installed.populated), (Population::Off, 0));
    assert_eq!(stats.faults, PAGES as u64);
}

/// On a single CPU a loader takes time from the guest. It loads what is left when the guest has needed most of the memory.
#[test]
fn a_single_cpu_loads_only_the_rest() {
    if !userfaultfd_works("a_single_cpu_loads_only_the_rest") {
        return;
    }
    let on_one_cpu = || {
        pin_here();
        let memory = Memory::map(PAGES * PAGE);
        let source = source_of(PAGES, |offset, answer| {
            answer.push(offset as usize / PAGE);
            Ok(())
        });
        let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
        let order = shuffled(PAGES, 9);
        let touch = |page: &usize| assert_eq!(memory.read_u64(page * PAGE), stamp(*page));
        let (needed, rest) = order.split_at(PAGES / 8 * 5 - 1);
        needed.iter().for_each(touch);
        assert_eq!(pager.population(), Population::Quiet);
        assert_eq!(pager.stats().installed.populated, 0);
        rest.iter().for_each(touch);
        let stats = pager.stop();
        assert_eq!(stats.pages.missing, 0);
        assert!(stats.installed.populated > 0, "{stats:?}");
    };
    thread::scope(|scope| scope.spawn(on_one_cpu).join().expect("it ends"));
}

/// Removals and lost pages during the loading: a page that was given back reads as zero, a lost page is an error of the
/// thread that touches it, and everything else is right.
#[test]
fn removals_and_errors_under_it() {
    if !userfaultfd_works("removals_and_errors_under_it") {
        return;
    }
    let memory = Memory::map(PAGES * PAGE);
    let source = source_of(PAGES, |offset, answer| {
        let page = offset as usize / PAGE;
        if is_lost(page) {
            return Err(SourceError::permanent("lost"));
        }
        answer.push(page);
        Ok(())
    });
    let pager = Pager::builder(source)
        .region(memory.whole())
        // As if each fault halted the guest: the loading starts immediately.
        .fault_overhead(Duration::from_millis(8))
        .populate_threads(2)
        .start()
        .expect("it starts");
    let given_back = |page: usize| page % 64 == 9;
    for page in shuffled(PAGES, 9) {
        if given_back(page) {
            memory.remove(page, 1);
        }
        let expected = if given_back(page) { 0 } else { stamp(page) };
        if given_back(page) || !is_lost(page) {
            assert_eq!(memory.read_u64(page * PAGE), expected, "page {page}");
        }
    }
    let lost = (0..PAGES).find(|&page| is_lost(page) && !given_back(page)).expect("some are lost");
    assert!(memory.read_by_syscall(lost).is_err());
    assert!(pager.failure().is_some());
    let stats = pager.stop();
    assert!(stats.installed.populated > 0, "{stats:?}");
}

/// If the pager is stopped in the middle, the threads end and nothing hangs.
#[test]
fn a_stop_in_the_middle() {
    if !userfaultfd_works("a_stop_in_the_middle") {
        return;
    }
    for round in 0..20 {
        let memory = Memory::map(PAGES * PAGE);
        let pager = auto(&memory, Duration::from_micros(10))
            .fault_overhead(Duration::from_millis(8))
            .start()
            .expect("it starts");
        for page in shuffled(PAGES, round).into_iter().take(1 + round as usize * 20) {
            assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
        }
        let stats = pager.stop();
        assert_eq!(stats.pages.total, stats.pages.missing + stats.pages.present);
    }
}

/// A fault on a page that a background thread is loading waits for that, up to the pager's limit of 500 us, because that
/// thread may not be running. Within this time no page is loaded twice, even if the touching thread is always just
/// behind the loader.
#[test]
fn pages_in_loading_are_not_loaded_again() {
    if !userfaultfd_works("pages_in_loading_are_not_loaded_again") {
        return;
    }
    const LIMIT: Duration = Duration::from_micros(500);
    let memory = Memory::map(PAGES * PAGE);
    let begun = Arc::new(Mutex::new(vec![Vec::new(); PAGES]));
    let loads = Arc::clone(&begun);
    let source = source_of(PAGES, move |offset, answer| {
        let began = Instant::now();
        let page = offset as usize / PAGE;
        loads.lock().expect("no load panics")[page].push(began);
        while began.elapsed() < Duration::from_micros(40) {
            std::hint::spin_loop();
        }
        answer.push(page);
        Ok(())
    });
    let pager = Pager::builder(source)
        .region(memory.whole())
        .populate(Populate::Full)
        .populate_threads(1)
        .start()
        .expect("it starts");
    // In the order of the loading.
    let touch = |page: usize| {
        let began = Instant::now();
        assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
        began
    };
    let touched: Vec<Instant> = (0..PAGES).map(touch).collect();
    assert_eq!(pager.wait_complete(LONG), Population::Complete);
    assert!(pager.stop().installed.populated > 0, "the loader never got ahead");
    for (page, begun) in begun.lock().expect("no load panics").iter().enumerate() {
        let last = *begun.iter().max().expect("each page was loaded");
        // The loader may have lost its CPU at any point after its claim, also after the touching thread was woken.
        let after = last.saturating_duration_since(touched[page]);
        assert!(begun.len() == 1 || after >= LIMIT, "page {page} was loaded again {after:?} after");
    }
}

/// The last loader skips pages because a fault is loading them. They are loaded before the memory is unregistered,
/// because missing pages would then read as zeros.
#[test]
fn pages_skipped_at_the_end_are_loaded() {
    if !userfaultfd_works("pages_skipped_at_the_end_are_loaded") {
        return;
    }
    let memory = Memory::map(PAGES * PAGE);
    let first_of_last_part = PAGES - (2 << 20) / PAGE;
    let touched = first_of_last_part + 8;
    let (loads_of_touched, loads) = (Arc::new(AtomicU64::new(0)), AtomicU64::new(0));
    let (fault, loads) = (Arc::clone(&loads_of_touched), Arc::new(loads));
    let source = source_of(PAGES, move |offset, answer| {
        let page = offset as usize / PAGE;
        if page == touched && fault.fetch_add(1, Ordering::SeqCst) == 0 {
            // The load of the fault takes until all other pages are loaded, and the loader has come back to this one.
            let others = (PAGES - 1) as u64;
            wait_until("the others are loaded", || loads.load(Ordering::SeqCst) >= others);
            thread::sleep(Duration::from_millis(5));
        }
        if page == first_of_last_part {
            wait_until("the fault is there", || fault.load(Ordering::SeqCst) > 0);
        }
        loads.fetch_add(1, Ordering::SeqCst);
        answer.push(page);
        Ok(())
    });
    let pager = Pager::builder(source)
        .region(memory.whole())
        .populate(Populate::Full)
        .populate_threads(1)
        .start()
        .expect("it starts");
    thread::scope(|scope| {
        let fault = scope.spawn(|| memory.read_u64(touched * PAGE));
        assert_eq!(pager.wait_complete(LONG), Population::Complete);
        assert_eq!(fault.join().expect("it reads"), stamp(touched));
    });
    assert_eq!(loads_of_touched.load(Ordering::SeqCst), 1, "the loader has loaded it as well");
    for page in 0..PAGES {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
    }
}
