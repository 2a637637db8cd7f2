//! The core of a window, with memory that only counts what is protected.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::core::{Core, Protect};
use super::error::WindowError;
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
            if on { pages.insert(page) } else { pages.remove(&page) };
        }
        Ok(())
    }

    fn is_present(&self, _page: u64) -> bool {
        true
    }
}

fn core() -> Arc<Core> {
    // SAFETY: no memory is accessed.
    let region = unsafe { Region::new(BASE, PAGES * PAGE, PAGE_BYTES, 0) }.expect("whole pages");
    let read = |_, buf: &mut [u8]| {
        buf.fill(7);
        Ok(())
    };
    let core = Core::new(Layout::cut(&[region], 1), Arc::new(read), 1 << 20);
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

