//! Clients for which there is no room.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;

use super::error::{RefuseError, chain};
use super::handshake::{self, Answer, Hello};
use super::peer::{self, Peer};
use super::refused::Consequence;
use super::wire::Inlet;
use super::{Hall, ServeEvent, Socket};

/// So long the message of a client for which there is no room is waited for.
const HEAR_TIMEOUT: Duration = Duration::from_millis(100);

impl Hall {
    /// The process of a connection; or its number, as far as that is known, and why not.
    pub(super) fn peer_of(&self, stream: &UnixStream) -> Result<Peer, (Option<i32>, RefuseError)> {
        let pid = peer::allowed(stream).map_err(|error| (None, error))?;
        Peer::of(stream, pid).map_err(|error| (Some(pid.as_raw_nonzero().get()), error))
    }

    /// Accepts a connection with descriptors that were kept for that, and refuses it. Answers whether it could.
    pub(super) fn accept_by_spare(self: &Arc<Hall>, socket: &Socket, error: io::Error) -> bool {
        let accepted = self.spare().released(|| socket.accept());
        match accepted {
            Ok(None) => true,
            Ok(Some(stream)) => {
                self.refuse_without_room(&stream, &RefuseError::Shortage(error));
                true
            }
            Err(error) => {
                (self.on_event)(ServeEvent::Accept { error: &error });
                false
            }
        }
    }

    /// Refuses a client for which there is no room: no thread, or no descriptors. Its message is waited for shortly, with
    /// descriptors that are kept for that, to learn whether it is a guest. Nothing could poison its pages later, so a guest is
    /// killed under either policy.
    pub(super) fn refuse_without_room(self: &Arc<Hall>, stream: &UnixStream, error: &RefuseError) {
        self.spare().released(|| {
            let begun = Instant::now();
            let peer = loop {
                match self.peer_of(stream) {
                    Ok(peer) => break peer,
                    // Another thread was faster. It may be for a moment.
                    Err((_, RefuseError::Shortage(_))) if begun.elapsed() < HEAR_TIMEOUT => {
                        thread::sleep(Duration::from_millis(1));
                    }
                    Err((pid, error)) => return self.refuse(pid, &error, Consequence::Closed),
                }
            };
            let mut inlet = Inlet::new(stream, HEAR_TIMEOUT);
            let is_guest = match handshake::receive(&mut inlet) {
                Ok(Hello::Fill { .. }) => true,
                Ok(Hello::Request(_)) => {
                    // A clone is told why. It may be gone.
                    let _ = Answer::Refused(chain(error)).send(stream, None);
                    false
                }
                Err(_) => inlet.into_given().is_guest(),
            };
            let consequence = if is_guest { Consequence::Killed } else { Consequence::Closed };
            if is_guest {
                peer.kill();
            }
            self.refuse(Some(peer.pid), error, consequence);
        });
    }

    fn spare(&self) -> MutexGuard<'_, Spare> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Descriptors that are kept for a client that is refused for want of them.
pub(super) struct Spare(Vec<OwnedFd>);

impl Spare {
    /// Its connection, its process, what it sends, and what is read of that.
    const DESCRIPTORS: usize = 8;

    pub(super) fn full() -> Spare {
        let mut spare = Spare(Vec::new());
        spare.fill();
        spare
    }

    /// As far as there are some to be had.
    fn fill(&mut self) {
        while self.0.len() < Self::DESCRIPTORS {
            match rustix::event::eventfd(0, EventfdFlags::CLOEXEC) {
                Ok(descriptor) => self.0.push(descriptor),
                Err(_) => return,
            }
        }
    }

    /// Does something with these descriptors free.
    fn released<T>(&mut self, work: impl FnOnce() -> T) -> T {
        self.0.clear();
        let outcome = work();
        self.fill();
        outcome
    }
}
