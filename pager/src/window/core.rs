//! One point in time of memory that threads continue to write: which pages are protected, and which thread copies them.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use super::error::WindowError;
use super::options::{ReadMemory, WindowOptions, WindowStats};
use super::phase::Phase;
use super::staging::Staging;
use super::states::{CutState, CutStates};
use crate::install::page_state::PageState;
use crate::layout::Layout;
use crate::region::PAGE_BYTES;
use crate::uffd::Errno;

/// Pages that a fault copies, or makes writable, in one step: the next writes are mostly near.
const BLOCK_PAGES: u64 = 16;
/// Memory that one ioctl protects: a page table. The lock of the memory map is free in between.
pub(super) const STEP_PAGES: u64 = 512;
/// How often a change of the memory map is waited for, and how long each time.
pub(super) const CHANGE_TRIES: u32 = 2000;
pub(super) const CHANGE_PAUSE: Duration = Duration::from_micros(50);

/// Protects pages from writes, and takes the protection away. A range is in one extent of the layout.
pub(crate) trait Protect {
    fn protect(&self, host_addr: u64, len: u64, on: bool) -> Result<(), Errno>;

    /// Whether a page is in memory, so that reading it does not wait for a pager. If it was installed after the cut,
    /// [`Core::installed`] has been called.
    fn is_present(&self, page: u64) -> bool;
}

/// The state of a window, for the threads that answer write faults and those that save pages.
pub(crate) struct Core {
    pub(super) layout: Layout,
    pub(super) states: CutStates,
    phase: Mutex<Phase>,
    pub(super) staging: Staging,
    /// After a page is saved it stays protected, for the next cut.
    pub(super) tracks: bool,
    read: ReadMemory,
    failure: OnceLock<String>,
    faults: AtomicU64,
    copied_pages: AtomicU64,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("phase", &self.phase).finish_non_exhaustive()
    }
}

impl Core {
    pub(crate) fn new(
        layout: Layout,
        read: ReadMemory,
        options: WindowOptions,
    ) -> io::Result<Core> {
        Ok(Core {
            states: CutStates::all_unsaved(layout.pages())?,
            layout,
            phase: Mutex::default(),
            staging: Staging::new(options.staging_bytes),
            tracks: options.tracks,
            read,
            failure: OnceLock::new(),
            faults: AtomicU64::new(0),
            copied_pages: AtomicU64::new(0),
        })
    }

    /// A page was installed: it is not protected. The caller holds the slice lock, and then sets its state.
    pub(crate) fn installed(&self, page: u64, from: PageState) {
        let mut phase = self.lock();
        if phase.cut {
            self.changed(page, from);
        }
        if !phase.cut || self.tracks {
            phase.note(self.block(page).start);
        }
    }

    /// A page is about to be given back. The caller holds the slice lock.
    pub(crate) fn removed(&self, page: u64, from: PageState) {
        let mut phase = self.lock();
        if phase.cut {
            self.changed(page, from);
        }
        if self.tracks {
            // It is zero now, and not protected.
            phase.note(self.block(page).start);
        }
    }

    /// The bytes of a page change after the cut. Before it, the page was in state `from`, or had another change.
    fn changed(&self, page: u64, from: PageState) {
        match CutState::without_bytes(from) {
            Some(state) => self.states.exclude(page, state),
            // Its bytes are still needed, unless they are copied. If it was installed although its state was `Present`,
            // it was given back without a report.
            None if !self.is_done(page) => {
                self.fail(format!("page {page} was given back while the guest was saved"));
            }
            None => {}
        }
    }

    /// Lets a thread write that waits at `host_addr`. Before the cut its block is noted; after it, it is copied first.
    ///
    /// # Errors
    /// `EAGAIN`: an event is queued. The caller reads it and calls again. Any other: the page stays protected.
    pub(crate) fn answer(&self, protect: &dyn Protect, host_addr: u64) -> Result<(), Errno> {
        let Some(place) = self.layout.at_host(host_addr) else { return Ok(()) };
        self.faults.fetch_add(1, Ordering::Relaxed);
        let mut block = self.block(place.page);
        if self.staging.is_short(BLOCK_PAGES as usize) {
            block = place.page..place.page + 1;
        }
        let mut phase = self.lock();
        while phase.cut && !phase.closed && self.failure().is_none() && self.needs(protect, &block)
        {
            phase.rounds.copying += 1;
            drop(phase);
            self.stage(protect, block.clone());
            phase = self.lock();
            phase.rounds.copying -= 1;
        }
        if phase.notes(self.tracks) {
            phase.note(self.block(place.page).start);
        }
        // Under the lock, so that no cut comes in between.
        self.unprotect_now(protect, block)
    }

    /// Whether a page of the cut is in memory only.
    fn needs(&self, protect: &dyn Protect, block: &Range<u64>) -> bool {
        block.clone().any(|page| !self.is_done(page) && protect.is_present(page))
    }

    /// Copies the pages of a block that are not saved. If the window is closed meanwhile, they are not needed.
    fn stage(&self, protect: &dyn Protect, block: Range<u64>) {
        // Before a page is claimed: the sweep, which makes room, waits for claimed pages. It may also save these pages
        // meanwhile.
        let room = (block.end - block.start) as usize;
        if !self.staging.admit(room, || self.needs(protect, &block)) {
            return;
        }
        let needed = |page: &u64| !self.is_done(*page) && protect.is_present(*page);
        let mut used = 0;
        for page in block.clone().filter(needed).filter(|&page| self.states.claim(page)) {
            let mut bytes = vec![0; PAGE_BYTES].into_boxed_slice();
            if let Some(place) = self.layout.at_page(page)
                && let Err(error) = (self.read)(self.layout.source_offset(place), &mut bytes)
            {
                self.fail(format!("cannot read page {page}: {error}"));
            }
            self.staging.put(page, bytes);
            self.states.set(page, CutState::Staged);
            used += 1;
        }
        self.staging.dismiss(room - used);
        self.copied_pages.fetch_add(used as u64, Ordering::Relaxed);
        block.for_each(|page| self.wait_for_claim(page));
    }

    fn is_done(&self, page: u64) -> bool {
        self.states.of(page).is_done()
    }

    /// Waits for the thread that copies a page, which takes microseconds.
    pub(super) fn wait_for_claim(&self, page: u64) {
        while self.states.of(page) == CutState::Claimed {
            thread::yield_now();
        }
    }

    /// Reads whole pages as they were at the cut. Each page can be read once.
    pub(crate) fn read(
        &self,
        protect: &dyn Protect,
        buf: &mut [u8],
        source_offset: u64,
    ) -> io::Result<()> {
        if let Some(reason) = self.failure() {
            return Err(io::Error::other(reason.to_owned()));
        }
        let (mut at, mut rest, mut hint) = (source_offset, buf, 0);
        while !rest.is_empty() {
            let outside = || io::Error::from(io::ErrorKind::UnexpectedEof);
            let place = self.layout.at_source(at, hint).ok_or_else(outside)?;
            hint = place.extent;
            let end = self.layout.extent(place.extent).end_page(self.layout.page_bytes());
            let end = end.min(place.page + (rest.len() / PAGE_BYTES) as u64);
            let claimed =
                (place.page..end).take_while(|&page| self.states.claim(page)).count() as u64;
            let len = claimed.max(1) as usize * PAGE_BYTES;
            let (now, later) = rest.split_at_mut_checked(len).ok_or_else(outside)?;
            match claimed {
                0 => self.take(place.page, now)?,
                pages => self.save(protect, place.page..place.page + pages, at, now)?,
            }
            rest = later;
            at += len as u64;
        }
        Ok(())
    }

    /// Copies pages that the caller has claimed, and lets them be written.
    fn save(
        &self,
        protect: &dyn Protect,
        pages: Range<u64>,
        source_offset: u64,
        buf: &mut [u8],
    ) -> io::Result<()> {
        let read = (self.read)(source_offset, buf);
        if let Err(error) = &read {
            self.fail(format!("cannot read memory at source offset {source_offset}: {error}"));
        }
        let writable = match self.tracks {
            false => self.protect(protect, pages.clone(), false),
            // A thread that waits to write is answered by the thread that has its fault.
            true => Ok(()),
        };
        if let Err(error) = &writable {
            self.fail(error.to_string());
        }
        // After the failure, which `close` looks for when it finds this state.
        pages.for_each(|page| self.states.set(page, CutState::Saved));
        self.staging.look_again();
        writable.map_err(io::Error::other)?;
        read
    }

    /// Takes a page that the sweep has not claimed itself.
    fn take(&self, page: u64, buf: &mut [u8]) -> io::Result<()> {
        self.wait_for_claim(page);
        match self.states.of(page) {
            CutState::Staged => match self.staging.take(page) {
                Some(bytes) => {
                    buf.copy_from_slice(&bytes);
                    self.states.set(page, CutState::Saved);
                    Ok(())
                }
                None => Err(io::Error::other("the save has ended")),
            },
            CutState::Zero => {
                buf.fill(0);
                Ok(())
            }
            // Its bytes in memory may be new.
            state => Err(io::Error::other(format!("page {page} cannot be read: it is {state:?}"))),
        }
    }

    /// Whether memory of a pager had the page at the cut. A page that was given back before counts: it is zero. The
    /// caller holds the slice lock.
    pub(crate) fn is_own(&self, page: u64, state: PageState) -> bool {
        if state == PageState::Removed {
            // Only if nothing is known of it: it may have been removed after the cut.
            self.states.exclude(page, CutState::Zero);
        }
        state != PageState::Missing && self.states.of(page) != CutState::Missing
    }

    /// Pages that are in none of these parts of the source are not read: they can be written without a copy.
    pub(crate) fn only(&self, protect: &dyn Protect, parts: &[Range<u64>]) {
        let mut parts: Vec<_> = parts.to_vec();
        parts.sort_unstable_by_key(|part| part.start);
        for (first_page, source) in self.layout.by_source() {
            let mut at = source.start;
            let inside = |part: &&Range<u64>| part.end > source.start && part.start < source.end;
            let end = source.end..source.end;
            for part in parts.iter().filter(inside).chain([&end]) {
                let page_of = |offset| first_page + (offset - source.start) / PAGE_BYTES as u64;
                if at < part.start {
                    self.give_up(protect, page_of(at)..page_of(part.start));
                }
                at = at.max(part.end);
            }
        }
    }

    /// Lets pages of one extent be written that are not read.
    fn give_up(&self, protect: &dyn Protect, pages: Range<u64>) {
        for first in pages.clone().step_by(STEP_PAGES as usize) {
            let step = first..(first + STEP_PAGES).min(pages.end);
            for page in step.clone() {
                self.states.exclude(page, CutState::Zero);
                self.wait_for_claim(page);
                if self.states.of(page) == CutState::Staged {
                    drop(self.staging.take(page));
                }
            }
            if !self.tracks {
                // A page that stays protected is made writable by the next fault.
                let _ = self.protect(protect, step, false);
            }
        }
        self.staging.look_again();
    }

    /// The window has ended: all memory can be written.
    pub(crate) fn close(&self, protect: &dyn Protect) {
        self.lock().closed = true;
        self.staging.close();
        for extent in self.layout.extents() {
            let pages = extent.first_page..extent.end_page(self.layout.page_bytes());
            for first in pages.clone().step_by(STEP_PAGES as usize) {
                let step = first..(first + STEP_PAGES).min(pages.end);
                let writable =
                    |page| matches!(self.states.of(page), CutState::Saved | CutState::Staged);
                // A page that stays protected is made writable by the next fault. After a failure, one may be protected
                // in spite of its state.
                if self.tracks || !step.clone().all(writable) || self.failure().is_some() {
                    let _ = self.protect(protect, step, false);
                }
            }
        }
    }

    /// Whether the write faults of protected pages are still answered.
    pub(super) fn check_open(&self, phase: &Phase) -> Result<(), WindowError> {
        match self.failure() {
            Some(reason) => Err(WindowError::ended(reason)),
            None if phase.closed => Err(WindowError::ended("it was closed")),
            None => Ok(()),
        }
    }

    /// The save must not be used: its file is not that of one point in time.
    pub(crate) fn fail(&self, reason: String) {
        let _ = self.failure.set(reason);
        self.staging.close();
    }

    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Counts from 0 again.
    pub(super) fn forget_stats(&self) {
        self.faults.store(0, Ordering::Relaxed);
        self.copied_pages.store(0, Ordering::Relaxed);
        self.staging.forget_waits();
    }

    pub(crate) fn stats(&self) -> WindowStats {
        WindowStats {
            faults: self.faults.load(Ordering::Relaxed),
            copied_bytes: self.copied_pages.load(Ordering::Relaxed) * PAGE_BYTES as u64,
            waits: self.staging.waits(),
        }
    }

    /// The block of a page, which is in one extent.
    pub(super) fn block(&self, page: u64) -> Range<u64> {
        let first = page - page % BLOCK_PAGES;
        let extent = self.layout.at_page(page).map(|place| self.layout.extent(place.extent));
        let pages = extent.map_or(page..page + 1, |extent| {
            extent.first_page..extent.end_page(self.layout.page_bytes())
        });
        first.max(pages.start)..(first + BLOCK_PAGES).min(pages.end)
    }

    /// The parts of consecutive pages that are in one extent each.
    pub(super) fn parts(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        self.layout.extents().iter().filter_map(move |extent| {
            let end = extent.end_page(self.layout.page_bytes());
            let part = pages.start.max(extent.first_page)..pages.end.min(end);
            (!part.is_empty()).then_some(part)
        })
    }

    /// Changes the protection of pages of one extent, and waits while the memory map changes.
    pub(super) fn protect(
        &self,
        protect: &dyn Protect,
        pages: Range<u64>,
        on: bool,
    ) -> Result<(), WindowError> {
        let Some(place) = self.layout.at_page(pages.start) else { return Ok(()) };
        let len = (pages.end - pages.start) * PAGE_BYTES as u64;
        for _ in 0..CHANGE_TRIES {
            match protect.protect(place.host_addr, len, on) {
                Ok(()) => return Ok(()),
                Err(Errno(libc::EAGAIN)) => thread::sleep(CHANGE_PAUSE),
                Err(errno) => {
                    return Err(WindowError::Protect { host_addr: place.host_addr, errno });
                }
            }
        }
        Err(WindowError::Protect { host_addr: place.host_addr, errno: Errno(libc::EAGAIN) })
    }

    /// As [`Core::protect`], in the thread that reads events: it must not wait for itself.
    fn unprotect_now(&self, protect: &dyn Protect, pages: Range<u64>) -> Result<(), Errno> {
        let Some(place) = self.layout.at_page(pages.start) else { return Ok(()) };
        let len = (pages.end - pages.start) * PAGE_BYTES as u64;
        protect.protect(place.host_addr, len, false)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Phase> {
        // The data is consistent whenever the lock is released.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
