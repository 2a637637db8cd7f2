//! One window with many cuts: what changes between two of them is all that is read.
#![allow(missing_docs)]

mod support;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pager::window::{Protection, Window, WindowOptions};
use pager::{Pager, Populate, VecSource};
use support::windows::{ends, reads, windows_work};
use support::{Memory, PAGE, Random, stamped};

const PAGES: usize = 2048;

fn tracking() -> WindowOptions {
    let mut options = WindowOptions::default();
    options.tracks = true;
    // A few blocks: writers wait for room.
    options.staging_bytes = 64 * PAGE;
    options
}

/// The pages of ranges of source offsets.
fn pages(ranges: &[Range<u64>]) -> impl Iterator<Item = usize> + '_ {
    ranges.iter().flat_map(|range| range.start as usize / PAGE..range.end as usize / PAGE)
}

/// Writes to random pages, and keeps what they should be. The lock is held during each write.
fn writer(
    memory: &Arc<Memory>,
    expected: &Arc<Mutex<Vec<u8>>>,
    stop: &Arc<AtomicBool>,
    seed: u64,
) -> thread::JoinHandle<()> {
    let (memory, expected, stop) = (Arc::clone(memory), Arc::clone(expected), Arc::clone(stop));
    thread::spawn(move || {
        let mut random = Random::new(seed);
        while !stop.load(Ordering::Relaxed) {
            // Some pages are written often.
            let among = if random.below(4) == 0 { PAGES } else { 64 };
            let page = random.below(among);
            let mut expected = expected.lock().expect("no panic");
            if random.below(16) == 0 {
                assert_eq!(memory.read(page * PAGE), expected[page], "page {page} is damaged");
            } else {
                expected[page] = expected[page].wrapping_add(1);
                ends(&memory, page, expected[page]);
            }
            drop(expected);
            thread::yield_now();
        }
    })
}

/// Takes cuts of a window, and keeps a copy of memory by only what has changed. Some cuts fail in the middle.
fn cuts(window: &Window, expected: &Mutex<Vec<u8>>, mut image: Vec<u8>, all: &[Range<u64>]) {
    let mut first = true;
    let mut least = usize::MAX;
    for cut in 0..100 {
        thread::sleep(Duration::from_millis(cut % 3));
        window.arm_again().expect("it is open");
        let expected = {
            let expected = expected.lock().expect("no panic");
            window.cut().expect("it is cut");
            expected.clone()
        };
        let changed = window.changed_pages();
        assert_eq!(changed.is_none(), first, "cut {cut}");
        let changed = changed.unwrap_or_else(|| window.own_pages().unwrap_or(all.to_vec()));
        let count = pages(&changed).count();
        least = least.min(count);
        let fails = cut % 7 == 3;
        let mut copy = image.clone();
        for page in pages(&changed).take(if fails { count / 2 } else { count }) {
            let mut bytes = vec![0; PAGE];
            window.read(&mut bytes, (page * PAGE) as u64).expect("it is read");
            assert_eq!(bytes[0], bytes[PAGE - 1], "page {page} of cut {cut} is torn");
            copy[page] = bytes[0];
        }
        window.check().expect("it is consistent");
        if !fails {
            let wrong: Vec<_> = (0..PAGES).filter(|&page| copy[page] != expected[page]).collect();
            assert!(wrong.is_empty(), "cut {cut}: {wrong:?}");
            image = copy;
            first = false;
        }
        window.end_cut(!fails);
    }
    assert!(least < PAGES, "all of memory is read each time");
}

#[test]
fn what_changes_between_cuts_is_all_that_changes() {
    if !windows_work("what_changes_between_cuts_is_all_that_changes") {
        return;
    }
    let memory = Arc::new(Memory::map(PAGES * PAGE));
    let expected = Arc::new(Mutex::new(vec![0; PAGES]));
    let protection = Arc::new(Protection::new(vec![memory.whole()]).expect("it is registered"));
    let window = Window::open(protection, reads(&memory), tracking()).expect("it opens");
    assert!(window.is_written());
    let stop = Arc::new(AtomicBool::new(false));
    let writing = writer(&memory, &expected, &stop, 1);
    let all = 0..(PAGES * PAGE) as u64;
    cuts(&window, &expected, vec![0; PAGES], std::slice::from_ref(&all));
    // Without writes nothing changes, and one write is noticed.
    stop.store(true, Ordering::Relaxed);
    writing.join().expect("no panic");
    window.cut().expect("it is cut");
    window.end_cut(true);
    assert!(!window.is_written());
    window.cut().expect("it is cut");
    assert_eq!(window.changed_pages(), Some(Vec::new()));
    window.cut().expect_err("the last cut has not ended");
    window.end_cut(false);
    ends(&memory, 100, 1);
    assert!(window.is_written());
    window.cut().expect("it is cut");
    let changed = window.changed_pages().expect("a part");
    assert_eq!(pages(&changed).collect::<Vec<_>>(), (96..112).collect::<Vec<_>>());
    drop(window);
    (0..PAGES).for_each(|page| ends(&memory, page, 9));
}

/// Pages are loaded all the time: those that were not loaded at a cut are the source's.
#[test]
fn what_is_loaded_between_cuts_counts_as_changed() {
    if !windows_work("what_is_loaded_between_cuts_counts_as_changed") {
        return;
    }
    for round in 0..4 {
        let memory = Arc::new(Memory::map(PAGES * PAGE));
        let mut bytes = stamped(PAGES);
        for (page, bytes) in bytes.chunks_mut(PAGE).enumerate() {
            bytes.fill(page as u8);
        }
        let image: Vec<u8> = bytes.chunks(PAGE).map(|page| page[0]).collect();
        let source = Arc::new(VecSource::new(bytes, 4 * PAGE));
        let populate = if round % 2 == 0 { Populate::Off } else { Populate::Full };
        let pager = Pager::builder(source)
            .region(memory.whole())
            .slices(1 + round)
            .populate(populate)
            .start()
            .expect("it starts");
        let expected = Arc::new(Mutex::new(image.clone()));
        let stop = Arc::new(AtomicBool::new(false));
        let window = match pager.window(reads(&memory), tracking()) {
            Err(pager::window::WindowError::Released) => continue,
            window => window.expect("it opens"),
        };
        let writing = writer(&memory, &expected, &stop, round as u64);
        cuts(&window, &expected, image, &[]);
        drop(window);
        stop.store(true, Ordering::Relaxed);
        writing.join().expect("no panic");
        pager.stop();
    }
}
