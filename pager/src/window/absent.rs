//! Pages that a pager has installed, and that are not in memory.
//!
//! A page is given back in two steps: the pager reads the message, and then the kernel drops the page. A fault between
//! the two finds the page in memory, so that its state becomes `Present` again. A window must not find such a page: the
//! thread that answers the faults would wait for itself when it reads the page. It is zero.

use std::io;
use std::ops::Range;
use std::thread;

use super::core::{CHANGE_PAUSE, CHANGE_TRIES};
use super::error::WindowError;
use crate::install::kernel::{InstallError, Target};
use crate::install::page_state::PageState;
use crate::layout::Extent;
use crate::pagemap::Pagemap;
use crate::pager_state::PagerState;
use crate::region::PAGE_BYTES;

/// Pages that are looked at while a slice lock is held.
const LOCKED_PAGES: u64 = 4096;

/// Fills them with zeros. The caller makes sure that no page is given back meanwhile, or after it.
pub(super) fn fill(shared: &PagerState) -> Result<(), WindowError> {
    let failed = |error| WindowError::System { what: "all installed pages in memory", error };
    let mut pagemap = Pagemap::open().map_err(failed)?;
    for extent in shared.layout.extents() {
        let pages = extent.first_page..extent.end_page(PAGE_BYTES as u64);
        for first in pages.clone().step_by(LOCKED_PAGES as usize) {
            let part = first..(first + LOCKED_PAGES).min(pages.end);
            let mut tries = 0;
            while !fill_part(shared, &mut pagemap, extent, part.clone()).map_err(failed)? {
                if tries == CHANGE_TRIES {
                    return Err(failed(io::Error::from_raw_os_error(libc::EAGAIN)));
                }
                tries += 1;
                thread::sleep(CHANGE_PAUSE);
            }
        }
    }
    Ok(())
}

/// Fills pages of one extent. Returns `false` if the memory map is changing.
fn fill_part(
    shared: &PagerState,
    pagemap: &mut Pagemap,
    extent: &Extent,
    pages: Range<u64>,
) -> io::Result<bool> {
    let installed = |&page: &u64| shared.states.of(page) == PageState::Present;
    let _lock = shared.slices[extent.slice].lock.for_background();
    if !pages.clone().any(|page| installed(&page)) {
        return Ok(true);
    }
    let addr_of = |page| extent.host.start + (page - extent.first_page) * PAGE_BYTES as u64;
    let count = (pages.end - pages.start) as usize;
    let entries = pagemap.entries(addr_of(pages.start), count)?;
    let unmapped = pages.zip(entries).filter(|(_, entry)| !entry.is_mapped());
    for page in unmapped.map(|(page, _)| page).filter(installed) {
        // Memory that is shared may be there without being mapped. The kernel knows.
        let target =
            Target { first_page: page, pages: 1, host_addr: addr_of(page), page_bytes: PAGE_BYTES };
        let filled = shared.fill_absent(extent.slice, target).map_err(|error| match error {
            InstallError::ProcessGone => io::Error::from_raw_os_error(libc::ESRCH),
            InstallError::Refused { errno, .. } => errno.into(),
        })?;
        if !filled {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::mapping::Mapping;
    use crate::window::WindowOptions;
    use crate::{Pager, Region, VecSource};

    const PAGES: usize = 64;

    /// Otherwise the copy of this page waits for the thread that makes it.
    #[test]
    fn a_page_that_is_present_only_by_its_state_becomes_zero() {
        let memory = Arc::new(Mapping::anonymous(PAGES * PAGE_BYTES).expect("memory"));
        let at = memory.at(0, 1).as_ptr();
        // SAFETY: mapped until the pager has stopped, and accessed only through a raw pointer.
        let region = unsafe { Region::new(at as u64, (PAGES * PAGE_BYTES) as u64, PAGE_BYTES, 0) };
        let source = Arc::new(VecSource::new(vec![7; PAGES * PAGE_BYTES], PAGE_BYTES));
        let pager = Pager::builder(source).region(region.expect("whole pages")).start();
        let pager = match pager {
            Ok(pager) => pager,
            Err(error) => {
                assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{error}");
                let line = format!("SKIPPED a_page_that_is_present_only_by_its_state: {error}\n");
                return io::Write::write_all(&mut io::stderr(), line.as_bytes()).expect("stderr");
            }
        };
        let byte = |page: usize| memory.at(page * PAGE_BYTES, 1).as_ptr();
        // SAFETY: mapped, and accessed by volatile operations only.
        (0..8).for_each(|page| assert_eq!(unsafe { byte(page).read_volatile() }, 7));
        // SAFETY: mapped, and nothing refers to it.
        let given_back = unsafe { libc::madvise(byte(3).cast(), PAGE_BYTES, libc::MADV_DONTNEED) };
        assert_eq!(given_back, 0);
        {
            // As if a fault had found the page before the kernel dropped it.
            let shared = pager.shared();
            let _lock = shared.slices[0].lock.for_background();
            assert_eq!(shared.states.of(3), PageState::Removed);
            shared.moved(0, 3, PageState::Present, None);
        }
        let read = {
            let memory = Arc::clone(&memory);
            move |offset: u64, buf: &mut [u8]| {
                let mut mapped = Pagemap::open()?;
                let addr = memory.at(offset as usize, 1).as_ptr() as u64;
                let mut entries = mapped.entries(addr, 1)?;
                // Reading it would wait for this thread.
                let entry = entries.next().filter(|entry| entry.is_mapped());
                entry.ok_or_else(|| io::Error::other("it is not in memory"))?;
                // SAFETY: mapped, and accessed by volatile operations only.
                buf.fill(unsafe { memory.at(offset as usize, 1).as_ptr().read_volatile() });
                Ok(())
            }
        };
        let window = match pager.window(Arc::new(read), WindowOptions::default()) {
            Err(WindowError::Register { .. }) => return pager_without_windows(pager),
            window => window.expect("it opens"),
        };
        window.cut().expect("it is cut");
        // The thread of the pager copies the block.
        // SAFETY: mapped, and accessed by volatile operations only.
        unsafe { byte(5).write_volatile(9) };
        window.check().expect("all pages can be read");
        let mut found = vec![1; 8 * PAGE_BYTES];
        for (page, bytes) in found.chunks_mut(PAGE_BYTES).enumerate() {
            window.read(bytes, (page * PAGE_BYTES) as u64).expect("it is read");
        }
        let expected = [7, 7, 7, 0, 7, 7, 7, 7];
        assert!(found.chunks(PAGE_BYTES).map(|page| page[0]).eq(expected));
        drop(window);
        pager.stop();
    }

    fn pager_without_windows(pager: Pager) {
        assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "no write protection");
        pager.stop();
    }
}
