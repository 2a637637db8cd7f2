//! The page states and unapplied messages of a pager, in memory that another process can take over.

use crate::install::page_state::{PageState, PageStates};
use crate::pager_state::PagerState;
use crate::uffd::{Errno, Journal, Message};

/// Page states and a journal in memory that outlives this process.
#[derive(Debug)]
#[cfg_attr(not(feature = "serve"), allow(dead_code))]
pub(crate) struct Records {
    pub(crate) states: PageStates,
    pub(crate) journal: Journal,
    /// Another process has served these pages before.
    pub(crate) resumed: bool,
}

/// Continues the service of a process that was killed, at whatever moment. Returns an event that cannot be served, if
/// that process has read one.
///
/// The state of a page changes after the ioctl that fills the page, so that the state may be out of date. Then the next
/// install finds the page in memory (`EEXIST`). A removal is in the states or in the journal, so that a `Missing` page
/// was never removed. Faults that were read and not answered come again after their threads are woken.
///
/// # Errors
/// As `UFFDIO_WAKE`.
pub(crate) fn resume(shared: &PagerState, journal: &Journal) -> Result<Option<Message>, Errno> {
    let mut counts = [0; 4];
    (0..shared.layout.pages()).for_each(|page| counts[shared.states.of(page) as usize] += 1);
    for to in [PageState::Present, PageState::Removed, PageState::Poisoned] {
        shared.slices[0].counters.moved(PageState::Missing, to, counts[to as usize]);
    }
    let mut unserved = None;
    let lock = shared.slices[0].lock.for_demand();
    for message in journal.left() {
        match message {
            Message::Pagefault { .. } => {}
            Message::Remove { start, end } | Message::Unmap { start, end } if !shared.backed => {
                shared.removed(0, start..end);
            }
            other => unserved = Some(other),
        }
    }
    journal.clear(Journal::BYTES);
    drop(lock);
    for extent in shared.layout.extents_of(0) {
        let len = extent.host.end - extent.host.start;
        shared.slices[0].filler.uffd.wake(extent.host.start, len as usize)?;
    }
    Ok(unserved)
}

#[cfg(all(test, feature = "serve"))]
#[allow(unsafe_code)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;
    use std::thread;

    use super::*;
    use crate::mapping::Mapping;
    use crate::region::PAGE_BYTES as PAGE;
    use crate::remote::keep::{HandoverState, Record};
    use crate::uffd::{Features, ForeignUffd, MessageBatch, Uffd};
    use crate::{Pager, Region, StartError, VecSource};

    const PAGES: usize = 16;

    /// Guest memory of this process, served as if it belonged to another process.
    struct Guest(Mapping);

    impl Guest {
        fn read(&self, page: usize) -> u8 {
            // SAFETY: mapped, and only accessed by volatile operations.
            unsafe { self.0.at(page * PAGE, 1).as_ptr().read_volatile() }
        }

        fn remove(&self, page: usize) {
            let at = self.0.at(page * PAGE, PAGE).as_ptr().cast();
            // SAFETY: mapped, and no references into it exist.
            assert_eq!(unsafe { libc::madvise(at, PAGE, libc::MADV_DONTNEED) }, 0);
        }

        fn address(&self, page: usize) -> u64 {
            self.0.at(page * PAGE, 0).as_ptr() as u64
        }
    }

    /// A server is killed after it has read a fault and a removal and before it has handled them, and after it has
    /// installed a page and before it has recorded that.
    #[test]
    fn messages_that_a_dead_server_has_read_are_not_lost() {
        let guest = Arc::new(Guest(Mapping::anonymous(PAGES * PAGE).expect("memory")));
        let uffd = match Uffd::open(Features::EVENT_REMOVE, Features::NONE) {
            Ok(uffd) => uffd,
            Err(error) => {
                assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{error}");
                let line =
                    format!("SKIPPED messages_that_a_dead_server_has_read_are_not_lost: {error}\n");
                return std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes())
                    .expect("stderr");
            }
        };
        // SAFETY: a mapping that is only accessed by volatile operations.
        unsafe { uffd.register(guest.address(0), (PAGES * PAGE) as u64) }
            .expect("it is registered");
        let handover = HandoverState::create(Record { pid: 0, regions: Vec::new() }, PAGES as u64)
            .expect("a handover state");

        let dead = handover.records(false).expect("it is mapped");
        let mut batch = MessageBatch::journaled(Some(dead.journal));
        let mut read_one = || loop {
            batch.applied();
            uffd.read(&mut batch).expect("it can be read");
            if let Some(message) = batch.messages().next() {
                return message;
            }
        };
        let (toucher, remover) = (Arc::clone(&guest), Arc::clone(&guest));
        let touch = thread::spawn(move || toucher.read(3));
        assert!(matches!(read_one(), Message::Pagefault { .. }));
        let remove = thread::spawn(move || remover.remove(5));
        assert!(matches!(read_one(), Message::Remove { .. }));
        remove.join().expect("the kernel lets it continue");
        // SAFETY: the registered memory, on whose content nothing relies yet.
        unsafe { uffd.copy(guest.address(7), &[9; PAGE]) }.expect("it is installed");
        dead.states.set(1, PageState::Removed);
        drop((batch, dead.states));

        let regions = Region::foreign(guest.address(0), (PAGES * PAGE) as u64, PAGE, 0);
        let duplicate: OwnedFd = uffd.as_fd().try_clone_to_owned().expect("a descriptor");
        // SAFETY: it serves this test's memory, as if the other process were this one.
        let foreign = unsafe { ForeignUffd::new(duplicate) }.expect("a userfaultfd");
        let own = rustix::process::getpid();
        let process = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty());
        let records = handover.records(true).expect("it is mapped");
        let started: Result<Pager, StartError> =
            Pager::builder(Arc::new(VecSource::new(vec![7; PAGES * PAGE], 4 * PAGE)))
                .region(regions.expect("whole pages"))
                .foreign(foreign, process.expect("a pidfd"))
                .recorded(records)
                .start();
        let pager = started.expect("it starts");
        assert_eq!(touch.join().expect("its page comes"), 7);
        let found: Vec<u8> = (0..PAGES).map(|page| guest.read(page)).collect();
        assert_eq!(found, [7, 0, 7, 7, 7, 0, 7, 9, 7, 7, 7, 7, 7, 7, 7, 7]);
        let pages = pager.stop().pages;
        assert_eq!((pages.total, pages.missing, pages.present), (16, 0, 16));
        assert!(handover.records(true).expect("it is mapped").journal.left().is_empty());
    }
}
