//! Memory at one point in time, while threads continue to write to it.
#![allow(missing_docs)]

mod support;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pager::window::{Protection, Window, WindowError, WindowOptions};
use pager::{Pager, Populate, VecSource};
use support::windows::{ends, reads, windows_work};
use support::{Memory, PAGE, shuffled, stamp, stamped};

const PAGES: usize = 2048;

/// Reads parts of the window in any order, on two threads, while the writer continues.
fn sweep(window: &Window, parts: &[Range<usize>]) -> Vec<(usize, u8)> {
    let next = Mutex::new(parts.iter());
    let found = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(part) = next.lock().expect("no panic").next().cloned() else { break };
                    let mut bytes = vec![0; part.len() * PAGE];
                    window.read(&mut bytes, (part.start * PAGE) as u64).expect("it is read");
                    let pages = part.zip(bytes.chunks(PAGE)).map(|(page, bytes)| {
                        assert_eq!(bytes[0], bytes[PAGE - 1], "page {page} is torn");
                        (page, bytes[0])
                    });
                    found.lock().expect("no panic").extend(pages);
                }
            });
        }
    });
    let mut found = found.into_inner().expect("no panic");
    found.sort_unstable();
    found
}

fn parts() -> Vec<Range<usize>> {
    let starts = shuffled(PAGES / 32, 7);
    starts.into_iter().map(|part| part * 32..(part + 1) * 32).collect()
}

/// A writer stamps the pages in order with a generation, and again with the next one. At the cut it is at some page:
/// all pages before it have the new generation, and all others have the old one. No page has a later one.
#[test]
fn stamped_pages_are_those_of_one_point_in_time() {
    if !windows_work("stamped_pages_are_those_of_one_point_in_time") {
        return;
    }
    let memory = Arc::new(Memory::map(PAGES * PAGE));
    // How many pages were stamped. The writer holds it during each stamp.
    let stamped = Arc::new(Mutex::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let value = |count: usize, page: usize| {
        // The number of stamps that the page has had.
        ((count + PAGES - 1 - page) / PAGES) as u8
    };
    let writer = {
        let (memory, stamped, stop) =
            (Arc::clone(&memory), Arc::clone(&stamped), Arc::clone(&stop));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let mut count = stamped.lock().expect("no panic");
                let page = *count % PAGES;
                *count += 1;
                ends(&memory, page, value(*count, page));
                drop(count);
                thread::yield_now();
            }
        })
    };
    let protection = Arc::new(Protection::new(vec![memory.whole()]).expect("it is registered"));
    let (mut faults, mut copied) = (0, 0);
    for cut in 0..100 {
        let options = WindowOptions::default();
        let window =
            Window::open(Arc::clone(&protection), reads(&memory), options).expect("it opens");
        assert!(matches!(
            Window::open(Arc::clone(&protection), reads(&memory), options),
            Err(WindowError::Busy)
        ));
        let count = {
            let count = stamped.lock().expect("no panic");
            window.cut().expect("it is cut");
            *count
        };
        for (page, found) in sweep(&window, &parts()) {
            assert_eq!(found, value(count, page), "page {page} of cut {cut}, at {count}");
        }
        window.check().expect("it is consistent");
        window.read(&mut [0; PAGE], 0).expect_err("a page is read once");
        faults += window.stats().faults;
        copied += window.stats().copied_bytes;
    }
    // After the last window the writer is not delayed.
    let before = *stamped.lock().expect("no panic");
    while *stamped.lock().expect("no panic") < before + PAGES {
        thread::sleep(Duration::from_millis(1));
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().expect("no panic");
    assert!(faults > 100 && copied > 0, "{faults} {copied}");
}

/// A writer that is faster than the sweep waits for room, and all bytes are still those of the cut.
#[test]
fn copies_have_bounded_memory() {
    if !windows_work("copies_have_bounded_memory") {
        return;
    }
    let memory = Arc::new(Memory::map(PAGES * PAGE));
    (0..PAGES).for_each(|page| ends(&memory, page, 1));
    let protection = Arc::new(Protection::new(vec![memory.whole()]).expect("it is registered"));
    let mut options = WindowOptions::default();
    options.staging_bytes = 64 * PAGE;
    let window = Window::open(protection, reads(&memory), options).expect("it opens");
    window.cut().expect("it is cut");
    let writer = {
        let memory = Arc::clone(&memory);
        thread::spawn(move || (0..PAGES).for_each(|page| ends(&memory, page, 2)))
    };
    while window.stats().waits == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(window.stats().copied_bytes <= 64 * PAGE as u64);
    assert!(sweep(&window, &parts()).into_iter().all(|(_, found)| found == 1));
    writer.join().expect("no panic");
    assert!((0..PAGES).all(|page| memory.read(page * PAGE) == 2));
}

/// A window that is dropped, at any moment, lets all writers go on.
#[test]
fn a_window_that_is_dropped_wakes_its_writers() {
    if !windows_work("a_window_that_is_dropped_wakes_its_writers") {
        return;
    }
    let memory = Arc::new(Memory::map(PAGES * PAGE));
    (0..PAGES).for_each(|page| ends(&memory, page, 1));
    let protection = Arc::new(Protection::new(vec![memory.whole()]).expect("it is registered"));
    let mut options = WindowOptions::default();
    options.staging_bytes = 8 * PAGE;
    for (round, cut) in [(2, false), (3, true), (4, true)] {
        let window =
            Window::open(Arc::clone(&protection), reads(&memory), options).expect("it opens");
        if cut {
            window.cut().expect("it is cut");
        }
        let writer = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || (0..PAGES).for_each(|page| ends(&memory, page, round)))
        };
        while cut && window.stats().waits == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        drop(window);
        writer.join().expect("no panic");
    }
}

/// Of paged memory, pages that were missing at the cut stay the source's, whatever loads and writes them later.
#[test]
fn pages_that_are_installed_after_the_cut_are_not_in_it() {
    if !windows_work("pages_that_are_installed_after_the_cut_are_not_in_it") {
        return;
    }
    for round in 0..20 {
        let memory = Arc::new(Memory::map(PAGES * PAGE));
        let source = Arc::new(VecSource::new(stamped(PAGES), 4 * PAGE));
        let pager = Pager::builder(source)
            .region(memory.whole())
            .slices(1 + round % 3)
            .populate(Populate::Off)
            .start()
            .expect("it starts");
        // Read, written, given back, and untouched pages.
        for page in (0..PAGES).step_by(16) {
            assert_eq!(memory.read_u64(page * PAGE), stamp(page));
            ends(&memory, page + 5, 7);
        }
        memory.remove(PAGES / 2, 16);
        let gate = Arc::new(Mutex::new(()));
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let (memory, gate, stop) = (Arc::clone(&memory), Arc::clone(&gate), Arc::clone(&stop));
            thread::spawn(move || {
                // Pages of every kind: before the cut with 7, and after it with 9.
                for page in shuffled(PAGES, round as u64).into_iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let open = gate.lock().expect("no panic");
                    ends(&memory, page, 9);
                    drop(open);
                    thread::yield_now();
                }
            })
        };
        let window = pager.window(reads(&memory), WindowOptions::default()).expect("it opens");
        let expected: Vec<u8> = {
            let _closed = gate.lock().expect("no panic");
            window.cut().expect("it is cut");
            // Reading would install the page: the states show what is there.
            let there = pager.touched();
            (0..PAGES)
                .map(|page| {
                    let offset = (page * PAGE) as u64;
                    match there.iter().any(|part| part.contains(&offset)) {
                        true => memory.read(page * PAGE),
                        false => 0xff,
                    }
                })
                .collect()
        };
        thread::sleep(Duration::from_millis(round as u64 % 4));
        let own = window.own_pages().expect("it has a pager");
        let pages: Vec<Range<usize>> = own
            .iter()
            .map(|part| part.start as usize / PAGE..part.end as usize / PAGE)
            .flat_map(|part| part.clone().map(|page| page..page + 1))
            .collect();
        let mut found = vec![0xff; PAGES];
        for part in &pages {
            let mut bytes = vec![0; PAGE];
            window.read(&mut bytes, (part.start * PAGE) as u64).expect("it is read");
            found[part.start] = bytes[0];
        }
        assert!(found == expected, "round {round}");
        window.check().expect("it is consistent");
        drop(window);
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("no panic");
        pager.stop();
    }
}

/// The bytes of a page that is given back too early are lost: no file may be made of them.
#[test]
fn a_page_that_is_given_back_after_the_cut_is_noticed() {
    if !windows_work("a_page_that_is_given_back_after_the_cut_is_noticed") {
        return;
    }
    let memory = Arc::new(Memory::map(64 * PAGE));
    let source = Arc::new(VecSource::new(stamped(64), PAGE));
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    (0..32).for_each(|page| assert_eq!(memory.read_u64(page * PAGE), stamp(page)));
    let window = pager.window(reads(&memory), WindowOptions::default()).expect("it opens");
    window.cut().expect("it is cut");
    window.read(&mut vec![0; PAGE], 0).expect("it is read");
    // A page that is saved, and one that was missing.
    memory.remove(0, 1);
    memory.remove(40, 1);
    // It takes the slice locks, so the pager has acted on both.
    let own = window.own_pages().expect("it has a pager");
    assert_eq!(own, std::iter::once(0..32 * PAGE as u64).collect::<Vec<_>>());
    memory.write(40 * PAGE, 1);
    memory.remove(40, 1);
    assert_eq!(window.own_pages(), Some(own));
    window.check().expect("nothing is lost");
    memory.remove(2, 1);
    // madvise(2) returns when the event was read, and before the pager has acted on it.
    let began = std::time::Instant::now();
    let lost = loop {
        match window.check() {
            Err(lost) => break lost,
            Ok(()) => assert!(began.elapsed().as_secs() < 10, "a page is lost"),
        }
        std::thread::yield_now();
    };
    assert!(lost.to_string().contains("given back"), "{lost}");
    window.read(&mut vec![0; PAGE], 4 * PAGE as u64).expect_err("the window has failed");
    drop(window);
    memory.write(3 * PAGE, 1);
    pager.stop();
}

/// The population has to wait before it lets the memory go, and a pager that stops ends the window.
#[test]
fn a_pager_that_ends_and_a_population_that_completes_during_a_window() {
    if !windows_work("a_pager_that_ends_and_a_population_that_completes_during_a_window") {
        return;
    }
    let memory = Arc::new(Memory::map(PAGES * PAGE));
    let source = Arc::new(VecSource::new(stamped(PAGES), 16 * PAGE));
    let start = || {
        let builder = Pager::builder(Arc::clone(&source) as Arc<dyn pager::PageSource>);
        builder.region(memory.whole()).populate(Populate::Full).start().expect("it starts")
    };
    let pager = start();
    let opened = pager.window(reads(&memory), WindowOptions::default());
    match opened {
        Ok(window) => {
            window.cut().expect("it is cut");
            let own = window.own_pages().expect("it has a pager");
            memory.write(5 * PAGE, 1);
            for part in own {
                let mut bytes = vec![0; (part.end - part.start) as usize];
                window.read(&mut bytes, part.start).expect("it is read");
                assert!(bytes == stamped(PAGES)[part.start as usize..part.end as usize]);
            }
            assert_ne!(pager.wait_complete(Duration::from_millis(50)), pager::Population::Complete);
            drop(window);
        }
        Err(error) => assert!(matches!(error, WindowError::Released), "{error}"),
    }
    assert_eq!(pager.wait_complete(Duration::from_secs(60)), pager::Population::Complete);
    assert!(matches!(
        pager.window(reads(&memory), WindowOptions::default()),
        Err(WindowError::Released)
    ));
    pager.stop();

    memory.remove(0, PAGES);
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    assert_eq!(memory.read_u64(0), stamp(0));
    let window = pager.window(reads(&memory), WindowOptions::default()).expect("it opens");
    window.cut().expect("it is cut");
    pager.stop();
    memory.write(0, 1);
    window.check().expect_err("it has no pager");
}
