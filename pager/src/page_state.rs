//! The state of every page: one byte each, all "missing" at first, at no cost in the memory's size.
#![allow(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};

/// What the pager knows of a page.
///
/// There is no state "loading": a page's state changes only under its slice's gate, together with the
/// ioctl that changes the page, so no thread can see one half done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum PageState {
    /// Never installed; its content is the source's.
    Missing = 0,
    /// Installed. Never asked of the source again.
    Present = 1,
    /// Given back by the guest (`MADV_DONTNEED`, balloon): reads as zero from now on.
    Removed = 2,
    /// Could not be had: accesses raise SIGBUS.
    Poisoned = 3,
}

impl PageState {
    fn of(byte: u8) -> PageState {
        match byte {
            0 => PageState::Missing,
            1 => PageState::Present,
            2 => PageState::Removed,
            _ => PageState::Poisoned,
        }
    }
}

/// The states of `pages` pages.
#[derive(Debug)]
pub(crate) struct PageStates {
    bytes: NonNull<AtomicU8>,
    pages: usize,
}

impl PageStates {
    /// All missing. The memory is mapped, not filled: only the parts that are looked at become resident
    /// (4096 states, 16 MiB of guest, a page), where an allocator might hand out and clear reused memory.
    pub(crate) fn all_missing(pages: usize) -> io::Result<PageStates> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no other memory.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages.max(1),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let bytes = NonNull::new(address.cast::<AtomicU8>())
            .ok_or_else(|| io::Error::other("mmap answered the address 0"))?;
        Ok(PageStates { bytes, pages })
    }

    pub(crate) fn of(&self, page: u64) -> PageState {
        PageState::of(self.byte(page).load(Ordering::Relaxed))
    }

    /// Sets the state and answers the former one. The caller holds the gate of the page's slice.
    pub(crate) fn set(&self, page: u64, state: PageState) -> PageState {
        PageState::of(self.byte(page).swap(state as u8, Ordering::Relaxed))
    }

    fn byte(&self, page: u64) -> &AtomicU8 {
        let page = page as usize;
        assert!(page < self.pages, "page {page} of {}", self.pages);
        // SAFETY: the mapping holds `pages` bytes, `page` is less than that.
        let byte = unsafe { self.bytes.add(page) };
        // SAFETY: mapped, readable and writable until `self` is dropped, all bit patterns are valid for
        // an AtomicU8, and it is accessed as nothing else.
        unsafe { byte.as_ref() }
    }
}

impl Drop for PageStates {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `all_missing`, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.bytes.as_ptr().cast(), self.pages.max(1)) };
    }
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only accessed by atomics.
unsafe impl Send for PageStates {}
// SAFETY: as above.
unsafe impl Sync for PageStates {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_kept_apart_and_begin_as_missing() {
        let states = PageStates::all_missing(10_000).expect("10 KB can be mapped");
        assert_eq!(states.of(9_999), PageState::Missing);
        for (page, state) in
            [(0, PageState::Present), (1, PageState::Removed), (9_999, PageState::Poisoned)]
        {
            assert_eq!(states.set(page, state), PageState::Missing);
            assert_eq!(states.of(page), state);
        }
        assert_eq!(states.of(2), PageState::Missing);
    }

    #[test]
    #[should_panic(expected = "page 5 of 5")]
    fn a_page_outside_is_refused() {
        PageStates::all_missing(5).expect("5 bytes can be mapped").of(5);
    }
}
