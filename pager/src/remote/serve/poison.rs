//! Poisons each page that a client touches, until its process ends: for a client that is not served.

use std::io;
use std::thread;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::given::Given;
use super::handshake;
use super::peer::Peer;
use crate::install::kernel::{self, Drained, Fill, Filler, InstallError, InstallObserver, Target};
use crate::region::PAGE_BYTES;
use crate::uffd::{Features, Message, MessageBatch};

/// The page sizes that memory can have.
const PAGE_SIZES: [usize; 3] = [PAGE_BYTES, 2 << 20, 1 << 30];

impl Given {
    /// The userfaultfds with which all of its memory can be poisoned. Empty if it may have other memory.
    pub(crate) fn userfaultfds(self) -> Vec<Filler> {
        if self.lost {
            return Vec::new();
        }
        let received = self.descriptors.into_iter().filter_map(|fd| handshake::received(fd).ok());
        let received: Vec<_> = received.collect();
        // The memory of a forked child has a userfaultfd of its own.
        if received.iter().any(|uffd| uffd.features().contains(Features::EVENT_FORK)) {
            return Vec::new();
        }
        received.into_iter().map(|uffd| Filler { uffd: uffd.into_uffd(), zeros: None }).collect()
    }
}

/// Poisons every page that is touched, until the process ends.
///
/// # Errors
/// As poll(2), read(2) and `UFFDIO_POISON`. Then threads of the process are left waiting.
pub(crate) fn touched_pages(peer: &Peer, fillers: &[Filler]) -> io::Result<()> {
    loop {
        let mut fds = vec![PollFd::from_borrowed_fd(peer.process(), PollFlags::IN)];
        fds.extend(fillers.iter().map(|filler| PollFd::new(&filler.uffd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
        for (filler, ready) in fillers.iter().zip(&fds[1..]) {
            let revents = ready.revents();
            if revents.contains(PollFlags::IN) {
                Touched::new(filler).poison_all()?;
            } else if !revents.is_empty() {
                // Its owner has made it blocking.
                return Err(io::Error::other("its userfaultfd cannot be polled"));
            }
        }
    }
}

/// Addresses at which threads wait.
struct Touched<'a> {
    filler: &'a Filler,
    addresses: Vec<u64>,
    failed: Option<io::Error>,
}

impl<'a> Touched<'a> {
    fn new(filler: &'a Filler) -> Touched<'a> {
        Touched { filler, addresses: Vec::new(), failed: None }
    }

    fn poison_all(mut self) -> io::Result<()> {
        self.read()?;
        while let Some(address) = self.addresses.pop() {
            self.poison(address)?;
        }
        self.failed.map_or(Ok(()), Err)
    }

    /// Reads the messages of the userfaultfd. Only faults need an answer: a page that was removed or moved is poisoned
    /// when it is touched.
    fn read(&mut self) -> io::Result<()> {
        let mut batch = MessageBatch::new();
        self.filler.uffd.read(&mut batch)?;
        for message in batch.messages() {
            match message {
                Message::Pagefault { address, kind, .. } if !kind.write_protected => {
                    self.addresses.push(address);
                }
                Message::Remove { .. } | Message::Unmap { .. } | Message::Remap { .. } => {}
                other => return Err(io::Error::other(format!("unexpected: {other:?}"))),
            }
        }
        Ok(())
    }

    fn poison(&mut self, address: u64) -> io::Result<()> {
        for page_bytes in PAGE_SIZES {
            let host_addr = address & !(page_bytes as u64 - 1);
            let target = Target { first_page: 0, pages: 1, host_addr, page_bytes };
            match kernel::install(self.filler, target, Fill::Poison, self) {
                Ok(()) | Err(InstallError::ProcessGone) => return Ok(()),
                // The page is part of a larger one.
                Err(InstallError::Refused { errno, .. }) if errno.0 == libc::EINVAL => {}
                Err(InstallError::Refused { errno, .. }) => return Err(errno.into()),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }
}

impl InstallObserver for Touched<'_> {
    fn drain_events(&mut self) -> Drained {
        match self.read() {
            Ok(()) => {
                thread::yield_now();
                Drained::Retry
            }
            Err(error) => {
                self.failed = Some(error);
                Drained::GiveUp
            }
        }
    }
}
