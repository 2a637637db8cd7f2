//! The guest's output on stdout: it waits for the reader, but not while the guest is to be paused.
//!
//! A reader may stop reading for any time: a pager, a terminal after Ctrl-S. The guest waits for it in the middle of an
//! instruction, and could not be paused, snapshotted or interrupted.

use std::io::{self, ErrorKind, Stdout, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

/// A pipe that is ready takes this many bytes without waiting (pipe(7), PIPE_BUF).
const BLOCK_BYTES: usize = 4096;

/// Stdout, unbuffered. Its writes end with `WouldBlock` when stdout takes nothing while it is held.
pub(crate) struct GuestOutput {
    stdout: Stdout,
    hold: Hold,
}

/// Keeps a [`GuestOutput`] from waiting.
#[derive(Clone)]
pub(crate) struct Hold(Arc<OwnedFd>);

impl GuestOutput {
    pub(crate) fn new() -> io::Result<(Self, Hold)> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let hold = Hold(Arc::new(rustix::event::eventfd(0, flags)?));
        Ok((Self { stdout: io::stdout(), hold: hold.clone() }, hold))
    }
}

impl Hold {
    /// Ends a wait for stdout, and all that come until [`Hold::release`].
    pub(crate) fn hold(&self) {
        // It fails if the counter is full, which also holds the output.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn release(&self) {
        // It fails if the counter is 0: the output is not held.
        let _ = rustix::io::read(&*self.0, &mut [0; 8]);
    }
}

impl Write for GuestOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut fds = [
                PollFd::new(&self.stdout, PollFlags::OUT),
                PollFd::new(&*self.hold.0, PollFlags::IN),
            ];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let (ready, held) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
            if !ready && held {
                return Err(ErrorKind::WouldBlock.into());
            }
            if ready {
                // Also when the reader has closed it: then this returns the error.
                match rustix::io::write(&self.stdout, &bytes[..bytes.len().min(BLOCK_BYTES)]) {
                    Err(Errno::INTR | Errno::AGAIN) => {}
                    written => return Ok(written?),
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
