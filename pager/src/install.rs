//! The one place where pages are put into memory, and where every errno of doing so is answered.
//!
//! | kernel's answer | meaning | what is done |
//! |---|---|---|
//! | all bytes | installed, waiting threads woken | booked as filled |
//! | fewer bytes than asked (`EAGAIN` with a count) | the rest hit a page that is there, or the memory map is changing | booked, the rest asked again |
//! | `EEXIST` | the first page is there already | left alone, booked as existing, its waiters woken (they may have queued after the one who filled it), go on behind it |
//! | `EAGAIN` | an event (REMOVE, ...) is queued: the memory map is changing | the events are read and applied, then what is *still* wanted is asked again |
//! | `ENOENT` | the range is not inside one registered mapping | page by page; a single such page is unmapped: booked as gone, waiters woken |
//! | `ESRCH` | the process that owned the memory is gone | stop: there is nobody left to serve |
//! | `ENOMEM` | no page to be had now (cgroup limit) | tried again up to [`ENOMEM_TRIES`] times, [`ENOMEM_PAUSE`] apart, then an error |
//! | anything else (`EINVAL`, `EFAULT`) | a bug or memory misused | an error |
//!
//! Source: `ioctl_userfaultfd(2)`; the counts and the order of checks from the kernel's `fs/userfaultfd.c`.
#![allow(unsafe_code)]

use std::thread;
use std::time::Duration;

use crate::uffd::{Errno, Uffd};

/// How often an install that finds no memory is tried.
pub(crate) const ENOMEM_TRIES: u32 = 50;
/// How long it waits between tries.
pub(crate) const ENOMEM_PAUSE: Duration = Duration::from_millis(2);

/// The ioctls that an install needs; each fills whole pages and answers how many bytes it did.
pub(crate) trait PageOps {
    fn copy(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno>;
    /// Wakes nobody.
    fn copy_quietly(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno>;
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
    /// The same, and nobody is woken by it.
    CopyQuietly(&'a [u8]),
    /// Zeros.
    Zero,
    /// The mark that makes an access fail.
    Poison,
}

/// Who keeps the page states: says which pages are wanted, and is told what became of them.
pub(crate) trait Book {
    /// Whether the page shall be filled, as of now.
    fn wants(&self, page: u64) -> bool;
    fn filled(&mut self, first_page: u64, pages: usize);
    fn existing(&mut self, page: u64);
    fn gone(&mut self, page: u64);
    /// The memory map is changing: let the change come to its end.
    fn settle(&mut self) -> Settled;
}

/// What came of waiting for a change of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Ask again for what is still wanted.
    Retry,
    /// Leave the rest: nobody waits for it, or the pager is stopping.
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

/// Fills the pages of `target` that `book` wants. Whatever is not wanted is not touched.
pub(crate) fn install(
    ops: &impl PageOps,
    target: Target,
    fill: Fill<'_>,
    book: &mut impl Book,
) -> Result<(), InstallError> {
    let page_bytes = target.page_bytes;
    let mut at = 0; // Pages of the target that are dealt with.
    let mut longest = target.pages;
    let mut enomem_tries = 0;
    while at < target.pages {
        let page = target.first_page + at as u64;
        if !book.wants(page) {
            at += 1;
            continue;
        }
        let wanted = (1..(target.pages - at).min(longest))
            .find(|&ahead| !book.wants(page + ahead as u64))
            .unwrap_or((target.pages - at).min(longest));
        let host_addr = target.host_addr + (at * page_bytes) as u64;
        let len = wanted * page_bytes;
        let (ioctl, done) = match fill {
            Fill::Copy(bytes) => {
                let from = at * page_bytes;
                ("UFFDIO_COPY", ops.copy(host_addr, &bytes[from..from + len]))
            }
            Fill::CopyQuietly(bytes) => {
                let from = at * page_bytes;
                ("UFFDIO_COPY", ops.copy_quietly(host_addr, &bytes[from..from + len]))
            }
            Fill::Zero => ("UFFDIO_ZEROPAGE", ops.zero(host_addr, len)),
            Fill::Poison => ("UFFDIO_POISON", ops.poison(host_addr, len)),
        };
        match done {
            Ok(bytes) => {
                let pages = bytes / page_bytes;
                book.filled(page, pages);
                at += pages;
            }
            Err(Errno(libc::EEXIST)) => {
                book.existing(page);
                wake(ops, host_addr, page_bytes)?;
                at += 1;
            }
            Err(Errno(libc::EAGAIN)) => match book.settle() {
                Settled::Retry => {}
                Settled::GiveUp => return Ok(()),
            },
            Err(Errno(libc::ENOENT)) if wanted > 1 => longest = 1,
            Err(Errno(libc::ENOENT)) => {
                book.gone(page);
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

/// Wakes the waiters of a range, so that they try again.
pub(crate) fn wake(ops: &impl PageOps, host_addr: u64, len: usize) -> Result<(), InstallError> {
    ops.wake(host_addr, len).map_err(|errno| match errno {
        Errno(libc::ESRCH) => InstallError::ProcessGone,
        errno => InstallError::Refused { ioctl: "UFFDIO_WAKE", host_addr, errno },
    })
}

/// A userfaultfd whose memory may be of a kind without `UFFDIO_ZEROPAGE` (hugetlbfs): there a page of
/// zeros is copied.
#[derive(Debug)]
pub(crate) struct Filler {
    pub(crate) uffd: Uffd,
    /// One page of zeros, for the kind of memory that needs it.
    pub(crate) zeros: Option<Box<[u8]>>,
}

// The proof for all of them: a `Target` is made of places of the layout, all of which `register::all` has
// registered with the userfaultfd of their slice; what `Region::new` asks for holds until the pager has
// stopped, and only its threads come here. Foreign regions go with a `ForeignUffd` and nothing else: its ioctls
// reach no memory of this process, and where a client that is refused has its memory only its own messages say.
impl PageOps for Filler {
    fn copy(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
        // SAFETY: see above.
        unsafe { self.uffd.copy(host_addr, bytes) }
    }

    fn copy_quietly(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
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

    const PAGE: usize = 4096;
    const BASE: u64 = 0x10_0000;

    /// A kernel that follows a script: each call takes the next answer, or does all when it is used up.
    #[derive(Default)]
    struct Kernel {
        script: RefCell<VecDeque<Result<usize, Errno>>>,
        memory: RefCell<BTreeMap<u64, u8>>,
        woken: RefCell<Vec<u64>>,
    }

    impl Kernel {
        fn answering(script: &[Result<usize, i32>]) -> Kernel {
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
        fn copy_quietly(&self, host_addr: u64, bytes: &[u8]) -> Result<usize, Errno> {
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
    struct Ledger {
        done: BTreeMap<u64, &'static str>,
        settles: usize,
        /// Pages that a REMOVE takes away when the memory map settles.
        removed_on_settle: Vec<u64>,
        give_up: bool,
    }

    impl Book for Ledger {
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
        fn settle(&mut self) -> Settled {
            self.settles += 1;
            for page in self.removed_on_settle.drain(..) {
                self.done.insert(page, "removed");
            }
            if self.give_up { Settled::GiveUp } else { Settled::Retry }
        }
    }

    fn four_pages() -> (Target, Vec<u8>) {
        let bytes = (0..4u8).flat_map(|page| [page + 1; PAGE]).collect();
        (Target { first_page: 0, pages: 4, host_addr: BASE, page_bytes: PAGE }, bytes)
    }

    fn run(kernel: &Kernel, ledger: &mut Ledger) -> Result<(), InstallError> {
        let (target, bytes) = four_pages();
        install(kernel, target, Fill::Copy(&bytes), ledger)
    }

    fn states(ledger: &Ledger) -> Vec<&'static str> {
        (0..4).map(|page| ledger.done.get(&page).copied().unwrap_or("missing")).collect()
    }

    #[test]
    fn a_short_copy_is_continued_with_the_right_bytes() {
        let kernel = Kernel::answering(&[Ok(1), Ok(2)]);
        let mut ledger = Ledger::default();
        run(&kernel, &mut ledger).expect("all is well");
        assert_eq!(states(&ledger), ["filled"; 4]);
        assert_eq!(kernel.memory.borrow().values().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
    }

    #[test]
    fn existing_pages_are_kept_woken_and_skipped() {
        let kernel = Kernel::default();
        kernel.memory.borrow_mut().insert(BASE + 4096, 0x77);
        let mut ledger = Ledger::default();
        run(&kernel, &mut ledger).expect("all is well");
        assert_eq!(states(&ledger), ["filled", "existing", "filled", "filled"]);
        assert_eq!(kernel.memory.borrow()[&(BASE + 4096)], 0x77);
        assert_eq!(*kernel.woken.borrow(), [BASE + 4096]);
    }

    /// A REMOVE queued while a chunk is being installed: what it took away must not come back from the source.
    #[test]
    fn what_was_removed_while_settling_is_not_installed() {
        let kernel = Kernel::answering(&[Ok(1), Err(libc::EAGAIN), Err(libc::EAGAIN)]);
        let mut ledger = Ledger { removed_on_settle: vec![2], ..Ledger::default() };
        run(&kernel, &mut ledger).expect("all is well");
        assert_eq!(states(&ledger), ["filled", "filled", "removed", "filled"]);
        assert!(!kernel.memory.borrow().contains_key(&(BASE + 2 * 4096)));
        assert_eq!(ledger.settles, 2);
    }

    #[test]
    fn giving_up_leaves_the_rest_missing() {
        let kernel = Kernel::answering(&[Ok(1), Err(libc::EAGAIN)]);
        let mut ledger = Ledger { give_up: true, ..Ledger::default() };
        run(&kernel, &mut ledger).expect("giving up is no error");
        assert_eq!(states(&ledger), ["filled", "missing", "missing", "missing"]);
    }

    #[test]
    fn unmapped_pages_are_found_one_by_one() {
        let kernel = Kernel::answering(&[Err(libc::ENOENT), Ok(1), Err(libc::ENOENT)]);
        let mut ledger = Ledger::default();
        run(&kernel, &mut ledger).expect("all is well");
        assert_eq!(states(&ledger), ["filled", "gone", "filled", "filled"]);
        assert_eq!(*kernel.woken.borrow(), [BASE + 4096]);
    }

    #[test]
    fn no_memory_is_tried_again_but_not_for_ever() {
        let mut ledger = Ledger::default();
        run(&Kernel::answering(&[Err(libc::ENOMEM)]), &mut ledger)
            .expect("the second try succeeds");
        assert_eq!(states(&ledger), ["filled"; 4]);

        let kernel = Kernel::answering(&vec![Err(libc::ENOMEM); ENOMEM_TRIES as usize + 1]);
        let error = run(&kernel, &mut Ledger::default()).expect_err("there is no memory");
        let errno = Errno(libc::ENOMEM);
        assert_eq!(error, InstallError::Refused { ioctl: "UFFDIO_COPY", host_addr: BASE, errno });
    }

    #[test]
    fn a_dead_process_and_a_refusal_end_it() {
        let error = run(&Kernel::answering(&[Err(libc::ESRCH)]), &mut Ledger::default());
        assert_eq!(error, Err(InstallError::ProcessGone));
        let error = run(&Kernel::answering(&[Ok(3), Err(libc::EINVAL)]), &mut Ledger::default());
        assert!(
            matches!(error, Err(InstallError::Refused { host_addr, .. }) if host_addr == BASE + 3 * 4096)
        );
    }

    proptest! {
        /// Whatever the kernel answers, a page is booked once, and holds the source's bytes or its own.
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
            let kernel = Kernel::answering(&script);
            let mut ledger = Ledger::default();
            prop_assert_eq!(run(&kernel, &mut ledger), Ok(()));
            for page in 0..4u64 {
                let content = kernel.memory.borrow().get(&(BASE + page * 4096)).copied();
                match ledger.done[&page] {
                    "filled" => prop_assert_eq!(content, Some(page as u8 + 1)),
                    _ => prop_assert_eq!(content, None),
                }
            }
        }
    }
}
