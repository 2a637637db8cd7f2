//! Which pages of a range are in memory: PAGEMAP_SCAN of /proc/self/pagemap, which skips holes, or with a kernel older
//! than 6.7 the entries of all pages.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use linux_raw_sys::general::{PAGE_IS_PRESENT, PAGE_IS_SWAPPED, page_region, pm_scan_arg};

use crate::pagemap::Pagemap;
use crate::region::PAGE_BYTES;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const _: () = assert!(size_of::<pm_scan_arg>() == 0x60);

impl Pagemap {
    /// Whether this kernel has PAGEMAP_SCAN (Linux 6.7), with which pages in memory are found without those that are not.
    #[must_use]
    pub fn has_scan(&self) -> bool {
        self.scan(0, 1).is_ok()
    }

    /// The addresses of those of the `pages` pages from `host_addr` on that are mapped or swapped out, as ascending
    /// ranges. `pages` is at most [`Pagemap::MAX_PAGES`].
    ///
    /// # Errors
    /// As ioctl(2) or pread(2) of /proc/self/pagemap; also if there are too many pages.
    pub(crate) fn mapped(&mut self, host_addr: u64, pages: usize) -> io::Result<Vec<Range<u64>>> {
        match self.scan(host_addr, pages) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                self.mapped_by_entries(host_addr, pages)
            }
            scanned => scanned,
        }
    }

    fn scan(&self, host_addr: u64, pages: usize) -> io::Result<Vec<Range<u64>>> {
        let end = host_addr + (pages * PAGE_BYTES) as u64;
        // Enough for one region a page.
        let mut regions: Vec<page_region> = Vec::with_capacity(pages);
        let categories = u64::from(PAGE_IS_PRESENT | PAGE_IS_SWAPPED);
        let mut argument = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: 0,
            start: host_addr,
            end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.capacity() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: categories,
            return_mask: categories,
        };
        let fd = self.file().as_raw_fd();
        // SAFETY: the descriptor is open, and the argument is what this ioctl takes. Without flags it only looks at
        // page tables. It writes at most `vec_len` regions, for which `regions` has room.
        let found = unsafe { libc::ioctl(fd, PAGEMAP_SCAN as _, &raw mut argument) };
        let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
        if found > regions.capacity() {
            return Err(io::Error::other("PAGEMAP_SCAN has found more than there is room for"));
        }
        // SAFETY: the kernel has written this number of regions, which is within the capacity.
        unsafe { regions.set_len(found) };
        // There is room for all, so the kernel has looked at all pages. `walk_end` does not show it: after more than 512
        // regions the kernel continues by itself, and leaves the address where it did so.
        let mut runs: Vec<Range<u64>> = Vec::new();
        for region in &regions {
            match runs.last_mut() {
                Some(last) if last.end == region.start => last.end = region.end,
                _ => runs.push(region.start..region.end),
            }
        }
        Ok(runs)
    }

    fn mapped_by_entries(&mut self, host_addr: u64, pages: usize) -> io::Result<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let entries = self.entries(host_addr, pages)?;
        for (at, entry) in (host_addr..).step_by(PAGE_BYTES).zip(entries) {
            match runs.last_mut() {
                _ if !entry.is_mapped() => {}
                Some(last) if last.end == at => last.end += PAGE_BYTES as u64,
                _ => runs.push(at..at + PAGE_BYTES as u64),
            }
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;

    #[test]
    fn the_version_of_the_kernel_says_whether_there_is_a_scan() {
        let release =
            std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("there is /proc");
        let mut numbers = release.split('.').map(|number| number.parse().unwrap_or(0));
        let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let pagemap = Pagemap::open().expect("a pagemap");
        assert_eq!(pagemap.has_scan(), version >= (6, 7), "{release}");
    }

    /// The kernel collects 512 ranges at a time.
    #[test]
    fn any_number_of_separate_pages_is_found() {
        const PAGES: usize = 8192;
        let memory = Mapping::anonymous(PAGES * PAGE_BYTES).expect("memory");
        let start = memory.at(0, 1).as_ptr() as u64;
        for page in (0..PAGES).step_by(2) {
            // SAFETY: inside the mapping, to which nothing else refers.
            unsafe { memory.at(page * PAGE_BYTES, 1).as_ptr().write_volatile(1) };
        }
        let mut pagemap = Pagemap::open().expect("it opens");
        let runs = pagemap.mapped(start, PAGES).expect("it is read");
        assert_eq!(pagemap.mapped_by_entries(start, PAGES).expect("it is read"), runs);
        for page in (0..PAGES as u64).step_by(2) {
            let addr = start + page * PAGE_BYTES as u64;
            assert!(runs.iter().any(|run| run.contains(&addr)), "page {page}");
        }
    }

    #[test]
    fn both_ways_find_the_pages_that_were_touched() {
        const PAGES: usize = 2048;
        let memory = Mapping::anonymous(PAGES * PAGE_BYTES).expect("memory");
        let start = memory.at(0, 1).as_ptr() as u64;
        let written = [0, 1, 5, 700, 701, 702, PAGES - 1];
        for page in written {
            // SAFETY: inside the mapping, to which nothing else refers.
            unsafe { memory.at(page * PAGE_BYTES, 1).as_ptr().write_volatile(1) };
        }
        // SAFETY: as above. A page that was only read is the kernel's zero page.
        unsafe { memory.at(9 * PAGE_BYTES, 1).as_ptr().read_volatile() };
        let mut pagemap = Pagemap::open().expect("it opens");
        let runs = pagemap.mapped(start, PAGES).expect("it is read");
        assert_eq!(pagemap.mapped_by_entries(start, PAGES).expect("it is read"), runs);
        // With huge pages there are others, too.
        for page in written.into_iter().chain([9]) {
            let addr = start + (page * PAGE_BYTES) as u64;
            assert!(runs.iter().any(|run| run.contains(&addr)), "page {page}: {runs:?}");
        }
    }
}
