//! The core of a window, with memory that only counts what is protected.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::core::{Core, Protect};
use super::error::WindowError;
use super::options::WindowOptions;
use crate::install::page_state::PageState;
use crate::layout::Layout;
use crate::region::{PAGE_BYTES, Region};
use crate::uffd::Errno;

const PAGE: u64 = PAGE_BYTES as u64;
const BASE: u64 = 2 << 20;
/// More than one step of arming.
const PAGES: u64 = 1200;

/// The addresses of the protected pages.
#[derive(Default)]
struct Protected {
    pages: Mutex<BTreeSet<u64>>,
    /// No protection can be taken away.
    stuck: AtomicBool,
}

impl Protected {
    fn count(&self) -> usize {
        self.pages.lock().expect("no panic").len()
    }
}

impl Protect for Protected {
    fn protect(&self, host_addr: u64, len: u64, on: bool) -> Result<(), Errno> {
        if !on && self.stuck.load(Ordering::Relaxed) {
            return Err(Errno(libc::ENOENT));
        }
        let mut pages = self.pages.lock().expect("no panic");
        for page in (host_addr..host_addr + len).step_by(PAGE_BYTES) {
            if on {
                pages.insert(page)
            } else {
                pages.remove(&page)
            };
        }
        Ok(())
    }

    fn is_present(&self, _page: u64) -> bool {
        true
    }
}

fn core() -> Arc<Core> {
    core_with_room(1 << 20)
}

fn core_with_room(staging_bytes: usize) -> Arc<Core> {
    // SAFETY: no memory is accessed.
    let region = unsafe { Region::new(BASE, PAGES * PAGE, PAGE_BYTES, 0) }.expect("whole pages");
    let read = |_, buf: &mut [u8]| {
        buf.fill(7);
        Ok(())
    };
    let options = WindowOptions { staging_bytes, ..WindowOptions::default() };
    let core = Core::new(Layout::cut(&[region], 1), Arc::new(read), options);
    Arc::new(core.expect("a few pages"))
}

/// No thread would answer the writes of the guest.
#[test]
fn a_window_that_has_failed_or_is_closed_protects_nothing_more() {
    for close in [false, true] {
        let (core, memory) = (core(), Protected::default());
        let end = || match close {
            true => core.close(&memory),
            false => core.fail("a thread has ended".into()),
        };
        end();
        assert!(matches!(core.arm(&memory), Err(WindowError::Ended { .. })));
        assert_eq!(memory.count(), 0);

        let (core, memory) = (self::core(), Protected::default());
        core.arm(&memory).expect("it is open");
        assert_eq!(memory.count(), PAGES as usize);
        core.fail("a thread has ended".into());
        core.close(&memory);
        assert!(matches!(core.cut(&memory), Err(WindowError::Ended { .. })));
        assert_eq!(memory.count(), 0);
    }
}

fn armed_and_cut() -> (Arc<Core>, Protected) {
    let (core, memory) = (core(), Protected::default());
    core.arm(&memory).expect("it is open");
    core.cut(&memory).expect("it is open");
    (core, memory)
}

fn read(core: &Core, memory: &Protected, page: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![1; PAGE_BYTES];
    core.read(memory, &mut bytes, page * PAGE).map(|()| bytes)
}

/// What the guest does with a page that it did not have at the cut has nothing to do with the save.
#[test]
fn pages_that_were_missing_or_zero_at_the_cut_may_be_given_back_again() {
    let (core, memory) = armed_and_cut();
    let (missing, zero, removed) = (3, 4, 5);
    core.installed(missing, PageState::Missing);
    core.installed(zero, PageState::Removed);
    for page in [missing, zero] {
        core.removed(page, PageState::Present);
    }
    core.removed(removed, PageState::Removed);
    core.installed(removed, PageState::Removed);
    assert_eq!(core.failure(), None);
    // The one that was missing is that of the pager's source.
    let own = |page, state| core.is_own(page, state);
    assert!(!own(missing, PageState::Removed) && !own(missing, PageState::Present));
    assert!(own(zero, PageState::Removed) && own(removed, PageState::Present));
    for page in [zero, removed] {
        assert_eq!(read(&core, &memory, page).expect("it is zero"), [0; PAGE_BYTES]);
    }
    assert_eq!(read(&core, &memory, 6).expect("it is read"), [7; PAGE_BYTES]);
    core.removed(6, PageState::Present);
    assert_eq!(core.failure(), None, "it is saved");
}

/// It was filled with zeros, so it was not in memory any more: its bytes at the cut are unknown.
#[test]
fn a_page_that_is_installed_again_after_the_cut_is_lost() {
    let (core, memory) = armed_and_cut();
    core.installed(3, PageState::Present);
    assert!(core.failure().is_some_and(|reason| reason.contains("page 3 was given back")));
    read(&core, &memory, 4).expect_err("it has failed");
}

/// Otherwise the next write to the page would wait for a thread that ends.
#[test]
fn a_failed_window_takes_all_protection_away() {
    let (core, memory) = armed_and_cut();
    memory.stuck.store(true, Ordering::Relaxed);
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    core.read(&memory, &mut bytes, 0).expect_err("the pages stay protected");
    assert!(core.failure().is_some());
    assert_eq!(memory.count(), PAGES as usize);
    memory.stuck.store(false, Ordering::Relaxed);
    core.close(&memory);
    assert_eq!(memory.count(), 0);
}

/// Otherwise the thread of a pager would also not load pages, for as long as the sweep is elsewhere.
#[test]
fn a_write_that_waits_for_room_continues_when_its_page_is_saved() {
    let (core, memory) = (core_with_room(2 * PAGE_BYTES), Protected::default());
    core.arm(&memory).expect("it is open");
    core.cut(&memory).expect("it is open");
    let answer = |page| core.answer(&memory, BASE + page * PAGE).expect("it is writable");
    // Each write copies one page, because a block has no room.
    (0..2).for_each(answer);
    thread::scope(|scope| {
        let third = scope.spawn(|| answer(40));
        while core.stats().waits == 0 {
            thread::yield_now();
        }
        assert_eq!(read(&core, &memory, 40).expect("it is read"), [7; PAGE_BYTES]);
        let began = Instant::now();
        while !third.is_finished() && began.elapsed() < Duration::from_secs(20) {
            thread::yield_now();
        }
        let finished = third.is_finished();
        core.close(&memory);
        assert!(finished, "it still waits for room");
    });
    assert_eq!(core.stats().copied_bytes, 2 * PAGE);
}

/// Memory whose window fails while it is being closed.
struct FailsLate<'a> {
    memory: &'a Protected,
    core: &'a Core,
}

impl Protect for FailsLate<'_> {
    fn protect(&self, host_addr: u64, len: u64, on: bool) -> Result<(), Errno> {
        self.core.fail("another thread could not take protection away".into());
        self.memory.protect(host_addr, len, on)
    }

    fn is_present(&self, page: u64) -> bool {
        self.memory.is_present(page)
    }
}

/// A failure means that a page may be protected in spite of its state.
#[test]
fn a_window_that_fails_while_it_is_closed_takes_all_protection_away() {
    let (core, memory) = armed_and_cut();
    let mut bytes = vec![0; ((PAGES - 1) * PAGE) as usize];
    core.read(&memory, &mut bytes, PAGE).expect("it is read");
    memory.pages.lock().expect("no panic").insert(BASE + (PAGES - 1) * PAGE);
    // The first page is not saved yet.
    core.close(&FailsLate { memory: &memory, core: &core });
    assert_eq!(memory.count(), 0);
}
