//! Fills pages by ioctls, and handles every errno of doing so.
//!
//! | result of the ioctl | meaning | reaction |
//! |---|---|---|
//! | all bytes | installed, waiting threads woken | the pages are recorded as filled |
//! | fewer bytes than requested (`EAGAIN` with a count) | the next page is present, or the memory map is changing | the pages are recorded, the rest is tried again |
//! | `EEXIST` | the first page is already present | it is left alone and recorded as existing; the threads that wait for it are woken (they may have faulted after the thread that filled it); the install continues behind it |
//! | `EAGAIN` | an event (REMOVE, ...) is queued: the memory map is changing | the events are read and applied, then the pages that are *still* wanted are tried again |
//! | `ENOENT` | the range is not inside one registered mapping | page by page; a single page with this result is unmapped: it is recorded as removed, and its waiting threads are woken |
//! | `ESRCH` | the process that owned the memory has ended | an error: the service ends |
//! | `ENOMEM` | no page is free now (limit of a cgroup) | up to [`ENOMEM_TRIES`] retries, [`ENOMEM_PAUSE`] apart, then an error |
//! | others (`EINVAL`, `EFAULT`) | a bug, or memory that is used wrongly | an error |
//!
//! Source: `ioctl_userfaultfd(2)`; the counts and the order of checks are from the kernel's `fs/userfaultfd.c`.
#![allow(unsafe_code)]

use std::thread;
use std::time::Duration;

use crate::uffd::{Errno, Uffd};

/// The number of retries of an install after `ENOMEM`.
pub(crate) const ENOMEM_TRIES: u32 = 50;
/// The pause between two of these retries.
pub(crate) const ENOMEM_PAUSE: Duration = Duration::from_millis(2);

/// The ioctls that an install needs. Each fills whole pages and returns how many bytes it filled.
pub(crate) trait PageOps {
    fn copy(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno>;
    /// As `copy`, but it wakes no thread.
    fn copy_without_waking(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno>;
    fn zero(&self, host_addr: u64, len: usize) -> Result<usize, Errno>;
    fn poison(&self, host_addr: u64, len: usize) -> Result<usize, Errno>;
    fn wake(&self, host_addr: u64, len: usize) -> Result<(), Errno>;
}

/// Where consecutive pages go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) first_page: u64,
    pub(crate) pages: usize,
    pub(crate) host_addr: u64,
    pub(crate) page_bytes: usize,
}

/// What they are filled with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fill<'a> {
    /// These bytes, as many as the target has.
    Copy(&'a [u8]),
    /// The same, but no thread is woken.
    CopyWithoutWaking(&'a [u8]),
    /// Zeros.
    Zero,
    /// The mark that makes an access fail.
    Poison,
}

/// Keeps the page states during an install: it decides which pages are wanted, and records what happened to them.
pub(crate) trait InstallObserver {
    /// Whether the page shall be filled now.
    fn wants(&self, _page: u64) -> bool {
        true
    }
    /// The pages were filled.
    fn filled(&mut self, _first_page: u64, _pages: usize) {}
    /// The page was already in memory.
    fn existing(&mut self, _page: u64) {}
    /// The page is not mapped any more.
    fn gone(&mut self, _page: u64) {}
    /// The memory map is changing: reads and applies the queued events, so that the change can end.
    fn drain_events(&mut self) -> Drained;
}

/// The result of [`InstallObserver::drain_events`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drained {
    /// Try the pages that are still wanted again.
    Retry,
    /// Leave the rest out: no thread waits for it, or the pager is stopping.
    GiveUp,
}

/// Why pages could not be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InstallError {
    /// The process that owned the memory has ended.
    ProcessGone,
    /// The kernel refused.
    Refused { ioctl: &'static str, host_addr: u64, errno: Errno },
}

/// Fills the pages of `target` that `observer` wants. It does not touch the others.
pub(crate) fn install(
    ops: &impl PageOps,
    target: Target,
    fill: Fill<'_>,
    observer: &mut impl InstallObserver,
) -> Result<(), InstallError> {
    let page_bytes = target.page_bytes;
    let mut at = 0; // The number of pages of the target that are dealt with.
    let mut longest = target.pages;
    let mut enomem_tries = 0;
    while at < target.pages {
        let page = target.first_page + at as u64;
        if !observer.wants(page) {
            at += 1;
            continue;
        }
        let wanted = (1..(target.pages - at).min(longest))
            .find(|&ahead| !observer.wants(page + ahead as u64))
            .unwrap_or((target.pages - at).min(longest));
        let host_addr = target.host_addr + (at * page_bytes) as u64;
        let len = wanted * page_bytes;
        let (ioctl, done) = match fill {
            Fill::Copy(bytes) => {
                let from = at * page_bytes;
                ("UFFDIO_COPY", ops.copy(host_addr, &bytes[from..from + len]))
            }
            Fill::CopyWithoutWaking(bytes) => {
                let from = at * page_bytes;
                ("UFFDIO_COPY", ops.copy_without_waking(host_addr, &bytes[from..from + len]))
            }
            Fill::Zero => ("UFFDIO_ZEROPAGE", ops.zero(host_addr, len)),
            Fill::Poison => ("UFFDIO_POISON", ops.poison(host_addr, len)),
        };
        match done {
            Ok(bytes) => {
                let pages = bytes / page_bytes;
                observer.filled(page, pages);
                at += pages;
            }
            Err(Errno(libc::EEXIST)) => {
                observer.existing(page);
                wake(ops, host_addr, page_bytes)?;
                at += 1;
            }
            Err(Errno(libc::EAGAIN)) => match observer.drain_events() {
                Drained::Retry => {}
                Drained::GiveUp => return Ok(()),
            },
            Err(Errno(libc::ENOENT)) if wanted > 1 => longest = 1,
            Err(Errno(libc::ENOENT)) => {
                observer.gone(page);
                wake(ops, host_addr, page_bytes)?;
                at += 1;
            }
            Err(Errno(libc::ESRCH)) => return Err(InstallError::ProcessGone),
            Err(Errno(libc::ENOMEM)) if enomem_tries < ENOMEM_TRIES => {
                enomem_tries += 1;
                thread::sleep(ENOMEM_PAUSE);
            }
            Err(errno) => {
                return Err(InstallError::Refused { ioctl, host_addr, errno });
            }
        }
    }
    Ok(())
}

/// Wakes the threads that wait for pages of a range, so that they try again.
pub(crate) fn wake(ops: &impl PageOps, host_addr: u64, len: usize) -> Result<(), InstallError> {
    ops.wake(host_addr, len).map_err(|errno| match errno {
        Errno(libc::ESRCH) => InstallError::ProcessGone,
        errno => InstallError::Refused { ioctl: "UFFDIO_WAKE", host_addr, errno },
    })
}

/// A userfaultfd. If its memory has no `UFFDIO_ZEROPAGE` (hugetlbfs), a page of zeros is copied instead.
#[derive(Debug)]
pub(crate) struct Filler {
    pub(crate) uffd: Uffd,
    /// One page of zeros, for memory without `UFFDIO_ZEROPAGE`.
    pub(crate) zeros: Option<Box<[u8]>>,
}

// The proof for all of these methods: a `Target` is made from places of the layout. `register::all` has registered all
// of these with the userfaultfd of their slice. The contract of `Region::new` holds until the pager has stopped, and
// only the threads of the pager call these methods. Foreign regions are used only with a `ForeignUffd`, whose ioctls
// reach no memory of this process. The addresses in the memory of a refused client come from its own messages.
impl PageOps for Filler {
    fn copy(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
        // SAFETY: see above.
        unsafe { self.uffd.copy(host_addr, bytes) }
    }

    fn copy_without_waking(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
        // SAFETY: see above.
        unsafe { self.uffd.copy_without_waking(host_addr, bytes) }
    }

    fn zero(&self, host_addr: u64, len: usize) -> Result<usize, Errno> {
        match &self.zeros {
            // SAFETY: see above.
            None => unsafe { self.uffd.zero(host_addr, len) },
            // SAFETY: see above.
            Some(zeros) => unsafe { self.uffd.copy(host_addr, zeros) },
        }
    }

    fn poison(&self, host_addr: u64, len: usize) -> Result<usize, Errno> {
        // SAFETY: see above.
        unsafe { self.uffd.poison(host_addr, len) }
    }

    fn wake(&self, host_addr: u64, len: usize) -> Result<(), Errno> {
        self.uffd.wake(host_addr, len)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::{BTreeMap, VecDeque};

    use proptest::prelude::*;

    use super::*;
    use crate::region::PAGE_BYTES as PAGE;

    const BASE: u64 = 0x10_0000;

    /// A kernel that follows a script: each call takes the next result. After the last one, calls succeed.
    #[derive(Default)]
    struct Kernel {
        script: RefCell<VecDeque<Result<usize, Errno>>>,
        memory: RefCell<BTreeMap<u64, u8>>,
        woken: RefCell<Vec<u64>>,
    }

    impl Kernel {
        fn with_results(script: &[Result<usize, i32>]) -> Kernel {
            let script = script.iter().map(|answer| answer.map_err(Errno)).collect();
            Kernel { script: RefCell::new(script), ..Kernel::default() }
        }

        fn put(
            &self,
            host_addr: u64,
            content: impl Fn(usize) -> u8,
            len: usize,
        ) -> Result<usize, Errno> {
            let pages = match self.script.borrow_mut().pop_front() {
                Some(answer) => answer?.min(len / PAGE),
                None => len / PAGE,
            };
            let mut memory = self.memory.borrow_mut();
            for page in 0..pages {
                let addr = host_addr + (page * PAGE) as u64;
                if memory.contains_key(&addr) {
                    return if page == 0 { Err(Errno(libc::EEXIST)) } else { Ok(page * PAGE) };
                }
                memory.insert(addr, content(page));
            }
            Ok(pages * PAGE)
        }
    }

    impl PageOps for Kernel {
        fn copy(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
            self.put(host_addr, |page| bytes[page * PAGE], bytes.len())
        }
        fn copy_without_waking(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
            self.copy(host_addr, bytes)
        }
        fn zero(&self, host_addr: u64, len: usize) -> Result<usize, Errno> {
            self.put(host_addr, |_| 0, len)
        }
        fn poison(&self, host_addr: u64, len: usize) -> Result<usize, Errno> {
            self.put(host_addr, |_| 0xff, len)
        }
        fn wake(&self, host_addr: u64, _: usize) -> Result<(), Errno> {
            self.woken.borrow_mut().push(host_addr);
            Ok(())
        }
    }

    #[derive(Default)]
    struct TestObserver {
        done: BTreeMap<u64, &'static str>,
        drains: usize,
        /// Pages that a REMOVE takes away when events are drained.
        removed_on_drain: Vec<u64>,
        give_up: bool,
    }

    impl InstallObserver for TestObserver {
        fn wants(&self, page: u64) -> bool {
            !self.done.contains_key(&page)
        }
        fn filled(&mut self, first_page: u64, pages: usize) {
            for page in first_page..first_page + pages as u64 {
                assert_eq!(self.done.insert(page, "filled"), None);
            }
        }
        fn existing(&mut self, page: u64) {
            assert_eq!(self.done.insert(page, "existing"), None);
        }
        fn gone(&mut self, page: u64) {
            assert_eq!(self.done.insert(page, "gone"), None);
        }
        fn drain_events(&mut self) -> Drained {
            self.drains += 1;
            for page in self.removed_on_drain.drain(..) {
                self.done.insert(page, "removed");
            }
            if self.give_up { Drained::GiveUp } else { Drained::Retry }
        }
    }

    fn four_pages() -> (Target, Vec<u8>) {
        let bytes = (0..4u8).flat_map(|page| [page + 1; PAGE]).collect();
        (Target { first_page: 0, pages: 4, host_addr: BASE, page_bytes: PAGE }, bytes)
    }

    fn run(kernel: &Kernel, observer: &mut TestObserver) -> Result<(), InstallError> {
        let (target, bytes) = four_pages();
        install(kernel, target, Fill::Copy(&bytes), observer)
    }

    fn states(observer: &TestObserver) -> Vec<&'static str> {
        (0..4).map(|page| observer.done.get(&page).copied().unwrap_or("missing")).collect()
    }

    #[test]
    fn a_short_copy_is_continued_with_the_right_bytes() {
        let kernel = Kernel::with_results(&[Ok(1), Ok(2)]);
        let mut observer = TestObserver::default();
        run(&kernel, &mut observer).expect("all is well");
        assert_eq!(states(&observer), ["filled"; 4]);
        assert_eq!(kernel.memory.borrow().values().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
    }

    #[test]
    fn existing_pages_are_kept_woken_and_skipped() {
        let kernel = Kernel::default();
        kernel.memory.borrow_mut().insert(BASE + 4096, 0x77);
        let mut observer = TestObserver::default();
        run(&kernel, &mut observer).expect("all is well");
        assert_eq!(states(&observer), ["filled", "existing", "filled", "filled"]);
        assert_eq!(kernel.memory.borrow()[&(BASE + 4096)], 0x77);
        assert_eq!(*kernel.woken.borrow(), [BASE + 4096]);
    }

    /// A REMOVE is queued during an install: the removed page must not get the content of the source again.
    #[test]
    fn pages_removed_while_draining_are_not_installed() {
        let kernel = Kernel::with_results(&[Ok(1), Err(libc::EAGAIN), Err(libc::EAGAIN)]);
        let mut observer = TestObserver { removed_on_drain: vec![2], ..TestObserver::default() };
        run(&kernel, &mut observer).expect("all is well");
        assert_eq!(states(&observer), ["filled", "filled", "removed", "filled"]);
        assert!(!kernel.memory.borrow().contains_key(&(BASE + 2 * 4096)));
        assert_eq!(observer.drains, 2);
    }

    #[test]
    fn giving_up_leaves_the_rest_missing() {
        let kernel = Kernel::with_results(&[Ok(1), Err(libc::EAGAIN)]);
        let mut observer = TestObserver { give_up: true, ..TestObserver::default() };
        run(&kernel, &mut observer).expect("giving up is no error");
        assert_eq!(states(&observer), ["filled", "missing", "missing", "missing"]);
    }

    #[test]
    fn unmapped_pages_are_found_one_by_one() {
        let kernel = Kernel::with_results(&[Err(libc::ENOENT), Ok(1), Err(libc::ENOENT)]);
        let mut observer = TestObserver::default();
        run(&kernel, &mut observer).expect("all is well");
        assert_eq!(states(&observer), ["filled", "gone", "filled", "filled"]);
        assert_eq!(*kernel.woken.borrow(), [BASE + 4096]);
    }

    #[test]
    fn enomem_is_retried_with_a_limit() {
        let mut observer = TestObserver::default();
        run(&Kernel::with_results(&[Err(libc::ENOMEM)]), &mut observer)
            .expect("the second try succeeds");
        assert_eq!(states(&observer), ["filled"; 4]);

        let kernel = Kernel::with_results(&vec![Err(libc::ENOMEM); ENOMEM_TRIES as usize + 1]);
        let error = run(&kernel, &mut TestObserver::default()).expect_err("there is no memory");
        let errno = Errno(libc::ENOMEM);
        assert_eq!(error, InstallError::Refused { ioctl: "UFFDIO_COPY", host_addr: BASE, errno });
    }

    #[test]
    fn a_dead_process_and_a_refusal_end_it() {
        let error = run(&Kernel::with_results(&[Err(libc::ESRCH)]), &mut TestObserver::default());
        assert_eq!(error, Err(InstallError::ProcessGone));
        let error =
            run(&Kernel::with_results(&[Ok(3), Err(libc::EINVAL)]), &mut TestObserver::default());
        assert!(
            matches!(error, Err(InstallError::Refused { host_addr, .. }) if host_addr == BASE + 3 * 4096)
        );
    }

    proptest! {
        /// Whatever the kernel returns, each page is recorded once, and has the bytes of the source or its own.
        #[test]
        fn any_script_ends_with_every_page_accounted_for(
            script in prop::collection::vec(
                prop_oneof![
                    (1usize..4).prop_map(Ok),
                    Just(Err(libc::EAGAIN)),
                    Just(Err(libc::EEXIST)),
                    Just(Err(libc::ENOENT)),
                ],
                0..20,
            ),
        ) {
            let kernel = Kernel::with_results(&script);
            let mut observer = TestObserver::default();
            prop_assert_eq!(run(&kernel, &mut observer), Ok(()));
            for page in 0..4u64 {
                let content = kernel.memory.borrow().get(&(BASE + page * 4096)).copied();
                match observer.done[&page] {
                    "filled" => prop_assert_eq!(content, Some(page as u8 + 1)),
                    _ => prop_assert_eq!(content, None),
                }
            }
        }
    }
}
