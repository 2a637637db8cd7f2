//! What is done about a client that is not served. A guest has registered its memory by then, and would wait without an end at its
//! first missing page. So it is killed, or the pages that it touches are poisoned, as the policy says of pages that cannot be had.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::error::RefuseError;
use super::peer::Peer;
use super::{Hall, handshake};
use crate::failure::FailurePolicy;
use crate::install::{self, Book, Fill, Filler, InstallError, Settled, Target};
use crate::uffd::{Features, Message, MessageBatch};

/// What was done about a client that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Consequence {
    /// Its connection was closed. It has not said that it has memory which wants pages, or it was told why it gets none.
    Closed,
    /// Each missing page is poisoned when it is touched, as long as the process lives: SIGBUS, in a system call `EFAULT`.
    Poisoned,
    /// Its process was ended by SIGKILL.
    Killed,
}

/// What a client has given before it was refused.
#[derive(Debug, Default)]
pub(crate) struct Given {
    pub(crate) descriptors: Vec<OwnedFd>,
    /// A descriptor was sent and did not arrive.
    pub(crate) lost: bool,
    /// It began to say where its memory is.
    pub(crate) names_memory: bool,
}

/// Page sizes that memory can have.
const PAGE_SIZES: [usize; 3] = [4 << 10, 2 << 20, 1 << 30];

/// Does what the policy says about a client whose connection is closed already. Where pages are poisoned it returns when the
/// client's process has ended.
pub(crate) fn end(hall: &Arc<Hall>, peer: &Arc<Peer>, given: Given, error: &RefuseError) {
    let pid = Some(peer.pid);
    if !given.is_guest() {
        return hall.refuse(pid, error, Consequence::Closed);
    }
    let poisons = hall.options.on_error == FailurePolicy::Poison;
    let fillers = if poisons { given.userfaultfds() } else { Vec::new() };
    if fillers.is_empty() {
        peer.kill();
        return hall.refuse(pid, error, Consequence::Killed);
    }
    let _listed = hall.list_refused(peer);
    hall.refuse(pid, error, Consequence::Poisoned);
    if let Err(error) = poison_what_is_touched(peer, &fillers) {
        peer.kill();
        hall.refuse(pid, &RefuseError::Poison(error), Consequence::Killed);
    }
}

impl Given {
    /// Other programs, such as one that only looks whether the server lives, wait for nothing.
    pub(crate) fn is_guest(&self) -> bool {
        self.names_memory || self.lost || !self.descriptors.is_empty()
    }

    /// Those by which all of its memory can be poisoned; none if there may be more of it.
    fn userfaultfds(self) -> Vec<Filler> {
        if self.lost {
            return Vec::new();
        }
        let received = self.descriptors.into_iter().filter_map(|fd| handshake::received(fd).ok());
        let received: Vec<_> = received.collect();
        // A child's memory would come by a userfaultfd of its own.
        if received.iter().any(|uffd| uffd.features().contains(Features::EVENT_FORK)) {
            return Vec::new();
        }
        received.into_iter().map(|uffd| Filler { uffd: uffd.into_uffd(), zeros: None }).collect()
    }
}

/// Until the process ends. An error leaves threads of it waiting.
fn poison_what_is_touched(peer: &Peer, fillers: &[Filler]) -> io::Result<()> {
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
                // Its owner has made it one whose reads wait.
                return Err(io::Error::other("its userfaultfd cannot be waited for"));
            }
        }
    }
}

/// Addresses of which threads wait.
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

    /// Takes what the userfaultfd tells. What is no fault needs no answer: a page that was removed, or has moved, is
    /// poisoned when it is touched.
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
            match install::install(self.filler, target, Fill::Poison, self) {
                Ok(()) | Err(InstallError::ProcessGone) => return Ok(()),
                // Part of a larger page.
                Err(InstallError::Refused { errno, .. }) if errno.0 == libc::EINVAL => {}
                Err(InstallError::Refused { errno, .. }) => return Err(errno.into()),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }
}

impl Book for Touched<'_> {
    fn wants(&self, _page: u64) -> bool {
        true
    }
    fn filled(&mut self, _first_page: u64, _pages: usize) {}
    fn existing(&mut self, _page: u64) {}
    fn gone(&mut self, _page: u64) {}

    fn settle(&mut self) -> Settled {
        match self.read() {
            Ok(()) => {
                thread::yield_now();
                Settled::Retry
            }
            Err(error) => {
                self.failed = Some(error);
                Settled::GiveUp
            }
        }
    }
}
